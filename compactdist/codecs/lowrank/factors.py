"""Fitting few levels to the factors of a low-rank product: one scale for each component, moved until it settles.

This module only chooses codes and scales; the codecs that send them define their meaning.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from compactdist.kernels import cpu_runs
from compactdist.kernels import reference as kernels
from compactdist.kernels.reference.scales import SIGMA_OF_MEAN_MAGNITUDE, storable_scale

REFITS = 5
SMALLEST_FACTOR = 2.0**-40


class Fitted(NamedTuple):
    """A factor as it will be sent.

    Attributes:
        codes: uint8 ``(n, L)``: the index of the magnitude; for a negative element plus the number of magnitudes.
        scale: bfloat16-valued float32 ``(n, 1)``.
        value: The decoded factor, float32 ``(n, L)``.
    """

    codes: Tensor
    scale: Tensor
    value: Tensor


def fit(factor: Tensor, magnitudes: Sequence[float], refits: int = REFITS) -> Fitted:
    """Choose a scale for each row and the nearest level for each element.

    The scale starts at the value that suits a Gaussian factor. Then levels are chosen for the scale and the scale is
    fitted to the levels by least squares, in turn (S. P. Lloyd, IEEE Trans. Inf. Theory 28, 1982, with all levels
    moving together): factors are short and seldom Gaussian, and each turn lowers the error.

    Args:
        factor: float32 ``(n, L)``, finite. Elements below ``2**-40`` in magnitude count as zero.
        magnitudes: The levels without their signs, ascending.
        refits: Number of turns.
    """
    borders = [(low + high) / 2 for low, high in pairwise(magnitudes)]
    if factor.device.type == "cpu" and cpu_runs(2 * refits * factor.numel()):
        from compactdist.kernels.cpu import products as cpu_lowrank

        codes, level, scale, near = cpu_lowrank.fit_levels(
            factor, SMALLEST_FACTOR, borders, magnitudes, SIGMA_OF_MEAN_MAGNITUDE, refits
        )
    else:
        codes, level, scale, near = _fit(factor, borders, magnitudes, refits)
    scale = storable_scale(scale / near)
    return Fitted(codes, scale, level.mul_(scale))


def _fit(
    factor: Tensor, borders: list[float], magnitudes: Sequence[float], refits: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The definition; ``kernels/cpu/products.py`` has to give the same bits.

    Returns:
        Codes; their levels with signs; scales for the rows multiplied by ``near``; ``near``, powers of two.
    """
    size = factor.abs()
    size = torch.where(size < SMALLEST_FACTOR, torch.zeros_like(size), size)
    near = kernels.power_of_two_near_inverse(size.amax(1, keepdim=True))
    size = size.mul_(near)
    table = torch.tensor(magnitudes, dtype=torch.float32, device=size.device)
    one = torch.ones((), dtype=torch.float32, device=size.device)
    energy, total = kernels.fold_sum(size * size, 1), kernels.fold_sum(size, 1)
    scale = kernels.divide_or_zero(energy, total * SIGMA_OF_MEAN_MAGNITUDE)
    index = torch.zeros_like(size, dtype=torch.uint8)
    for _ in range(refits):
        if borders:
            index = kernels.count_above(size * kernels.divide_or_zero(one, scale), borders)
        chosen = table[index.to(torch.int32)]
        products, squares = kernels.fold_sum(size * chosen, 1), kernels.fold_sum(chosen * chosen, 1)
        scale = kernels.divide_or_zero(products, squares)
    below = factor < 0
    level = table[index.to(torch.int32)]
    codes = index.add_(below.to(torch.uint8), alpha=len(magnitudes))
    return codes, torch.where(below, -level, level), scale, near
