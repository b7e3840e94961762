"""Products of matrices of whole numbers, exact on every device.

They are computed in floating point, where matrix libraries are fast: every partial sum is a whole number below
``2**24``, so no order of adding can change a bit. Modes of reduced precision keep at least 8 bits of a factor and add
up in float32; where one may be on, a factor of more bits is taken as two of at most 8. Kernels may take such limbs
as integers (``ends.py``).
"""

from __future__ import annotations

import itertools
import math
import os
import platform
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["LARGEST_SUM", "LARGEST_WEIGHT", "Products", "by_blocks", "forward_dtype", "gram"]

LARGEST_WEIGHT = 127 * 128
"""128 times a whole number of 7 bits, plus another."""

LARGEST_SUM = 1 << 17
"""Of magnitudes of weights that are summed up, before they are rounded: rounding adds 256 at most, and
``127 * (LARGEST_SUM + 256) < 2**24``.
"""

_ROWS = 1024
"""``1024 * 127 * 127 < 2**24``."""

_FEW_BITS = 2
"""Bits of an element up to which bfloat16 adds 0.01 dB to the error, 0.05 where few components take all of them.

At 8 bits it would be 0.13.
"""

_LARGE = 1 << 18
"""Elements of residuals for which bfloat16 is worth while."""


def gram(whole: Tensor) -> Tensor:
    """``whole whole^T`` of whole numbers -127 to 127, ``(..., n, R)`` to ``(..., n, n)``, float32, rounded once."""
    n = whole.shape[-2]
    made = torch.empty(*whole.shape[:-1], n, dtype=torch.float32, device=whole.device)
    part = torch.empty(n, n, dtype=torch.float32, device=whole.device)
    for index in itertools.product(*map(range, whole.shape[:-2])):
        first, *others = whole[index].split(_ROWS, 1)
        torch.mm(first, first.mT, out=made[index])
        if others:
            total = made[index].double()
            for some in others:
                total += torch.mm(some, some.mT, out=part)
            made[index] = total
    return made


class Products(NamedTuple):
    """Levels and weights that are to be multiplied, whole numbers, by blocks.

    Attributes:
        levels: of the chosen components, -127 to 127, int8 ``(S, R)``.
        weights: float32 ``(S, n)``, whole numbers as ``LARGEST_WEIGHT`` and ``LARGEST_SUM`` say.
        counts: how many of the components each block has, one after another.
    """

    levels: Tensor
    weights: Tensor
    counts: list[int]

    def write(self, out: Tensor) -> None:
        """Write the products to ``out``, float32 ``(R, M n)``, contiguous."""
        in_one, high, start = _in_one(self.levels.device), torch.round(self.weights / 128), 0
        blocks = out.view(len(out), len(self.counts), -1).unbind(1)
        for count, to in zip(self.counts, blocks, strict=True):
            part = slice(start, start + count)
            start += count
            if not count:
                to.zero_()
                continue
            levels = self.levels[part].float().mT
            if in_one:
                torch.mm(levels, self.weights[part], out=to)
            else:
                torch.mm(levels, high[part], out=to)
                low = self.weights[part] - high[part] * 128
                to.mul_(128).add_(torch.mm(levels, low, out=torch.empty_like(to)))


def forward_dtype(shape: tuple[int, ...], bits: float, device: torch.device) -> torch.dtype:
    """What residuals are turned in: bfloat16 where a processor has tiles for it and little is lost. Only senders turn.

    Args:
        shape: of the residuals.
        bits: for each element.
        device: of them.
    """
    small = math.prod(shape) < _LARGE or bits > _FEW_BITS
    return torch.float32 if small or device.type != "cpu" or not _has_tiles() else torch.bfloat16


@cache
def _has_tiles() -> bool:
    """Whether this processor has AMX, whose products of bfloat16 take less than half the time."""
    supported: bool = getattr(torch.cpu, "_is_amx_tile_supported", bool)()
    return supported and torch.backends.mkldnn.is_available()


def _in_one(device: torch.device) -> bool:
    """Whether float32 products are sure to take factors as they are. Elsewhere the result is the same, and slower."""
    everything: Any = torch.backends
    mkldnn = everything.mkldnn
    return (
        device.type == "cpu"
        and platform.machine() in ("x86_64", "AMD64")
        and torch.get_float32_matmul_precision() == "highest"
        and {mkldnn.matmul.fp32_precision, mkldnn.fp32_precision, everything.fp32_precision} <= {"none", "ieee"}
        and not {"DNNL_DEFAULT_FPMATH_MODE", "ONEDNN_DEFAULT_FPMATH_MODE", "MKL_BLAS_COMPUTE_MODE"} & os.environ.keys()
    )


def by_blocks(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Write ``a @ b`` to ``out``, all of any strides; autocast leaves calls with ``out`` alone."""
    if out.is_cuda:  # one launch for all
        torch.bmm(a, b, out=out)
        return
    for one, other, to in zip(a, b, out, strict=True):
        torch.mm(one, other, out=to)
