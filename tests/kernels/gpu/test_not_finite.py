"""What the Triton kernels do with NaN and infinity: without a flag they decline, with one they send no change."""

from __future__ import annotations

import pytest
import torch

from compactdist.errors import NonFiniteError
from compactdist.kernels import use
from compactdist.kernels.gpu.steps import steps_of
from compactdist.state.matrix_view import plain
from tests.codecs import kit as codec_kit
from tests.kernels.gpu import kit

every_form = pytest.mark.parametrize("form", kit.FORMS, ids=kit.name_of)
CUT = plain(3 * 5 * 72, 3, 72)


def _inputs(bad: float, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    x, base = (torch.randn(CUT.numel, generator=g).to(dtype) for _ in range(2))
    x[400] = bad
    base[::7] = -0.0
    return x.to(kit.DEVICE), base.to(kit.DEVICE)


@every_form
def test_without_a_flag_it_is_refused_and_the_base_kept(form):
    x, base = _inputs(*kit.rotated(form, (torch.nan, -torch.inf), 1))
    before, out, (steps, payload) = kit.raw(base), torch.empty_like(base), _opened(form, base.dtype)
    assert not steps.encode(x, (base,), out, payload)
    with use("gpu"), pytest.raises(NonFiniteError, match=f"1 of {CUT.numel} elements"):
        codec_kit.encode_residual(kit.get(form), x, (base,), CUT, out)
    assert torch.equal(kit.raw(base), before)


@every_form
def test_with_a_flag_both_ends_stay_equal(form):
    codec, (x, base) = kit.get(form), _inputs(*kit.rotated(form, (torch.nan, -torch.inf), 1))
    flag = torch.zeros(1, dtype=torch.int32, device=kit.DEVICE)
    out, held, (steps, payload) = torch.empty_like(base), base.clone(), _opened(form, base.dtype)
    assert steps.encode(x, (base,), out, payload, flag=flag)
    assert flag.item() == 1
    assert steps.decode(payload, (held,), held)
    assert torch.equal(kit.raw(held), kit.raw(out)), "the two ends differ"
    if codec.sections_of(CUT.shape).rows == 1:  # only the block concerned is held back
        block = (held == base).cpu().view(3, -1)
        assert block[1, 40]
        assert not block.all()
    else:
        assert not payload.any()
        assert torch.equal(held, base)
    # the next tensor is sent as if nothing had been, and the flag is left to who reads it
    good = torch.randn(CUT.numel).to(base)
    assert steps.encode(good, (base,), None, payload, flag=flag)
    assert flag.item() == 1
    with use("reference"):
        assert torch.equal(payload.cpu(), codec_kit.encode_residual(codec, good.cpu(), (base.cpu(),), CUT))
    flag.zero_()
    assert steps.encode(good, (base,), None, payload, flag=flag)
    assert flag.item() == 0


def _opened(form, dtype):
    """The steps of a stream, and room for a payload."""
    codec = kit.get(form)
    nbytes = codec.payload_nbytes(CUT.shape, dtype)
    return steps_of(codec.spec, CUT, dtype, kit.DEVICE), torch.empty(nbytes, dtype=torch.uint8, device=kit.DEVICE)


@every_form
def test_a_payload_of_zeros_is_no_change(form):
    codec, base = kit.get(form), _inputs(0.0, torch.float32)[1]
    nothing = torch.zeros(codec.payload_nbytes(CUT.shape, torch.float32), dtype=torch.uint8, device=kit.DEVICE)
    for kernels in ("gpu", "reference"):
        out = torch.empty_like(base)
        with use(kernels):
            codec_kit.decode_residual(codec, nothing, (base,), CUT, out)
        assert torch.equal(out, base)
        with use(kernels):
            codec_kit.decode_residual(codec, nothing, (), CUT, out)
        assert not out.any()
