"""The Triton kernels against the reference: the same payload and the same reconstruction, bit for bit."""

from __future__ import annotations

import pytest
import torch

from compactdist import codecs
from compactdist.kernels import steps_for, use
from compactdist.kernels.gpu.steps import TritonSteps, steps_of
from compactdist.state.matrix_view import blocks, plain
from tests.codecs import kit as codec_kit
from tests.kernels import test_zeros as zeros
from tests.kernels.gpu import kit
from tests.kernels.test_spec import Coarse, Eight, Uneven, WithZero

every_form = pytest.mark.parametrize("form", kit.FORMS, ids=kit.name_of)


@pytest.fixture(autouse=True)
def _the_kernels_run(monkeypatch):
    """A step that quietly went to the reference would be equal to it, too."""
    calls = []
    for name in ("encode", "decode"):
        real = getattr(TritonSteps, name)
        monkeypatch.setattr(
            TritonSteps, name, lambda *args, real=real, **kwargs: calls.append(real) or real(*args, **kwargs)
        )
    yield
    assert calls


@every_form
def test_in_many_cuts(form):
    codec = kit.get(form)
    for view in kit.rotated(form, kit.VIEWS, 5):
        index = kit.VIEWS.index(view)
        dtype = kit.DTYPES[(index + len(str(form))) % 3]
        base = kit.draw("gaussian", view.numel, view.channels, index).to(dtype)
        change = kit.draw("L" if index % 2 else "gaussian", view.numel, view.channels, 100 + index)
        terms = (base,) if index % 5 else ()
        kit.check_same(codec, kit.cast(base.double() + 0.1 * change, dtype), terms, view)


@every_form
def test_of_many_kinds_of_input(form):
    codec = kit.get(form)
    for index, kind in enumerate(kit.rotated(form, kit.KINDS, 6)):
        view = (plain(3 * 3 * 72, 3, 72), plain(2 * 4 * 65, 2, 65), plain(9 * 40, 1, 40))[index % 3]
        dtype = kit.DTYPES[(index + len(str(form))) % 2]
        kit.check_same(codec, kit.cast(kit.draw(kind, view.numel, view.channels), dtype), (), view)


@every_form
def test_with_a_velocity(form):
    view = plain(2 * 3 * 80, 2, 80)
    base, velocity, change = (kit.draw("gaussian", view.numel, 80, seed).to(torch.bfloat16) for seed in range(3))
    kit.check_same(kit.get(form), base + velocity + 0.1 * change, (base, velocity / 4), view)


@pytest.mark.parametrize("codec_id", ["int4", "fp8"])
def test_a_change_beyond_float32(codec_id):
    """The level above a value times its scale is held to the largest number, before what was expected is added."""
    view, largest = blocks(128 * 64), torch.finfo(torch.float32).max
    base, few = (
        torch.full((view.numel,), -9.8e37),
        torch.arange(128).repeat(64) < torch.arange(64).repeat_interleave(128),
    )
    x = torch.where(few, 2.4228e38, -6e37)
    codec, held = codecs.get(codec_id, scales="block"), torch.empty_like(x)
    kit.check_same(codec, x, (base,), view)
    with use("reference"):
        codec_kit.encode_residual(codec, x, (base,), view, held)
    assert (held == largest + base).any()


@every_form
def test_of_any_payload(form):
    """Bytes no encoder makes: scales beyond one, infinite and negative ones. NaN may differ in its bits only."""
    view, codec, dtype = plain(2 * 66 * 72, 2, 72), kit.get(form), kit.DTYPES[len(str(form)) % 3]
    g = torch.Generator().manual_seed(len(str(form)))
    payload = torch.randint(256, (codec.payload_nbytes(view.shape, dtype),), generator=g).to(torch.uint8)
    base, expected = torch.randn(view.numel, generator=g), torch.empty(view.numel, dtype=dtype)
    base[::3] *= 1e38
    base = kit.cast(base, dtype)
    got = torch.empty(view.numel, dtype=dtype, device=kit.DEVICE)
    with use("reference"):
        codec_kit.decode_residual(codec, payload, (base,), view, expected)
    with use("gpu"):
        codec_kit.decode_residual(codec, payload.to(kit.DEVICE), (base.to(kit.DEVICE),), view, got)
    got = got.cpu()
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(kit.raw(got.nan_to_num()), kit.raw(expected.nan_to_num()))


@pytest.mark.parametrize("codec_id", ["int4", "int8"])
def test_of_more_than_64_tiles(codec_id):
    view = plain(2 * 64 * 70 * 8, 2, 8)
    kit.check_same(codecs.get(codec_id), kit.draw("L", view.numel, 8).float(), (), view)


@pytest.mark.parametrize("codec_id", ["binary", "ternary", "int4", "int8", "fp8"])
def test_of_many_rows_of_one_channel(codec_id):
    """One scale for each group, as few rows have, and more than one tile, as many rows have."""
    view = plain(2 * 150, 2, 1)
    change = kit.draw("gaussian", view.numel, 1) * torch.linspace(0.1, 2, view.numel)  # the first tile is the smallest
    kit.check_same(codecs.get(codec_id), change.float(), (), view)


def test_buffers_anywhere():
    """A payload in the middle of a frame, aligned or not; strided input; tensors made in inference mode."""
    view, codec = plain(66 * 72, 1, 72), codecs.get("int4")
    with torch.inference_mode():
        base = torch.randn(view.numel).to(kit.DEVICE)
    x = torch.randn(view.numel, 2).to(kit.DEVICE)[:, 1]
    with use("reference"):
        expected = codec_kit.encode_residual(codec, x.cpu(), (base.cpu(),), view)
    nbytes = expected.numel()
    with use("gpu"):
        for start in (80, 7):
            frame = torch.full((nbytes + 100,), 255, dtype=torch.uint8, device=kit.DEVICE)
            inside = frame[start : start + nbytes]
            codec_kit.encode_residual(codec, x, (base,), view, None, inside)
            assert torch.equal(inside.cpu(), expected)
            assert bool((frame[:start] == 255).all() and (frame[start + nbytes :] == 255).all())
            out = base.clone()
            codec_kit.decode_residual(codec, inside, (base,), view, out)
            error = (out - x).square().sum() / (x - base).square().sum()
            assert error < 0.02
        codec_kit.decode_residual(codec, inside, (base,), view, base)
    assert torch.equal(base, out)


def test_what_is_supported():
    view, spec = plain(66 * 72, 1, 72), codecs.get("int4").spec
    assert steps_of(spec, view, torch.float64, kit.DEVICE) is None
    assert steps_of(spec, view, torch.float32, torch.device("meta")) is None
    assert steps_of(codecs.get("int8").spec, plain(1 << 31, 1, 1 << 10), torch.float32, kit.DEVICE) is None
    x = torch.zeros(view.numel, device=kit.DEVICE)
    payload = torch.empty(spec.sections_of(view.shape).total_nbytes, dtype=torch.uint8, device=kit.DEVICE)
    steps = steps_of(spec, view, torch.float32, kit.DEVICE)
    assert not steps.encode(x, (x.half(),), None, payload)
    assert not steps.decode(payload, (), x.half())
    assert not steps.decode(payload[1:], (), x)
    with use("reference"):
        assert steps_for(spec, view, torch.float32, kit.DEVICE) is None
    with use("gpu"):
        assert isinstance(steps_for(spec, view, torch.float32, kit.DEVICE), TritonSteps)
        for step in (codecs.get("int4").encode, lambda x: codecs.get("int4").decode(x, (8,), torch.float32)):
            step(torch.zeros(8, device=kit.DEVICE) if step.__name__ == "encode" else payload_of_zeros())


def payload_of_zeros() -> torch.Tensor:
    return torch.zeros(codecs.get("int4").payload_nbytes((8,), torch.float32), dtype=torch.uint8, device=kit.DEVICE)


@every_form
def test_which_zero_comes_out(form):
    codec = kit.get(form)
    for payload in zeros.payloads(codec):
        for terms in zeros.expected(torch.float32)[1:]:
            expected, got = torch.empty(zeros.VIEW.numel), torch.empty(zeros.VIEW.numel, device=kit.DEVICE)
            with use("reference"):
                codec_kit.decode_residual(codec, payload, terms, zeros.VIEW, expected)
            here = tuple(term.to(kit.DEVICE) for term in terms)
            with use("gpu"):
                codec_kit.decode_residual(codec, payload.to(kit.DEVICE), here, zeros.VIEW, got)
            assert torch.equal(kit.raw(got), kit.raw(expected))


@pytest.mark.parametrize("scales", ["token_channel", "block"])
def test_a_codec_from_outside(scales):
    view = plain(66 * 72, 1, 72)
    base, change = kit.draw("gaussian", view.numel, 72).float(), kit.draw("L", view.numel, 72, 1).float()
    for make in (Uneven, WithZero, Eight, Coarse):
        kit.check_same(make(scales=scales), base + change, (base,), view)
