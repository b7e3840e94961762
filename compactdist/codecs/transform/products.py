"""Products of matrices of whole numbers, exact on every device.

They are computed in floating point, where matrix libraries are fast: with factors of at most 7 bits, every product and
every partial sum is a whole number below ``2**24``, so no order of adding can change a bit. Nor can reduced precision
modes, which keep at least 8 bits of a factor and add up in float32.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

__all__ = ["by_blocks", "gram", "inverse"]

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


def inverse(levels: Tensor, weights: Tensor, out: Tensor, *, wide: bool) -> None:
    """Write ``levels^T @ weights`` of whole numbers to ``out``, float32 ``(M, R, n)``, rounded once.

    Args:
        levels: -127 to 127, float32 ``(M, n, R)``, n at most 1024.
        weights: float32 ``(M, n, n)``: -127 to 127, or with ``wide`` -16256 to 16256.
        out: receives the products; any strides.
        wide: take the weights as 128 times one whole number of 7 bits plus another.
    """
    if not wide:
        by_blocks(levels.mT, weights, out)
        return
    high, low = torch.round(weights / 128), torch.empty_like(out)
    by_blocks(levels.mT, high, out)
    by_blocks(levels.mT, weights - high * 128, low)
    out.mul_(128).add_(low)


def by_blocks(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Write ``a @ b`` to ``out``, all of any strides; autocast leaves calls with ``out`` alone."""
    for one, other, to in zip(a, b, out, strict=True):
        torch.mm(one, other, out=to)
