"""A tensor rounded to eight bits for each element, and read back, by torch's operations.

The scale of a block is its largest magnitude over the largest level, rounded up to bfloat16; zero where that is below
2**-87 (a block that small is kept as zeros). Levels are the nearest, ties to even. Every step is elementwise float32
arithmetic, integer arithmetic or a maximum.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from compactdist.kernels.reference.codes import float8_codes, float8_levels, unpack_levels
from compactdist.kernels.reference.scales import divide_or_zero, storable_scale
from compactdist.kernels.spec import FLOAT8, LARGEST_LEVEL, ROUNDED_BLOCK, Velocity

__all__ = ["dequantize", "quantize"]

_CPU_PART = ROUNDED_BLOCK << 9


def quantize(values: Tensor | Velocity, codes: Tensor, scales: Tensor, accepted: Tensor | None = None) -> None:
    """See ``kernels.Rounding``."""
    assert isinstance(values, Tensor)
    with torch.inference_mode():  # as below
        for elements, blocks in _parts(values):
            made = _quantize(values[elements], codes.dtype)
            for whole, part, new in ((codes, elements, made[0]), (scales, blocks, made[1])):
                whole[part] = new if accepted is None else torch.where(accepted[0] != 0, new, whole[part])


def dequantize(codes: Tensor, scales: Tensor, out: Tensor) -> None:
    """See ``kernels.Rounding``."""
    limit = torch.finfo(out.dtype).max
    with torch.inference_mode():  # an ``out`` made in this mode can be written to in this mode only
        for elements, blocks in _parts(codes):
            some = codes[elements]
            if some.dtype == torch.int8:
                levels = some.float()
            else:
                levels = unpack_levels(some, float8_levels(FLOAT8["e4m3"]), 8, some.numel())
            whole = _in_blocks(levels) * scales[blocks].float().unsqueeze(1)
            out[elements] = whole.view(-1)[: some.numel()].clamp_(-limit, limit)


def _quantize(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes ``[numel]`` and scales ``[ceil(numel / 128)]``, which are bfloat16 values in float32."""
    blocks = _in_blocks(values.float())
    # A tensor: a GPU multiplies by the inverse of a divisor that is a number, and so rounds twice.
    largest = torch.full((), LARGEST_LEVEL[dtype], dtype=torch.float32, device=values.device)
    scales = storable_scale(blocks.abs().amax(1, keepdim=True) / largest, up=True)
    inverse = divide_or_zero(torch.ones_like(scales), scales)
    levels = (blocks * inverse).view(-1)[: values.numel()]
    if dtype == torch.int8:
        return levels.round_().clamp_(-127, 127), scales.view(-1)
    negative = (levels < 0).to(torch.uint8)
    return float8_codes(levels.abs(), FLOAT8["e4m3"]) | (negative << 7), scales.view(-1)


def _in_blocks(flat: Tensor) -> Tensor:
    """``[numel]`` as ``[blocks, 128]``, the last block filled up with zeros."""
    missing = -flat.numel() % ROUNDED_BLOCK
    return (pad(flat, (0, missing)) if missing else flat).view(-1, ROUNDED_BLOCK)


def _parts(flat: Tensor) -> Iterator[tuple[slice, slice]]:
    """Elements and blocks to work on at a time: few enough for the caches on a CPU, all of them elsewhere."""
    numel = flat.numel()
    step = _CPU_PART if flat.device.type == "cpu" else max(1, numel)
    for start in range(0, numel, step):
        end = min(start + step, numel)
        yield slice(start, end), slice(start // ROUNDED_BLOCK, -(-end // ROUNDED_BLOCK))
