"""Sums of the elements of rows and of channels, in the order that every kernel keeps to.

``torch.sum`` may reorder with threads and vector width; these sums are folds in a stated order.
"""

from __future__ import annotations

import torch
from torch import Tensor

TILE_ROWS = 64
"""Rows that are summed together first: a kernel keeps one running sum for each channel, and tiles run in parallel."""

LANES = 64
"""Running sums for each row: a kernel keeps them in vector registers."""


def fold_sum(x: Tensor, dim: int) -> Tensor:
    """Sum over ``dim`` by adding the upper half onto the lower half until one element is left.

    The length counts as filled up with zeros to a power of two, so element i meets element i + h with h =
    half of that power. Returns float32 with ``dim`` kept at length 1.
    """
    length = x.shape[dim]
    while length > 1:
        half = 1 << ((length - 1).bit_length() - 1)
        upper = length - half
        folded = x.narrow(dim, 0, upper) + x.narrow(dim, half, upper)
        x = folded if upper == half else torch.cat([folded, x.narrow(dim, upper, half - upper)], dim)
        length = half
    return x


def row_sums(x: Tensor) -> Tensor:
    """``(G, R, C)`` to ``(G, R, 1)``: lane i adds up elements i, i + 64, i + 128, ..., then the lanes are folded."""
    lanes = x[:, :, :LANES].clone()
    for start in range(LANES, x.shape[2], LANES):
        part = x[:, :, start : start + LANES]
        lanes[:, :, : part.shape[2]] += part
    return fold_sum(lanes, 2)


def channel_sums(x: Tensor, every: int = 1) -> Tensor:
    """``(G, R, C)`` to ``(G, 1, C)``: each tile of 64 rows is added up from its first to its last, tiles are folded.

    Args:
        x: what is added up.
        every: of rows, those whose number is a multiple of it; 1 to 64, a power of two.
    """
    tiles = x[:, ::TILE_ROWS].clone()
    for row in range(every, min(TILE_ROWS, x.shape[1]), every):
        part = x[:, row::TILE_ROWS]
        tiles[:, : part.shape[1]] += part
    return fold_sum(tiles, 1)
