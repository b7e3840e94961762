"""Levels along a trellis: what the format says is what is read, both ends alike, and what the trellis is for."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compactdist import codecs, kernels
from compactdist.codecs.scalar.gaussian_levels import LOSS as SCALAR_LOSS
from compactdist.codecs.transform import trellis
from compactdist.codecs.transform.coding import Layout, decode
from compactdist.codecs.transform.depths import allocate
from compactdist.codecs.transform.levels import unit_levels_of
from compactdist.codecs.transform.trellis import TRELLIS
from compactdist.errors import CodecConfigError
from compactdist.kernels.reference.components import course
from compactdist.state import ResidualDecoder, ResidualEncoder, StreamConfig, plain
from compactdist.state.decoder import StreamDecoder
from compactdist.state.encoder import StreamEncoder
from compactdist.state.staged import Wanted
from compactdist.testing import check_codec
from tests.quick import quick_for
from tools.trellis_levels import loss_of

DEPTHS = range(1, TRELLIS.deepest + 1)
bounded = settings(max_examples=25, deadline=None, derandomize=True)


def coded(bits: float, **options: object) -> codecs.Codec:
    return codecs.get({"id": "transform", "bits": bits, "trellis": True, **options})


def _read_slowly(planes: torch.Tensor, depth: int, first: int, rows: int) -> list[int]:
    """The levels of a component, bit by bit as ``trellis.py`` says it."""
    stride = trellis.stride_of(rows)
    turns = -(-rows // stride)

    def bit(plane: int, row: int) -> int:
        return int(planes[plane, row // 8]) >> row % 8 & 1 if row < rows else 0

    def move(turn: int, course_of: int) -> int:
        return bit(first, turn % turns * stride + course_of)

    levels, subsets = [], [TRELLIS.whole(depth)[which::4] for which in range(4)]
    for row in range(rows):
        turn, course_of = divmod(row, stride)
        which = 2 * (move(turn, course_of) ^ move(turn - 2, course_of)) + move(turn - 1, course_of)
        number = sum(bit(first + 1 + place, row) << place for place in range(depth - 1))
        levels.append(subsets[which][number])
    return levels


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 40, 102, 1023, 1024, 1090])
def test_any_bits_are_read_as_the_format_says(rows):
    layout = Layout.of(rows, 6, 3.0, 128, TRELLIS)
    g = torch.Generator().manual_seed(rows)
    payload = torch.randint(0, 256, (layout.nbytes,), generator=g, dtype=torch.uint8)
    scales, energies, _, planes = payload.split(list(layout.sections))
    scales[:4] = torch.tensor([1.0]).view(torch.uint8)
    energies[:6] = torch.tensor([255, 250, 247, 239, 228, 190], dtype=torch.uint8)
    whole = layout.planes_of(planes)
    if rows % 8:
        whole[:, -1] &= (1 << rows % 8) - 1
    for which in ("reference", "cpu"):
        with kernels.use(which):
            frame = decode(payload, layout, torch.empty(layout.components, rows, dtype=torch.int8))
        depths = frame.spread.chosen.depths.tolist()
        assert sum(depths) == layout.planes == 18
        for levels, depth, first in zip(frame.levels, depths, frame.spread.chosen.planes.tolist(), strict=True):
            assert levels.tolist() == _read_slowly(whole, depth, first, rows)


@bounded
@given(
    rows=st.sampled_from([1, 5, 8, 33, 102, 300, 1024, 1057, 1500]),
    channels=st.sampled_from([1, 6, 20, 130]),
    bits=st.sampled_from([0.1, 0.9, 2.0, 3.7, 7.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 99),
)
def test_both_ends_hold_the_same_on_any_kernels(rows, channels, bits, dtype, seed):
    g = torch.Generator().manual_seed(seed)
    x = (torch.randn(rows, channels, generator=g) * torch.logspace(0, -1, channels)).to(dtype)
    codec, payloads, values = coded(bits), [], []
    for which in ("reference", "cpu"):
        with kernels.use(which):
            payloads.append(codec.encode(x))
            values.append([codec.decode(one, x.shape, dtype) for one in payloads])
    assert torch.equal(values[0][0], values[1][0])  # whoever decodes
    with kernels.use("reference"):
        assert torch.equal(codec.decode(payloads[1], x.shape, dtype), values[1][1])
    errors = [float((one - x).float().norm() / x.float().norm().clamp(min=1e-9)) for one in values[1]]
    assert errors[1] == pytest.approx(errors[0], rel=0.05, abs=1e-3)


@pytest.mark.parametrize("rows", quick_for([1088], [256, 1088, 4096]))
@pytest.mark.parametrize("bits", [1.0, 2.0, 4.0])
def test_it_is_better_by_what_the_literature_says(rows, bits):
    """0.6, 1.2 and 1.6 dB at one, two and four bits, of the same size."""
    x = torch.randn(rows, 64, generator=torch.Generator().manual_seed(0))
    errors = []
    for codec in (codecs.get("transform", bits=bits), coded(bits)):
        payload = codec.encode(x)
        errors.append(float((codec.decode(payload, x.shape, x.dtype) - x).square().mean()))
    assert codec.payload_nbytes(x.shape, x.dtype) == codecs.get("transform", bits=bits).payload_nbytes(x.shape, x.dtype)
    assert 10 * math.log10(errors[0] / errors[1]) > {1.0: 0.4, 2.0: 0.9, 4.0: 1.2}[bits]


@pytest.mark.parametrize("depth", DEPTHS)
def test_levels_lose_what_is_stored(depth):
    samples = torch.randn(60, 300, generator=torch.Generator().manual_seed(1))
    whole = torch.tensor(TRELLIS.whole(depth), dtype=torch.float32)
    assert len(whole) == 2 ** (depth + 1)
    assert torch.equal(whole, -whole.flip(0))
    assert whole.max() == 127
    unit = float(unit_levels_of(torch.tensor([depth]), TRELLIS))
    loss = loss_of(samples, whole * unit)
    assert loss == pytest.approx(TRELLIS.losses[depth], rel=0.06)
    if depth in SCALAR_LOSS:
        assert loss < 0.9 * SCALAR_LOSS[depth]


def test_no_course_loses_less():
    """Of all courses round the trellis, tried one by one."""
    turns = 6
    subsets = torch.tensor(TRELLIS.whole(1), dtype=torch.float32).view(1, 4).T.contiguous() * float(
        unit_levels_of(torch.tensor([1]), TRELLIS)
    )
    every = torch.tensor([[which >> turn & 1 for turn in range(turns)] for which in range(2**turns)])
    levels = subsets[2 * (every ^ every.roll(2, 1)) + every.roll(1, 1), 0]
    samples = torch.randn(50, turns, generator=torch.Generator().manual_seed(2))
    least = (samples[:, None] - levels).square().sum(-1).amin(1)
    moves, _, _ = course(samples, subsets, 1)
    bits = moves.long()
    found = subsets[2 * (bits ^ bits.roll(2, 1)) + bits.roll(1, 1), 0]
    assert torch.allclose((samples - found).square().sum(1), least, rtol=1e-5)


@bounded
@given(codes=st.lists(st.integers(0, 255), min_size=1, max_size=40), share=st.floats(0, 1))
def test_no_component_gets_more_bits_than_a_trellis_has(codes, share):
    planes = round(share * TRELLIS.deepest * len(codes))
    bits = allocate(torch.tensor(codes, dtype=torch.uint8), planes, TRELLIS)
    assert int(bits.sum()) == planes
    assert int(bits.max()) <= TRELLIS.deepest


def test_both_ends_of_a_stream_go_on_together():
    codec, config = coded(1.5), StreamConfig(find_layout=False)
    sender, receiver = StreamEncoder(config, 1, "here"), StreamDecoder(config, 1, "here")
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1100, 40, generator=g)
    for step in range(6):
        x = x + 0.1 * torch.randn(1100, 40, generator=g)
        staged = sender.stage(x, codec, Wanted(step=step), keyframe=step == 0)
        sender.commit(staged)
        got = receiver.decode(staged.frame, codec, x.numel(), x.dtype, step=step)
        assert torch.equal(sender.predictor.base, receiver.predictor.base)
        assert float((got.view(x.shape) - x).norm() / x.norm()) < 0.1


@pytest.mark.parametrize("which", ["reference", "cpu"])
@pytest.mark.parametrize("rows", [5, 300, 1100])
def test_whoever_encodes_holds_what_is_decoded_whatever_the_values(rows, which):
    """Rows that no energy was taken from, and components next to nothing, are far from any level."""
    g = torch.Generator().manual_seed(rows)
    for spread in (0, 4, 9, 18):
        x = torch.randn(rows, 24, generator=g) * 10 ** (spread * (torch.rand(rows, 24, generator=g) - 0.5))
        x[1::3] *= 1e-6
        if spread == 0:
            x[1::2] *= 1e13  # of more than 1,023 rows energies are those of every second
        view = plain(x.numel(), 1, 24)
        out, decoded = torch.empty(x.numel()), torch.empty(x.numel())
        with kernels.use(which):
            session = coded(2.5).open(view, x.dtype, x.device)
            payload = torch.empty(session.payload_nbytes, dtype=torch.uint8)
            session.encode(x.view(-1), (), out, payload)
        with kernels.use("reference"):
            coded(2.5).open(view, x.dtype, x.device).decode(payload, (), decoded)
        assert torch.equal(out, decoded)
        assert out.isfinite().all()


def test_alone_and_after_a_keyframe():
    encoder, decoder = ResidualEncoder(coded(2.0)), ResidualDecoder(coded(2.0))
    x = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        x = x + 0.1
        assert torch.allclose(decoder.decode(encoder.encode(x)), x, atol=0.2)


def test_the_kit_passes_it():
    check_codec(coded(2.0))


def test_options():
    assert coded(2.0).get_config() == {"bits": 2.0, "trellis": True}
    assert codecs.get("transform:bits=2,trellis=true") == coded(2.0)
    assert coded(2.0) != codecs.get("transform", bits=2.0)
    with pytest.raises(CodecConfigError, match=r"from 0.05 to 7 with a trellis, got 7.5"):
        coded(7.5)
    with pytest.raises(CodecConfigError, match=r"trellis must be true or false, got 1"):
        coded(2.0, trellis=1)
    assert codecs.get("transform", bits=8).bits == 8
