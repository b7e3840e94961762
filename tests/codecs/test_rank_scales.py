"""``binary`` with scales of rank k: better where magnitudes have that structure, never worse than sending nothing."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compactdist import codecs
from compactdist.codecs.scalar.rank_scales import RankSections
from compactdist.errors import CodecConfigError
from tests.codecs import kit

BIG = (160, 200)  # room for five components


def ranked(rank=4):
    return codecs.get("binary", scales="rank", rank=rank)


def structured(rank, shape=BIG, noise=True, seed=0):
    """Signs times a sum of ``rank`` products of positive vectors, with Gaussian magnitudes if ``noise``."""
    g = torch.Generator().manual_seed(seed)
    rows, channels = torch.rand(rank, shape[0], 1, generator=g) ** 3, torch.rand(rank, 1, shape[1], generator=g) ** 3
    x = torch.randn(shape, generator=g)
    return (x if noise else x.sign()) * (rows * channels).sum(0)


def bfloat16(payload, count, at):
    return (np.frombuffer(payload, "<u2", count, at).astype("<u4") << 16).view("<f4")


def decode_with_numpy(rank, payload, shape):
    """A second decoder, one step of the description after the other."""
    g, r, c = (1, *shape)[-3:]
    k = min(rank, r * c // (16 * (r + c)))
    codes = np.unpackbits(np.frombuffer(payload, np.uint8, math.ceil(g * r * c / 8)), bitorder="little")[: g * r * c]
    at = math.ceil(g * r * c / 8 / 16) * 16
    gain = bfloat16(payload, g, at).reshape(g, 1, 1)
    at += math.ceil(2 * g / 16) * 16
    u = bfloat16(payload, g * k * r, at).reshape(g, k, r, 1)
    at += math.ceil(2 * g * k * r / 16) * 16
    v = bfloat16(payload, g * k * c, at).reshape(g, k, 1, c)
    assert len(payload) == at + math.ceil(2 * g * k * c / 16) * 16
    p = np.zeros((g, r, c), np.float32)
    for i in range(k):
        p = p + u[:, i] * v[:, i]
    with np.errstate(over="ignore"):
        scale = np.where(p < np.float32(2.0**-30), np.float32(0), p) * gain
    limit = np.finfo(np.float32).max
    return np.where(codes.reshape(g, r, c) == 1, scale, -scale).reshape(shape).clip(-limit, limit)


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 16])
@pytest.mark.parametrize("shape", [BIG, (33, 65), (64, 64), (3, 80, 70), (2, 700, 901)])
@pytest.mark.parametrize("name", ["gaussian", "hot_cross", "wide_range", "one_hot", "zero"])
def test_decoder_follows_the_description(rank, shape, name):
    codec, x = ranked(rank), kit.sample(name, shape)
    payload = codec.encode(x)
    expected = decode_with_numpy(rank, payload.numpy().tobytes(), shape)
    assert torch.equal(codec.decode(payload, shape, torch.float32), torch.from_numpy(expected))


@pytest.mark.parametrize("rank", [1, 4, 16])
@settings(max_examples=30)
@given(
    shape=st.sampled_from([BIG, (40, 300), (2, 90, 90), (3, 2, 64), (2000, 40)]),
    name=st.sampled_from(sorted(kit.DISTRIBUTIONS)),
    dtype=st.sampled_from(kit.FLOAT_DTYPES),
    seed=st.integers(0, 2**32 - 1),
)
def test_shapes_with_room_for_every_component(rank, shape, name, dtype, seed):
    kit.check_input(ranked(rank), kit.sample(name, shape, dtype, seed))


def test_structure_of_rank_three_is_found():
    for noise, gain in ((True, 1.1), (False, 100.0)):
        x = structured(3, noise=noise)
        plain = kit.nmse(codecs.get("binary"), x)
        assert kit.nmse(ranked(4), x) < plain / gain
        assert kit.nmse(ranked(3), x) < kit.nmse(ranked(2), x) < kit.nmse(ranked(1), x)


@pytest.mark.parametrize("name", ["gaussian", "laplace", "student4", "channel_scaled"])
def test_one_component_is_as_good_as_a_scale_for_each_token_and_channel(name):
    x = kit.sample(name, BIG)
    assert kit.nmse(ranked(1), x) < 1.002 * kit.nmse(codecs.get("binary"), x)


def test_more_components_are_never_worse_on_noise():
    errors = [kit.nmse(ranked(rank), kit.sample("gaussian", (400, 600))) for rank in (1, 2, 4, 8, 16)]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize(
    ("shape", "rank"),
    [((1088, 3072), 4), ((160, 200), 4), ((102, 128), 3), ((64, 64), 2), ((32, 32), 1), ((2, 3, 4, 64, 2, 64), 4)],
)
def test_small_matrices_take_fewer_components(shape, rank):
    layout = ranked().sections_of(shape)
    assert isinstance(layout, RankSections)
    assert layout.rank == rank
    factors = layout.total_nbytes - layout.u_at
    assert factors <= layout.codes_nbytes + 32, "the factors never take more than the signs"


@pytest.mark.parametrize("shape", [(), (0,), (17,), (300,), (0, 5), (1, 5000), (5000, 1), (31, 31), (16, 5000)])
def test_thin_tensors_are_sent_with_token_and_channel_scales(shape):
    x = kit.sample("gaussian", shape)
    assert torch.equal(ranked().encode(x), codecs.get("binary").encode(x))
    assert ranked().payload_nbytes(shape, x.dtype) == codecs.get("binary").payload_nbytes(shape, x.dtype)


@pytest.mark.parametrize("rank", [1, 4])
def test_zero_rows_and_channels_stay_zero(rank):
    x = kit.sample("gaussian", (2, *BIG))
    x[0, 7] = 0
    x[:, :, 11] = 0
    y = kit.round_trip(ranked(rank), x)
    assert not y[0, 7].any()
    assert not y[:, :, 11].any()
    assert y[0, 8].any()


@pytest.mark.parametrize("rank", [1, 4])
def test_a_tensor_that_stands_still_is_reached(rank):
    x = kit.sample("student4", (96, 80))
    base, errors = torch.zeros_like(x), []
    for _ in range(80):
        base = base + kit.round_trip(ranked(rank), x - base)
        errors.append(float((x - base).square().sum()))
    assert all(later <= earlier for earlier, later in pairwise(errors))
    assert errors[-1] < 1e-3 * float(x.square().sum())


def test_groups_do_not_meet():
    x = torch.stack([kit.sample("gaussian", BIG), kit.sample("huge", BIG, seed=1)])
    for group in range(2):
        assert torch.equal(kit.round_trip(ranked(), x)[group], kit.round_trip(ranked(), x[group]))


def test_nobody_elses_random_numbers_change():
    before = torch.get_rng_state()
    payload = ranked().encode(kit.sample("gaussian", BIG))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert torch.equal(ranked().encode(kit.sample("gaussian", BIG)), payload)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"scales": "rank", "rank": 0}, "rank must be an integer from 1 to 16, got 0"),
        ({"scales": "rank", "rank": 17}, "from 1 to 16"),
        ({"scales": "rank", "rank": 2.0}, "from 1 to 16"),
        ({"rank": 2}, "rank=2 needs scales='rank'"),
        ({"scales": "block", "rank": 2}, "rank=2 needs scales='rank'"),
        ({"scales": "rank", "block": 64}, "block=64 needs scales='block'"),
        ({"scales": "ranks"}, "'token_channel', 'token_history', 'block', 'rank'"),
    ],
)
def test_impossible_options(options, says):
    with pytest.raises(CodecConfigError, match=says):
        codecs.get("binary", **options)


def test_other_codecs_have_no_such_scales():
    with pytest.raises(CodecConfigError, match="'token_channel', 'token_history', 'block', got 'rank'"):
        codecs.get("int2", scales="rank")
