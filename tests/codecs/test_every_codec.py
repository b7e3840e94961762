from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compactdist import codecs
from tests.codecs import kit, make_fixtures
from tests.quick import quick_for

CODECS = [codecs.get(codec_id) for codec_id in codecs.list()]
LOSSY = [codec for codec in CODECS if not codec.lossless]
VARIANTS = {name: codecs.get(spec) for name, spec in make_fixtures.VARIANTS.items()}
every_codec = pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.codec_id)
half_of_codecs = pytest.mark.parametrize("codec", quick_for(CODECS[::2], CODECS), ids=lambda codec: codec.codec_id)
every_lossy_codec = pytest.mark.parametrize("codec", LOSSY, ids=lambda codec: codec.codec_id)
bounded = settings(max_examples=25, deadline=None, derandomize=True)

any_shape = st.sampled_from(kit.SHAPES) | st.lists(st.integers(1, 40), max_size=3).map(tuple)
any_name = st.sampled_from(sorted(kit.DISTRIBUTIONS))
any_seed = st.integers(0, 2**32 - 1)


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", kit.DISTRIBUTIONS)
@half_of_codecs
def test_every_distribution(codec, name):
    """On every second shape, on the others with the next distribution and with the next codec; any other below."""
    turn = CODECS.index(codec) + list(kit.DISTRIBUTIONS).index(name)
    for shape in kit.SHAPES[turn % 2 :: 2]:
        kit.check_input(codec, kit.sample(name, shape))


@half_of_codecs
@settings(bounded, max_examples=16)  # the most expensive ones, and every distribution is tested above
@given(shape=any_shape, name=any_name, dtype=st.sampled_from(kit.FLOAT_DTYPES), seed=any_seed)
def test_any_input(codec, shape, name, dtype, seed):
    kit.check_input(codec, kit.sample(name, shape, dtype, seed))


@pytest.mark.parametrize("variant", quick_for([*VARIANTS][::3], VARIANTS))
@settings(max_examples=6, deadline=None, derandomize=True)
@given(shape=any_shape, name=any_name, dtype=st.sampled_from(kit.FLOAT_DTYPES), seed=any_seed)
def test_options_on_any_input(variant, shape, name, dtype, seed):
    kit.check_input(VARIANTS[variant], kit.sample(name, shape, dtype, seed))


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_options_on_every_distribution(variant):
    codec = VARIANTS[variant]
    kit.check_config_round_trip(codec)
    kit.check_bad_inputs(codec)
    for index, name in enumerate(kit.DISTRIBUTIONS):
        for shape in kit.SHAPES[index % 4 :: 4]:
            kit.check_input(codec, kit.sample(name, shape))
        x = kit.sample("gaussian", (2, 80, 70))
        kit.check_scale_equivariance(codec, x, 3 * index)
        assert torch.equal(kit.round_trip(codec, x)[1], kit.round_trip(codec, x[1]))


@every_lossy_codec
@bounded
@given(values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=200), rows=any_seed)
def test_any_values(codec, values, rows):
    """Adversarial magnitudes next to each other, in one column of many rows or one row of many columns."""
    x = torch.tensor(values, dtype=torch.float32)
    kit.check_contraction(codec, x)
    width = 1 + rows % 7
    kit.check_contraction(codec, x[: len(values) // width * width].view(-1, width))


@every_lossy_codec
@bounded
@given(
    shape=any_shape,
    name=st.sampled_from(["gaussian", "laplace", "student4", "channel_scaled", "one_hot", "hot_cross"]),
    exponent=st.integers(-30, 60),
    seed=any_seed,
)
def test_scale_equivariance(codec, shape, name, exponent, seed):
    kit.check_scale_equivariance(codec, kit.sample(name, shape, seed=seed), exponent)


@every_codec
def test_config_round_trip(codec):
    kit.check_config_round_trip(codec)


@every_codec
def test_bad_inputs(codec):
    kit.check_bad_inputs(codec)


@every_lossy_codec
def test_zero_rows_and_channels_stay_zero(codec):
    x = kit.sample("gaussian", (2, 80, 70))
    x[0, 7] = 0
    x[:, :, 11] = 0
    x[1, 3:9, 20:30] = 0
    y = kit.round_trip(codec, x)
    assert not y[0, 7].any()
    assert not y[:, :, 11].any()
    assert y[0, 8].any()


@every_lossy_codec
def test_groups_do_not_meet(codec):
    """A group must decode as if it had been sent alone, whatever its neighbour is."""
    x = torch.stack([kit.sample("gaussian", (80, 70)), kit.sample("huge", (80, 70), seed=1)])
    together = kit.round_trip(codec, x)
    for group in range(2):
        assert torch.equal(together[group], kit.round_trip(codec, x[group]))


@every_lossy_codec
def test_residual_loop_converges(codec):
    """Both ends add what was sent to the base; on a tensor that stands still the base must reach it."""
    x = kit.sample("student4", (96, 80))
    base = torch.zeros_like(x)
    errors = []
    for _ in range(80):
        base = base + kit.round_trip(codec, x - base)
        errors.append(float((x - base).square().sum()))
    assert all(later <= earlier for earlier, later in pairwise(errors) if earlier > 1e-9)
    assert errors[-1] < 1e-3 * float(x.square().sum())


@every_lossy_codec
def test_thread_count_changes_nothing(codec):
    x = kit.sample("laplace", (515, 300))
    alone = codec.encode(x)
    decoded = codec.decode(alone, x.shape, x.dtype)
    torch.set_num_threads(2)
    assert torch.equal(codec.decode(alone, x.shape, x.dtype), decoded)
    if not codec.codec_id.startswith("lowrank"):  # its encoder uses matrix products, whose order is the library's
        assert torch.equal(codec.encode(x), alone)
