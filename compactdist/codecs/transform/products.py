"""Products of matrices of whole numbers, exact on every device.

They are computed in floating point, where matrix libraries are fast: with factors of at most 7 bits, every product and
every partial sum is a whole number below ``2**24``, so no order of adding can change a bit. Nor can reduced precision
modes, which keep at least 8 bits of a factor and add up in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["gram", "inverse"]

_ROWS = 1024
"""``1024 * 127 * 127 < 2**24``."""


def gram(whole: Tensor) -> Tensor:
    """``whole^T whole`` of whole numbers -127 to 127, ``(..., R, n)`` to ``(..., n, n)``, float32, rounded once."""
    leading, whole = whole.shape[:-2], whole.flatten(0, -3)
    count, rows, n = whole.shape
    total = torch.zeros(count, n, n, dtype=torch.float64, device=whole.device)
    part = torch.empty(count, n, n, device=whole.device)
    for start in range(0, rows, _ROWS):
        some = whole[:, start : start + _ROWS]
        total += torch.bmm(some.mT, some, out=part)  # ``out``: autocast leaves the call alone
    return total.float().view(*leading, n, n)


def inverse(levels: Tensor, weights: Tensor, *, wide: bool) -> Tensor:
    """``levels @ weights`` of whole numbers, float32 ``(M, R, n)``, rounded once.

    Args:
        levels: -127 to 127, float32 ``(M, R, n)``, n at most 1024.
        weights: float32 ``(M, n, n)``: -127 to 127, or with ``wide`` -16256 to 16256.
        wide: take the weights as 128 times one whole number of 7 bits plus another.
    """
    out = torch.empty_like(levels)
    if not wide:
        return torch.bmm(levels, weights, out=out)
    high = torch.round(weights / 128)
    low = torch.bmm(levels, weights - high * 128, out=torch.empty_like(levels))
    return torch.bmm(levels, high, out=out) * 128 + low
