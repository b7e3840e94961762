"""Reconstructions are rounded to bfloat16 as torch rounds them, after they are held within what it can hold."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from compactdist.kernels.gpu.elements import write
from tests.kernels.gpu import kit
from tests.kernels.gpu.conftest import INTERPRETED

SIZE = 1 << 16 if INTERPRETED else 1 << 10


@triton.jit
def _rounded(source, target, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    write(target, at, tl.load(source + at), at >= 0)


def _check(bits: torch.Tensor) -> None:
    """Of int32, as many as fill programs."""
    x = bits.to(kit.DEVICE).view(torch.float32)
    got = torch.empty(x.shape, dtype=torch.int16, device=x.device)
    _rounded[(x.numel() // SIZE,)](x, got, SIZE=SIZE)
    limit = torch.finfo(torch.bfloat16).max
    expected = x.clamp(-limit, limit).bfloat16()
    got = got.view(torch.bfloat16)
    assert torch.equal(got.isnan(), x.isnan())
    finite = ~x.isnan()
    assert torch.equal(got[finite].view(torch.int16), expected[finite].view(torch.int16))


def test_borders_and_any_bits():
    """Around every bfloat16: below, at and above the middle to the next; and bits at random."""
    upper = torch.arange(1 << 16, dtype=torch.int64).repeat_interleave(8)
    lower = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x4000, 0xC000]).repeat(1 << 16)
    words = (upper << 16) + lower
    g = torch.Generator().manual_seed(0)
    words = torch.cat([words, torch.randint(1 << 32, (1 << 19,), generator=g)])
    _check(torch.where(words < 1 << 31, words, words - (1 << 32)).to(torch.int32))


if not INTERPRETED:  # which would take days

    @pytest.mark.slow
    def test_all_that_there_are():
        for part in range(-32, 32):
            _check(torch.arange(part << 26, part + 1 << 26, dtype=torch.int64, device=kit.DEVICE).to(torch.int32))
