"""Products of matrices of whole numbers, exact on every device.

They are computed in floating point, where matrix libraries are fast: every partial sum is a whole number below
``2**24``, so no order of adding can change a bit. Modes of reduced precision keep at least 8 bits of a factor and add
up in float32; where one may be on, a factor of more bits is taken as two of at most 8.
"""

from __future__ import annotations

import itertools
import os
import platform
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["LARGEST_SUM", "LARGEST_WEIGHT", "by_blocks", "gram", "inverse"]

LARGEST_WEIGHT = 127 * 128
"""128 times a whole number of 7 bits, plus another."""

LARGEST_SUM = 1 << 17
"""Of magnitudes of weights that are summed up, before they are rounded: rounding adds 256 at most, and
``127 * (LARGEST_SUM + 256) < 2**24``.
"""

_ROWS = 1024
"""``1024 * 127 * 127 < 2**24``."""


def gram(whole: Tensor) -> Tensor:
    """``whole whole^T`` of whole numbers -127 to 127, ``(..., n, R)`` to ``(..., n, n)``, float32, rounded once."""
    n, rows = whole.shape[-2:]
    total = torch.zeros(*whole.shape[:-1], n, dtype=torch.float64, device=whole.device)
    part = torch.empty(n, n, device=whole.device)
    for index in itertools.product(*map(range, whole.shape[:-2])):
        for start in range(0, rows, _ROWS):
            some = whole[index][:, start : start + _ROWS]
            total[index] += torch.mm(some, some.mT, out=part)
    return total.float()


def inverse(levels: Tensor, weights: Tensor, counts: Sequence[int], out: Tensor) -> None:
    """Write products of levels and weights, whole numbers, to ``out``, float32 ``(M, R, n)``.

    Args:
        levels: of the chosen components, -127 to 127, float32 ``(S, R)``.
        weights: float32 ``(S, n)``, whole numbers as ``LARGEST_WEIGHT`` and ``LARGEST_SUM`` say.
        counts: how many of the components each block has, one after another.
        out: receives the products; any strides.
    """
    high, low, start = torch.round(weights / 128), None, 0
    in_one = _in_one(levels.device)
    for count, to in zip(counts, out, strict=True):
        part = slice(start, start + count)
        start += count
        if not count:
            to.zero_()
        elif in_one:
            torch.mm(levels[part].mT, weights[part], out=to)
        else:
            low = torch.empty_like(to) if low is None else low
            torch.mm(levels[part].mT, high[part], out=to)
            torch.mm(levels[part].mT, weights[part] - high[part] * 128, out=low)
            to.mul_(128).add_(low)


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
    for one, other, to in zip(a, b, out, strict=True):
        torch.mm(one, other, out=to)
