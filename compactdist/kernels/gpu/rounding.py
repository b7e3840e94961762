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
    DTYPES,
    decode_bf16,
    encode_bf16,
    inverse_or_zero,
    is_zero,
    read,
    read_rounded,
    share_of_change,
    storable_scale,
    write,
)
from compactdist.kernels.gpu.launch import Launch, Slot, run
from compactdist.kernels.gpu.plan import DEVICE_TYPE, INTERPRETED, MOST_ELEMENTS
from compactdist.kernels.spec import LARGEST_LEVEL, ROUNDED_BLOCK, Rounded, Term, Velocity

__all__ = ["Rounding", "rounding_of"]

_BLOCKS = 64 if INTERPRETED else 8
_KINDS = {torch.int8: LINEAR.value, torch.uint8: FLOAT8.value}


@triton.jit
def _places(BLOCKS: tl.constexpr):
    """Numbers of this program's blocks, ``(BLOCKS, 1)``, and of their elements, ``(BLOCKS, 128)``."""
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)[:, None]
    return block, block * 128 + tl.arange(0, 128)[None, :]


@triton.jit
def quantize_history(
    values, base, base_scales, codes, scales, accepted, numel, largest, factor,
    MOVES: tl.constexpr, DTYPE: tl.constexpr, KIND: tl.constexpr, CHECKED: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Codes and scales of ``BLOCKS`` blocks of values or, if ``MOVES``, of a velocity (``spec.Velocity``) to them.

    Args:
        values: finite, flat ``[numel]``.
        base: what the velocity goes out from, as ``codes``.
        base_scales: as ``scales``.
        codes: int8 or uint8 ``[numel]``.
        scales: bits of bfloat16, int16 ``[ceil(numel / 128)]``.
        accepted: uint8.
        numel: elements.
        largest: level of the largest magnitude of a block.
        factor: the velocity's coefficient.
        MOVES: there is a velocity; else ``base``, ``base_scales`` and ``factor`` are not looked at.
        DTYPE: of the values, see ``elements.DTYPES``.
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
    if MOVES:
        value = share_of_change(value, read_rounded(base, base_scales, at, there, DTYPE), factor, DTYPE)
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
        numel: elements of every tensor, 1 or more.
        dtype: of every tensor.
        codes: dtype of the codes.
        device: of the tensors.
    """

    __slots__ = ("_dequantize", "_device", "_dtype", "_given", "_quantizing")

    def __init__(self, numel: int, dtype: torch.dtype, codes: torch.dtype, device: torch.device) -> None:
        self._device, self._dtype = device, DTYPES[dtype]
        grid = -(-numel // (ROUNDED_BLOCK * _BLOCKS))
        constants = {"KIND": _KINDS[codes], "BLOCKS": _BLOCKS, "num_warps": 4, "enable_fp_fusion": False}
        self._given = grid, (*map(Slot, range(6)), numel, LARGEST_LEVEL[codes]), constants
        self._quantizing: dict[tuple[float | None, bool], Launch] = {}
        self._dequantize = Launch(dequantize_history, grid, (*map(Slot, range(3)), numel), 3, constants)

    def quantize(
        self, values: Tensor | Velocity, codes: Tensor, scales: Tensor, accepted: Tensor | None = None
    ) -> None:
        """Write the codes ``[numel]`` and the bfloat16 scales ``[ceil(numel / 128)]`` of flat, finite values.

        A velocity is one between a tensor and what has codes of the same form.
        """
        base, base_scales = codes, scales
        target: Term | Velocity = values
        factor: float | Tensor | None = None
        if isinstance(values, Velocity):
            target, factor = values.base, values.coefficient
            assert isinstance(values.previous, Rounded)
            base, base_scales = values.previous.codes, values.previous.scales
        assert isinstance(target, Tensor)
        assert not isinstance(factor, Tensor)
        launch = self._quantizing.get((factor, accepted is not None)) or self._made(factor, accepted is not None)
        flag = codes if accepted is None else accepted
        run(launch, (target.contiguous(), base, base_scales, codes, scales, flag), self._device)

    def _made(self, factor: float | None, checked: bool) -> Launch:
        grid, arguments, constants = self._given
        own = {"MOVES": factor is not None, "DTYPE": self._dtype, "CHECKED": checked}
        made = Launch(quantize_history, grid, (*arguments, factor or 0.0), 6, {**own, **constants})
        self._quantizing[factor, checked] = made
        return made

    def dequantize(self, codes: Tensor, scales: Tensor, out: Tensor) -> None:
        """Write the values, kept finite and rounded once to the dtype of ``out``, contiguous ``[numel]``."""
        run(self._dequantize, (codes, scales, out), self._device)


@lru_cache(maxsize=256)
def rounding_of(numel: int, dtype: torch.dtype, codes: torch.dtype, device: torch.device) -> Rounding | None:
    """As ``kernels.rounding_for``; ``None`` where there are no kernels for this device, dtype or size."""
    if device.type != DEVICE_TYPE or dtype not in DTYPES or not 0 < numel <= MOST_ELEMENTS:
        return None
    return Rounding(numel, dtype, codes, device)
