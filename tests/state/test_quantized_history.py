"""States of eight bits: the rounding itself, equal bytes on both ends, no drift, and the bytes they take."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compactdist import Options
from compactdist.kernels import restored
from compactdist.observe.estimate import estimate
from compactdist.state import StateStore, StreamConfig, state_nbytes
from compactdist.state.quantized_history import quantize
from tests.quick import quick_for
from tests.state import kit

FORMS = ("int8", "fp8")
SIZES = (0, 1, 127, 128, 129, 1000, 4096, 2 * 65536 + 77)


def e4m3(code):
    """The value of a float8, as the format's definition has it."""
    sign, exponent, mantissa = code >> 7, code >> 3 & 15, code & 7
    magnitude = mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)
    return -magnitude if sign else magnitude


def by_hand(kept):
    """A second decoder, in numpy."""
    codes, scales = kept.codes.numpy(), kept.scales.float().numpy()
    levels = codes.astype(np.float32)
    if codes.dtype == np.uint8:
        levels = np.array([e4m3(int(code)) * 2**9 for code in codes], np.float32)
    with np.errstate(over="ignore"):
        values = levels * np.repeat(scales, 128)[: codes.size]
    limit = np.float32(torch.finfo(kept.dtype).max)
    return torch.empty(codes.size, dtype=kept.dtype).copy_(torch.from_numpy(np.clip(values, -limit, limit)))


def wide(numel, seed, dtype):
    """Magnitudes over forty powers of ten, zeros, and the ends of the dtype."""
    g = torch.Generator().manual_seed(seed)
    limit = torch.finfo(dtype).max
    x = torch.randn(numel, generator=g, dtype=torch.float64)
    x = x * torch.exp(20 * torch.randn(numel, generator=g, dtype=torch.float64))
    x = torch.where(torch.rand(numel, generator=g) < 0.05, torch.full_like(x, limit), x)
    x[numel // 3 : numel // 2] = 0
    return x.clamp(-limit, limit).to(dtype)


@given(
    form=st.sampled_from(FORMS),
    dtype=st.sampled_from(kit.DTYPES),
    numel=st.sampled_from(SIZES),
    seed=st.integers(0, 2**31),
    spread=st.booleans(),
)
def test_rounding_is_as_described(form, dtype, numel, seed, spread):
    x = wide(numel, seed, dtype) if spread else torch.randn(numel, generator=torch.Generator().manual_seed(seed))
    x = x.to(dtype)
    kept = quantize(x, form, dtype)
    y = restored(kept)
    assert kit.same_bytes(y, by_hand(kept))
    assert torch.isfinite(y).all()
    assert kept.codes.shape == (numel,)
    assert kept.scales.shape == (-(-numel // 128),)
    blocks = zip(x.double().split(128), y.double().split(128), strict=True)
    for block, got in blocks if numel else ():
        amax = block.abs().max()
        if amax < 1e-20:
            assert (got.abs() <= 2 * amax).all()
            continue
        # half a step (a 127th of the largest, rounded up), or half of one of 8 to an octave; then the dtype's own
        step = amax / 127 * (1 + 2**-7)
        half = 0.5 * step if form == "int8" else torch.maximum(block.abs() / 16, amax / 448 / 512)
        own = torch.finfo(dtype).eps / 2 * (block.abs() + half) + torch.finfo(dtype).smallest_normal
        assert ((got - block).abs() <= 1.001 * half + own).all()


@pytest.mark.parametrize("form", FORMS)
def test_values_that_fit_are_kept_exactly(form):
    x = torch.arange(-127.0, 128.0) if form == "int8" else torch.tensor([e4m3(c) for c in range(256) if c & 127 < 127])
    # a largest level in every block, so that the scale is a power of two
    blocks = torch.cat([torch.cat([part, x.max()[None]]) for part in x.split(127) if part.numel() == 127])
    assert torch.equal(restored(quantize(blocks, form, torch.float32)), blocks)


@pytest.mark.parametrize("form", FORMS)
def test_rounding_twice_changes_nothing(form):
    """The scale of rounded values is the same or smaller, and a resting stream comes to rest."""
    x = torch.randn(1000)
    once = restored(quantize(x, form, torch.float32))
    twice = restored(quantize(once, form, torch.float32))
    assert (twice - once).abs().max() <= 2**-7 * x.abs().max()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", kit.DTYPES)
def test_scratch_and_new_tensors_get_the_same(form, dtype):
    x = torch.randn(300).to(dtype)
    kept, scratch = quantize(x, form, dtype), torch.full((300,), 7.0, dtype=dtype)
    assert restored(kept, scratch) is scratch
    assert kit.same_bytes(scratch, restored(kept))


def errors(frames, **options):
    encoder, decoder = kit.pair(**options)
    out = []
    for x in frames:
        y = decoder.decode(encoder.encode(x)).float()
        kit.check_in_step(encoder, decoder)
        out.append(float((y - x.float()).square().sum() / x.float().square().sum()))
    return out


def wander(steps, dtype, n=4000, pace=0.1):
    g = torch.Generator().manual_seed(5)
    x = torch.randn(n, generator=g)
    for _ in range(steps):
        yield x.to(dtype)
        x = x + pace * torch.randn(n, generator=g)


@pytest.mark.parametrize(("codec", "order", "allowed"), [
    ("binary", 1, {"int8": 1.05, "fp8": 1.2}),
    ("binary", 2, {"int8": 1.05, "fp8": 1.3}),
    ("int2", 1, {"int8": 1.05, "fp8": 1.2}),
    ("int4", 1, {"int8": 1.05, "fp8": 1.2}),
    ("int4", 2, {"int8": 1.05, "fp8": 1.3}),
])  # fmt: skip
@pytest.mark.parametrize("dtype", quick_for([torch.bfloat16], kit.DTYPES))
def test_fifty_steps_do_not_drift(codec, order, allowed, dtype):
    """The error of steps 26 to 50 is that of the steps before, and close to that with an exact state."""
    values = list(wander(50, dtype))
    exact = errors(values, codec=codec, order=order, keyframe="raw")
    coded = errors(values[:2], codec=codec)[0]
    for form in FORMS:
        rounded = errors(values, codec=codec, order=order, state=form, keyframe="raw")
        assert rounded[0] == 0, "a keyframe is delivered as it is"
        assert errors(values[:2], codec=codec, order=order, state=form)[0] == coded
        assert sum(rounded[26:]) < 1.1 * sum(rounded[2:26])
        assert sum(rounded[10:]) < allowed[form] * sum(exact[10:])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("order", [1, 2, "auto"])
def test_a_resting_tensor_is_reached_beyond_the_resolution_of_the_state(form, order):
    """What the state cannot hold is sent again with every frame: the user's copy is better than the state."""
    start, x = torch.randn(2, 4000)
    error = errors([start, *[x] * 30], codec="int4", order=order, state=form)
    state_alone = restored(quantize(x, form, x.dtype))
    assert error[30] < 0.4 * float((state_alone - x).square().sum() / x.square().sum())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("order", [1, 2, "auto"])
@pytest.mark.parametrize("feedback", [None, False])
@pytest.mark.parametrize(("dtype", "share"), [(torch.bfloat16, 0.5078125), (torch.float32, 0.25390625)])
def test_the_bytes_are_half_or_a_quarter(form, order, feedback, dtype, share):
    x = torch.randn(12800).to(dtype)
    exact = kit.pair(codec="int4", order=order, error_feedback=feedback)
    rounded = kit.pair(codec="int4", order=order, error_feedback=feedback, state=form)
    for encoder, decoder in (exact, rounded):
        for _ in range(3):
            decoder.decode(encoder.encode(x))
    for full, small, sender in zip(exact, rounded, (True, False), strict=True):
        assert small.state_bytes == share * full.state_bytes
        assert small.state_bytes == state_nbytes(small.config, x.numel(), dtype, sender=sender)
        assert small.state_bytes == sum(t.untyped_storage().nbytes() for t in tensors_of(small))
    planned = [estimate(Options(order=order, state=s), 4, 12800, dtype=dtype).state_bytes for s in ("exact", form)]
    assert planned[1] == share * planned[0]


def tensors_of(end):
    open_loop = getattr(end._stream, "_own_predictor", None)
    return [*end._stream.predictor.held, *(open_loop.held if open_loop else ())]


@pytest.mark.parametrize("form", FORMS)
def test_a_staged_frame_changes_nothing_and_scratch_is_shared(form):
    store = StateStore(StreamConfig(find_layout=False, state=form), "group", None)
    codec = kit.pair(codec="int2")[0].codec
    x, encoders = torch.randn(1 << 15), [store.site(f"site{i}").encoder(0) for i in range(3)]
    for step in range(4):
        for encoder in encoders:
            before = [t.clone() for t in encoder.predictor.held]
            staged = encoder.stage(x * (step + 1), codec, keyframe=step == 0)
            value = None if staged.value is None else staged.value.clone()
            repeated = encoder.stage(x * (step + 1), codec, keyframe=step == 0)
            assert torch.equal(repeated.frame, staged.frame)
            assert all(map(torch.equal, before, encoder.predictor.held))
            encoder.commit(staged)
            assert torch.equal(staged.value, value), "the user's value is not the state's"
    assert sum(store.state_bytes().values()) == 3 * (x.numel() + 2 * x.numel() // 128)
    assert store.spares.nbytes == x.nbytes
