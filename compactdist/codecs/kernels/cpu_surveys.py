"""The first pass over the elements where scales belong to rows and channels: what the scales are made of.

What a row's scale is, is settled as soon as the row has been read, so the sums over channels that need it run at once.
Words are those of ``cpu_loops.py``; sums run in the order of ``reference.py``.

After a change in the files this one imports, touch it: Numba's cache on disk looks at this file's date only.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from compactdist.codecs.kernels.cpu_elements import Array, Pointer, inlined, jit, round_3_bits
from compactdist.codecs.kernels.cpu_memory import data_of, load, load_first, pointers_of, store, store_first
from compactdist.codecs.kernels.cpu_packing import store_mask
from compactdist.codecs.kernels.cpu_settle import sum_of
from compactdist.codecs.kernels.cpu_steps import ask_for, residual_at
from compactdist.codecs.kernels.cpu_vectors import (
    bits_of_magnitude,
    folded,
    larger,
    largest,
    magnitude,
    no_bits,
    where,
    zeros,
)
from compactdist.codecs.kernels.reference import LANES
from compactdist.codecs.kernels.reference import TILE_ROWS as TILE

_f32 = np.float32


@inlined
def _pointers_of(place: Any) -> Any:
    row_at, chunk_at, chunk_from, chunk_len, rows, channels, numel = place
    chunks = data_of(chunk_at), data_of(chunk_from), data_of(chunk_len), chunk_at.size
    return data_of(row_at), chunks, rows, channels, numel


@inlined
def _read_row(source: Any, at: int, chunks: Any, numel: int, values: Pointer) -> Any:
    """Residuals of a row, in the order of its channels, of which up to 63 zeros follow.

    Returns:
        By lanes, sums of magnitudes, good where all chunks but the last fill the lanes, and bits of the largest.
    """
    chunk_at, chunk_from, chunk_len, count = chunks
    lanes, bits = zeros(), no_bits()
    for k in range(count):
        n, left, start = chunk_len[k], chunk_at[k], at + chunk_from[k]
        for j in range(0, n, LANES):
            value = residual_at(source, start + j, min(n, numel - start) - j)
            lanes, bits = lanes + magnitude(value), larger(bits, bits_of_magnitude(value))
            store(value, values, left + j)
    return lanes, bits


@inlined
def _fill_lanes(chunks: Any) -> bool:
    _, _, chunk_len, count = chunks
    filled = True
    for k in range(count - 1):
        filled = filled and chunk_len[k] % LANES == 0
    return filled


@inlined
def _clear(sums: Pointer, at: int, n: int) -> None:
    for j in range(0, n, LANES):
        store_first(zeros(), sums, at + j, n - j)


@jit
def survey_signs(
    lo: int, hi: int, source: Any, place: Any, weighted: bool, buffer: Array, stat: Array, sums: Array, packed: Array
) -> None:
    """For tiles ``lo`` to ``hi``: sums of magnitudes by row, of ``m * weight`` by channel, and sign codes."""
    given, (row_at, chunks, rows, channels, numel) = pointers_of(source), _pointers_of(place)
    values, total, bytes_ = data_of(buffer), data_of(sums), data_of(packed)
    tiles, filled = (rows + TILE - 1) // TILE, _fill_lanes(chunks)
    for tile in range(lo, hi):
        first, s = tile // tiles * rows + tile % tiles * TILE, tile * channels
        _clear(total, s, channels)
        for row in range(first, min(first + TILE, (tile // tiles + 1) * rows)):
            lanes, _ = _read_row(given, row_at[row], chunks, numel, values)
            stat[row] = folded(lanes) if filled else sum_of(values, channels)
            weight = round_3_bits(stat[row]) if weighted else _f32(1)
            coming = row_at[min(row + 1, place[0].size - 1)]
            for j in range(0, channels, LANES):
                ask_for(given, coming + j)
                value, count = load(values, j), channels - j
                store_first(load_first(total, s + j, count) + magnitude(value) * weight, total, s + j, count)
                store_mask(value >= _f32(0), bytes_, row * channels + j, count)


@jit
def survey_moments(
    lo: int, hi: int, source: Any, place: Any, weighted: bool, buffer: Array, stat: Array, sums: Array, squares: Array
) -> None:
    """For tiles ``lo`` to ``hi``: sums of magnitudes by row, of ``m * weight`` and of ``m * m`` by channel."""
    given, (row_at, chunks, rows, channels, numel) = pointers_of(source), _pointers_of(place)
    values, total, energy = data_of(buffer), data_of(sums), data_of(squares)
    tiles, filled = (rows + TILE - 1) // TILE, _fill_lanes(chunks)
    for tile in range(lo, hi):
        first, s = tile // tiles * rows + tile % tiles * TILE, tile * channels
        _clear(total, s, channels)
        _clear(energy, s, channels)
        for row in range(first, min(first + TILE, (tile // tiles + 1) * rows)):
            lanes, _ = _read_row(given, row_at[row], chunks, numel, values)
            stat[row] = folded(lanes) if filled else sum_of(values, channels)
            weight = round_3_bits(stat[row]) if weighted else _f32(1)
            coming = row_at[min(row + 1, place[0].size - 1)]
            for j in range(0, channels, LANES):
                ask_for(given, coming + j)
                m, count = magnitude(load(values, j)), channels - j
                store_first(load_first(total, s + j, count) + m * weight, total, s + j, count)
                store_first(load_first(energy, s + j, count) + m * m, energy, s + j, count)


@jit
def survey_reach(
    lo: int, hi: int, source: Any, place: Any, weighted: bool, buffer: Array, stat: Array, reach: Array
) -> None:
    """For tiles ``lo`` to ``hi``: bits of the largest magnitude by row, and the largest ``m / weight`` by channel."""
    given, (row_at, chunks, rows, channels, numel) = pointers_of(source), _pointers_of(place)
    values, top = data_of(buffer), data_of(reach)
    tiles = (rows + TILE - 1) // TILE
    for tile in range(lo, hi):
        first, s = tile // tiles * rows + tile % tiles * TILE, tile * channels
        _clear(top, s, channels)
        for row in range(first, min(first + TILE, (tile // tiles + 1) * rows)):
            _, bits = _read_row(given, row_at[row], chunks, numel, values)
            stat[row] = largest(bits)
            weight = round_3_bits(stat[row]) if weighted else _f32(1)
            inverse = _f32(1) / weight if weight > _f32(0) else _f32(0)
            coming = row_at[min(row + 1, place[0].size - 1)]
            for j in range(0, channels, LANES):
                ask_for(given, coming + j)
                value, so_far, count = (
                    magnitude(load(values, j)) * inverse,
                    load_first(top, s + j, channels - j),
                    channels - j,
                )
                store_first(where(value > so_far, value, so_far), top, s + j, count)
