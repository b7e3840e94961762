"""Where the elements of a matrix lie in a flat buffer, for loops and tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from compactdist.kernels.spec import MatrixView

__all__ = ["Offsets", "offsets_of", "offsets_of_blocks"]

WIDTH = 256
"""Longest chunk of channels; the sums of ``cpu/lowrank.py`` have room for as many."""


class Offsets(NamedTuple):
    """Row r of all groups together and channel ``chunk_at[k] + i`` are element ``row_at[r] + chunk_from[k] + i``.

    That is for ``i < chunk_len[k]``: channels are cut into chunks that are consecutive in memory. Elements from
    ``numel`` on do not exist and count as zero.
    """

    row_at: NDArray[np.int64]
    chunk_at: NDArray[np.int64]
    chunk_from: NDArray[np.int64]
    chunk_len: NDArray[np.int64]
    rows: int
    channels: int
    numel: int


@lru_cache(maxsize=64)
def offsets_of(view: MatrixView) -> Offsets:
    """Work out where a matrix view's elements lie."""
    groups, rows, channels = view.shape
    if view.axes is None:
        row_at, column_at = np.arange(groups * rows, dtype=np.int64) * channels, np.arange(channels, dtype=np.int64)
    else:
        strides = [math.prod(view.axes[i + 1 :]) for i in range(len(view.axes))]
        leading, count = 0, 1
        while count < groups * rows:
            count *= view.axes[view.order[leading]]
            leading += 1
        row_at = _offsets(view.axes, strides, view.order[:leading])
        column_at = _offsets(view.axes, strides, view.order[leading:])
    breaks = np.flatnonzero(np.diff(column_at) != 1) + 1
    bounds = [0, *breaks.tolist(), channels]
    starts = [at for low, high in pairwise(bounds) for at in range(low, high, WIDTH)]
    chunk_at = np.array(starts, dtype=np.int64)
    chunk_len = np.diff(np.append(chunk_at, channels))
    return Offsets(row_at, chunk_at, column_at[chunk_at], chunk_len, rows, channels, view.numel)


@lru_cache(maxsize=64)
def offsets_of_blocks(view: MatrixView, blocks: int, length: int) -> Offsets | None:
    """Blocks as the rows of one group; ``None`` where it is not consecutive in memory."""
    groups, rows, channels = view.shape
    if view.axes is not None or (groups > 1 and rows * channels % length):
        return None
    zero, whole = np.zeros(1, dtype=np.int64), np.full(1, length, dtype=np.int64)
    return Offsets(np.arange(blocks, dtype=np.int64) * length, zero, zero, whole, blocks, length, view.numel)


def _offsets(axes: Sequence[int], strides: Sequence[int], chosen: Sequence[int]) -> NDArray[np.int64]:
    at = np.zeros(1, dtype=np.int64)
    for axis in chosen:
        at = (at[:, None] + np.arange(axes[axis], dtype=np.int64) * strides[axis]).reshape(-1)
    return at
