"""The first pass over the elements where scales belong to rows and channels: what the scales are made of.

What a row's scale is, is settled as soon as the row has been read, so the sums over channels that need it run at once.
Words are those of ``cpu_loops.py``; sums run in the order of ``reference.py``.

After a change in the files this one imports, touch it: Numba's cache on disk looks at this file's date only.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from compactdist.codecs.kernels.cpu_codes import pack_signs
from compactdist.codecs.kernels.cpu_elements import (
    Array,
    Pointer,
    inlined,
    jit,
    lane_sum,
    largest_of,
    residual,
    round_3_bits,
)
from compactdist.codecs.kernels.cpu_vectors import as_u32, data_of, stack_codes, stack_floats
from compactdist.codecs.kernels.reference import TILE_ROWS as TILE

_u32, _f32, _at = np.uint32, np.float32, np.uintp


@inlined
def _load_row(
    x: Pointer,
    base: Pointer,
    velocity: Pointer,
    terms: int,
    at: int,
    chunks: int,
    chunk_at: Pointer,
    chunk_from: Pointer,
    chunk_len: Pointer,
    numel: int,
    buffer: Pointer,
) -> None:
    for k in range(chunks):
        residual(x, base, velocity, terms, at + chunk_from[k], numel, buffer, chunk_at[k], chunk_len[k])


@jit
def survey_signs(
    source: Any, place: Any, weighted: bool, lo: int, hi: int, buffer: Array, stat: Array, sums: Array, packed: Array
) -> None:
    """For tiles ``lo`` to ``hi``: sums of magnitudes by row, of ``m * weight`` by channel, and sign codes."""
    x, base, velocity, terms = source
    row_at, chunk_at, chunk_from, chunk_len, rows, channels, numel = place
    xs, bases, velocities, values = data_of(x), data_of(base), data_of(velocity), data_of(buffer)
    starts, froms, lengths, count = data_of(chunk_at), data_of(chunk_from), data_of(chunk_len), chunk_at.size
    tiles = (rows + TILE - 1) // TILE
    lanes, codes, bytes_ = stack_floats(), stack_codes(), data_of(packed)
    for tile in range(lo, hi):
        first, s = tile // tiles * rows + tile % tiles * TILE, _at(tile * channels)
        for j in range(channels):
            sums[s + _at(j)] = _f32(0)
        for row in range(first, min(first + TILE, (tile // tiles + 1) * rows)):
            at = row_at[row]
            _load_row(xs, bases, velocities, terms, at, count, starts, froms, lengths, numel, values)
            total = lane_sum(values, 0, channels, lanes)
            stat[row] = total
            weight = round_3_bits(total) if weighted else _f32(1)
            for j in range(channels):
                sums[s + _at(j)] += abs(values[_at(j)]) * weight
            pack_signs(values, channels, bytes_, row * channels, codes)


@jit
def survey_moments(
    source: Any, place: Any, weighted: bool, lo: int, hi: int, buffer: Array, stat: Array, sums: Array, squares: Array
) -> None:
    """For tiles ``lo`` to ``hi``: sums of magnitudes by row, of ``m * weight`` and of ``m * m`` by channel."""
    x, base, velocity, terms = source
    row_at, chunk_at, chunk_from, chunk_len, rows, channels, numel = place
    xs, bases, velocities, values = data_of(x), data_of(base), data_of(velocity), data_of(buffer)
    starts, froms, lengths, count = data_of(chunk_at), data_of(chunk_from), data_of(chunk_len), chunk_at.size
    tiles = (rows + TILE - 1) // TILE
    lanes = stack_floats()
    for tile in range(lo, hi):
        first, s = tile // tiles * rows + tile % tiles * TILE, _at(tile * channels)
        for j in range(channels):
            sums[s + _at(j)] = _f32(0)
            squares[s + _at(j)] = _f32(0)
        for row in range(first, min(first + TILE, (tile // tiles + 1) * rows)):
            at = row_at[row]
            _load_row(xs, bases, velocities, terms, at, count, starts, froms, lengths, numel, values)
            total = lane_sum(values, 0, channels, lanes)
            stat[row] = total
            weight = round_3_bits(total) if weighted else _f32(1)
            for j in range(channels):
                m = abs(values[_at(j)])
                sums[s + _at(j)] += m * weight
                squares[s + _at(j)] += m * m


@jit
def survey_reach(
    source: Any, place: Any, weighted: bool, lo: int, hi: int, buffer: Array, stat: Array, reach: Array
) -> None:
    """For tiles ``lo`` to ``hi``: bits of the largest magnitude by row, and the largest ``m / weight`` by channel."""
    x, base, velocity, terms = source
    row_at, chunk_at, chunk_from, chunk_len, rows, channels, numel = place
    xs, bases, velocities, values = data_of(x), data_of(base), data_of(velocity), data_of(buffer)
    starts, froms, lengths, count = data_of(chunk_at), data_of(chunk_from), data_of(chunk_len), chunk_at.size
    tiles = (rows + TILE - 1) // TILE
    bits, cell = as_u32(values), stack_floats()
    for tile in range(lo, hi):
        first, s = tile // tiles * rows + tile % tiles * TILE, _at(tile * channels)
        for j in range(channels):
            reach[s + _at(j)] = _f32(0)
        for row in range(first, min(first + TILE, (tile // tiles + 1) * rows)):
            at = row_at[row]
            _load_row(xs, bases, velocities, terms, at, count, starts, froms, lengths, numel, values)
            largest = largest_of(bits, 0, channels, cell)
            stat[row] = largest
            weight = round_3_bits(largest) if weighted else _f32(1)
            inverse = _f32(1) / weight if weight > _f32(0) else _f32(0)
            for j in range(channels):
                value = abs(values[_at(j)]) * inverse
                reach[s + _at(j)] = value if value > reach[s + _at(j)] else reach[s + _at(j)]
