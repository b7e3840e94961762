"""A history of eight bits for each element, made and read back in one launch each, as
``reference/rounding.py`` says, to the bit.

A program has whole blocks of 128 elements, so that it knows their scales before it writes their codes. Nothing of the
tensor's size is allocated, and the host reads nothing.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from compactdist.kernels.gpu.codes import FLOAT8, LINEAR, code_of, level_of
from compactdist.kernels.gpu.elements import (
    decode_bf16,
    encode_bf16,
    inverse_or_zero,
    is_zero,
    read,
    storable_scale,
    write,
)
from compactdist.kernels.gpu.launch import Launch, Slot, run
from compactdist.kernels.gpu.plan import DEVICE_TYPE, INTERPRETED, MOST_ELEMENTS
from compactdist.kernels.spec import LARGEST_LEVEL, ROUNDED_BLOCK

__all__ = ["Rounding", "rounding_of"]

_BLOCKS = 64 if INTERPRETED else 8
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_KINDS = {torch.int8: LINEAR.value, torch.uint8: FLOAT8.value}


@triton.jit
def _places(BLOCKS: tl.constexpr):
    """Numbers of this program's blocks, ``(BLOCKS, 1)``, and of their elements, ``(BLOCKS, 128)``."""
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)[:, None]
    return block, block * 128 + tl.arange(0, 128)[None, :]


@triton.jit
def quantize_history(
    values, codes, scales, accepted, numel, largest, KIND: tl.constexpr, CHECKED: tl.constexpr, BLOCKS: tl.constexpr
):
    """Codes and scales of ``BLOCKS`` blocks.

    Args:
        values: finite, flat ``[numel]``.
        codes: int8 or uint8 ``[numel]``.
        scales: bits of bfloat16, int16 ``[ceil(numel / 128)]``.
        accepted: uint8.
        numel: elements.
        largest: level of the largest magnitude of a block.
        KIND: ``LINEAR`` for int8, ``FLOAT8`` for E4M3.
        CHECKED: nothing is written where the first of ``accepted`` is 0.
        BLOCKS: of a program.
    """
    block, at = _places(BLOCKS)
    there = at < numel
    taken = block * 128 < numel
    if CHECKED:
        taken = taken & ~is_zero(accepted)
    value = read(values, at, there)
    scale = storable_scale(tl.div_rn(tl.max(tl.abs(value), axis=1)[:, None], largest), True)
    tl.store(scales + block, encode_bf16(scale).to(tl.int16), mask=taken)
    level = value * inverse_or_zero(scale)  # its sign decides, not that of the value, which may have become zero
    code = code_of(level, tl.abs(level), 1.0, 1.0, scales, KIND, 8, 3)
    tl.store(codes + at, code.to(codes.dtype.element_ty), mask=there & taken)


@triton.jit
def dequantize_history(codes, scales, out, numel, KIND: tl.constexpr, BLOCKS: tl.constexpr):
    """The values of ``BLOCKS`` blocks. Arguments as of ``quantize_history``; ``out`` gets the values."""
    block, at = _places(BLOCKS)
    there = at < numel
    code = tl.load(codes + at, mask=there, other=0).to(tl.int32)
    scale = decode_bf16(tl.load(scales + block, mask=block * 128 < numel, other=0).to(tl.int32))
    write(out, at, level_of(code, scales, KIND, 8, 3) * scale, there)


class Rounding:
    """Rounds tensors of one size to eight bits and back.

    Args:
        numel: elements of every tensor, 1 or more; they are of one dtype.
        codes: dtype of the codes.
        device: of the tensors.
    """

    __slots__ = ("_dequantize", "_device", "_quantize", "_quantize_if")

    def __init__(self, numel: int, codes: torch.dtype, device: torch.device) -> None:
        self._device, largest = device, LARGEST_LEVEL[codes]
        grid = -(-numel // (ROUNDED_BLOCK * _BLOCKS))
        constants = {"KIND": _KINDS[codes], "BLOCKS": _BLOCKS, "num_warps": 4, "enable_fp_fusion": False}
        given = (*map(Slot, range(4)), numel, largest)
        self._quantize, self._quantize_if = (
            Launch(quantize_history, grid, given, 4, {"CHECKED": checked, **constants}) for checked in (False, True)
        )
        self._dequantize = Launch(dequantize_history, grid, (*map(Slot, range(3)), numel), 3, constants)

    def quantize(self, values: Tensor, codes: Tensor, scales: Tensor, accepted: Tensor | None = None) -> None:
        """Write the codes ``[numel]`` and the bfloat16 scales ``[ceil(numel / 128)]`` of flat, finite values."""
        launch = self._quantize if accepted is None else self._quantize_if
        run(launch, (values.contiguous(), codes, scales, codes if accepted is None else accepted), self._device)

    def dequantize(self, codes: Tensor, scales: Tensor, out: Tensor) -> None:
        """Write the values, kept finite and rounded once to the dtype of ``out``, contiguous ``[numel]``."""
        run(self._dequantize, (codes, scales, out), self._device)


@lru_cache(maxsize=256)
def rounding_of(numel: int, dtype: torch.dtype, codes: torch.dtype, device: torch.device) -> Rounding | None:
    """As ``kernels.rounding_for``; ``None`` where there are no kernels for this device, dtype or size."""
    if device.type != DEVICE_TYPE or dtype not in _DTYPES or not 0 < numel <= MOST_ELEMENTS:
        return None
    return Rounding(numel, codes, device)
