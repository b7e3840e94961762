"""A history kept in eight bits for each element: half the memory of bfloat16, a quarter of float32.

The user gets the reconstruction as it is; both ends then keep the same rounded copy of it, and the next frame is
predicted from that copy. What the rounding lost is part of the next residual and is sent again, so it does not add up.
(CompactFusion's "quantized cache", arXiv 2507.17511 and its public code, is the same idea with one affine scale for
each channel.)

Every step is elementwise float32 arithmetic, integer arithmetic or a maximum, so two ends that start equal stay equal
to the bit, whatever devices they run on.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from compactdist.codecs.scalar.fp8 import encode_units, unit_levels
from compactdist.kernels import Rounding, rounding_for
from compactdist.kernels import reference as kernels
from compactdist.state.history import ExactCell, ExactLastValue, LastValue, Order, Predictor, predictor_class

__all__ = [
    "BLOCK",
    "CODES",
    "LARGEST_CODE",
    "STATE_FORMS",
    "EightBits",
    "QuantizedCell",
    "StateForm",
    "make_predictor",
    "quantize",
    "state_copy_nbytes",
]

StateForm = Literal["exact", "int8", "fp8"]
EightBits = Literal["int8", "fp8"]
STATE_FORMS: tuple[StateForm, ...] = ("exact", "int8", "fp8")

BLOCK = 128
"""Consecutive elements that share a scale: one outlier spoils the resolution of few neighbours, for 1/64 byte each."""

_CPU_PART = BLOCK << 9
_SMALLEST_SCALE = 2.0**-87  # products stay normal floats, so machines that flush subnormals agree with the others
CODES: dict[EightBits, torch.dtype] = {"int8": torch.int8, "fp8": torch.uint8}
LARGEST_CODE: dict[EightBits, float] = {
    "int8": 127.0,
    "fp8": 448.0 * 2**9,
}  # of fp8 (E4M3) in units of its smallest subnormal, 2**-9


@dataclass(frozen=True, slots=True)
class Quantized:
    """A flat tensor in eight bits for each element.

    Element i is ``level(codes[i]) * scales[i // 128]`` in float32, rounded once to ``dtype`` and kept finite.

    Attributes:
        codes: ``[numel]``; int8, whose level is the integer, or uint8, the bits of an E4M3 float8, whose level is its
            value in units of 2**-9.
        scales: bfloat16 ``[ceil(numel / 128)]``, >= 0.
        dtype: of the tensor.
    """

    codes: Tensor
    scales: Tensor
    dtype: torch.dtype

    def dequantize(self, out: Tensor | None = None) -> Tensor:
        """The values, flat ``[numel]`` of ``dtype``, written to ``out`` if there is one."""
        limit = torch.finfo(self.dtype).max
        if out is None:
            out = torch.empty(self.codes.numel(), dtype=self.dtype, device=self.codes.device)
        form: EightBits = "int8" if self.codes.dtype == torch.int8 else "fp8"
        rounding = _rounding(form, self.codes.numel(), self.dtype, self.codes.device)
        if rounding is not None and out.is_contiguous():
            rounding.dequantize(self.codes, self.scales, out)
            return out
        with torch.inference_mode():  # an ``out`` made in this mode can be written to in this mode only
            for elements, blocks in _parts(self.codes):
                codes = self.codes[elements]
                if codes.dtype == torch.int8:
                    levels = codes.float()
                else:
                    levels = kernels.unpack_levels(codes, unit_levels("e4m3"), 8, codes.numel())
                whole = _in_blocks(levels) * self.scales[blocks].float().unsqueeze(1)
                out[elements] = whole.view(-1)[: codes.numel()].clamp_(-limit, limit)
        return out


def _in_blocks(flat: Tensor) -> Tensor:
    """``[numel]`` as ``[blocks, 128]``, the last block filled up with zeros."""
    missing = -flat.numel() % BLOCK
    return (pad(flat, (0, missing)) if missing else flat).view(-1, BLOCK)


def _parts(flat: Tensor) -> Iterator[tuple[slice, slice]]:
    """Elements and blocks to work on at a time: few enough for the caches on a CPU, all of them elsewhere."""
    numel = flat.numel()
    step = _CPU_PART if flat.device.type == "cpu" else max(1, numel)
    for start in range(0, numel, step):
        end = min(start + step, numel)
        yield slice(start, end), slice(start // BLOCK, -(-end // BLOCK))


def _rounding(form: EightBits, numel: int, dtype: torch.dtype, device: torch.device) -> Rounding | None:
    """What does it in one launch, without a tensor of float32; ``None``: torch's operations do it."""
    return rounding_for(numel, dtype, CODES[form], LARGEST_CODE[form], device)


@torch.no_grad()
def quantize(values: Tensor, form: EightBits, dtype: torch.dtype) -> Quantized:
    """Round a flat, finite tensor to eight bits for each element.

    The scale of a block is its largest magnitude over the largest level, rounded up to bfloat16; zero where that is
    below 2**-87 (a block that small is kept as zeros). Levels are the nearest, ties to even.

    Args:
        values: flat ``[numel]``, any compressible dtype.
        form: ``"int8"``: 127 equal steps to each side; ``"fp8"``: E4M3, a constant relative error over six decades.
        dtype: of the tensor that :meth:`Quantized.dequantize` returns.
    """
    codes = torch.empty(values.numel(), dtype=CODES[form], device=values.device)
    scales = torch.empty(-(-values.numel() // BLOCK), dtype=torch.bfloat16, device=values.device)
    rounding = _rounding(form, values.numel(), values.dtype, values.device)
    if rounding is not None:
        rounding.quantize(values, codes, scales)
        return Quantized(codes, scales, dtype)
    for elements, blocks in _parts(values):
        codes[elements], scales[blocks] = _quantize(values[elements], form)
    return Quantized(codes, scales, dtype)


def _quantize(values: Tensor, form: EightBits) -> tuple[Tensor, Tensor]:
    """Codes ``[numel]`` and scales ``[ceil(numel / 128)]``, which are bfloat16 values in float32."""
    blocks = _in_blocks(values.float())
    # A tensor: a GPU multiplies by the inverse of a divisor that is a number, and so rounds twice.
    largest = torch.full((), LARGEST_CODE[form], dtype=torch.float32, device=values.device)
    scales = kernels.round_bf16(blocks.abs().amax(1, keepdim=True) / largest, up=True)
    scales = torch.where(scales < _SMALLEST_SCALE, torch.zeros_like(scales), scales)
    inverse = kernels.divide_or_zero(torch.ones_like(scales), scales)
    levels = (blocks * inverse).view(-1)[: values.numel()]
    if form == "int8":
        return levels.round_().clamp_(-127, 127), scales.view(-1)
    return encode_units(levels.abs(), "e4m3") | ((levels < 0).to(torch.uint8) << 7), scales.view(-1)


def state_copy_nbytes(form: StateForm, numel: int, dtype: torch.dtype) -> int:
    """Bytes of one remembered tensor of this size."""
    return numel * dtype.itemsize if form == "exact" else numel + 2 * -(-numel // BLOCK)


class QuantizedCell:
    """Remembers a tensor in eight bits for each element; reading gives a new tensor each time.

    Args:
        form: ``"int8"`` or ``"fp8"``.
    """

    __slots__ = ("_form", "_kept")

    def __init__(self, form: EightBits) -> None:
        self._form: EightBits = form
        self._kept: Quantized | None = None

    def read(self) -> Tensor | None:
        """The rounded tensor, in new memory."""
        return None if self._kept is None else self._kept.dequantize()

    def put(self, value: Tensor, last: Tensor | None) -> Tensor | None:
        """Remember a rounded copy of ``value``; returns ``last``, a copy that ``read`` made and nobody needs now."""
        self._kept = quantize(value, self._form, value.dtype)
        return last

    def stay(self) -> None:
        """Every frame makes codes and scales anew, so no call with such a history is captured.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("a history in eight bits keeps no address")

    def clear(self) -> None:
        """Forget."""
        self._kept = None

    def move(self, to: Callable[[Tensor], Tensor]) -> None:
        """Keep copies of codes and scales that lie elsewhere."""
        if self._kept is not None:
            self._kept = Quantized(to(self._kept.codes), to(self._kept.scales), self._kept.dtype)

    @property
    def held(self) -> tuple[Tensor, ...]:
        """Codes and scales."""
        return () if self._kept is None else (self._kept.codes, self._kept.scales)


def make_predictor(order: Order, damping: float, form: StateForm) -> Predictor:
    """An empty predictor of this order that keeps tensors in this form."""
    kind = predictor_class(order)
    if form != "exact":
        return kind(damping, functools.partial(QuantizedCell, form))
    return ExactLastValue(damping, ExactCell) if kind is LastValue else kind(damping, ExactCell)
