"""The first pass over the elements where scales belong to rows and channels: what the scales are made of.

What a row's scale is, is settled as soon as the row has been read, so the sums over channels that need it run at once.
Words are those of ``cpu_loops.py``; sums run in the order of ``reference.py``.

After a change in the files this one imports, touch it: Numba's cache on disk looks at this file's date only.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from compactdist.kernels.cpu_elements import Array, Pointer, inlined, jit, next_part, round_3_bits
from compactdist.kernels.cpu_ints import bits_of_magnitude, larger, largest, no_bits
from compactdist.kernels.cpu_memory import data_of, load, load_first, pointers_of, store, store_first
from compactdist.kernels.cpu_packing import store_mask
from compactdist.kernels.cpu_settle import sum_of
from compactdist.kernels.cpu_steps import AHEAD, ask_for, residual_at
from compactdist.kernels.cpu_vectors import folded, magnitude, where, zeros
from compactdist.kernels.reference import LANES
from compactdist.kernels.reference import TILE_ROWS as TILE

_f32 = np.float32


@inlined
def _pointers_of(place: Any) -> Any:
    row_at, chunk_at, chunk_from, chunk_len, rows, channels, numel = place
    chunks = data_of(chunk_at), data_of(chunk_from), data_of(chunk_len), chunk_at.size
    return data_of(row_at), chunks, rows, channels, numel


@inlined
def _read_row(source: Any, at: int, chunks: Any, numel: int, values: Pointer) -> Any:
    """Residuals of a row, in the order of its channels, of which up to 63 zeros follow.

    What the row after will need is asked for here and, as caches forget, when this row is added to the sums: with
    either alone memory rests for a part of the time.

    Returns:
        By lanes, sums of magnitudes, good where all chunks but the last fill the lanes, and bits of the largest.
    """
    chunk_at, chunk_from, chunk_len, count = chunks
    lanes, bits = zeros(), no_bits()
    for k in range(count):
        n, left, start = chunk_len[k], chunk_at[k], at + chunk_from[k]
        have = min(n, numel - start)
        whole = max(have, 0) // LANES * LANES
        for j in range(0, whole, LANES):
            ask_for(source, start + j + AHEAD)
            value = residual_at(source, start + j, LANES)
            lanes, bits = lanes + magnitude(value), larger(bits, bits_of_magnitude(value))
            store(value, values, left + j)
        for j in range(whole, n, LANES):
            value = residual_at(source, start + j, have - j)
            lanes, bits = lanes + magnitude(value), larger(bits, bits_of_magnitude(value))
            store(value, values, left + j)
    return lanes, bits


@inlined
def _fill_lanes(place: Any) -> bool:
    chunk_len, filled = place[3], True
    for k in range(chunk_len.size - 1):
        filled = filled and chunk_len[k] % LANES == 0
    return filled


@inlined
def _clear(sums: Any, at: int, n: int) -> None:
    one, two, both = sums
    for j in range(0, n, LANES):
        store_first(zeros(), one, at + j, n - j)
        if both:
            store_first(zeros(), two, at + j, n - j)


@inlined
def _update(add: Any, given: Any, value: Any, factor: Any, sums: Any, s: int, element: int, count: int) -> None:
    one, two, both = sums
    first, second = load_first(one, s, count), zeros()
    if both:
        second = load_first(two, s, count)
    first, second = add(given, value, factor, first, second, element, count)
    store_first(first, one, s, count)
    if both:
        store_first(second, two, s, count)


@inlined
def _for_all(
    settle: Any, add: Any, given: Any, parts: Array, source: Any, place: Any, values: Pointer, sums: Any
) -> None:
    """Rows of parts of the tiles: read one, settle its factor, and add it to the tile's sums by channel.

    To settle gets what is given, the row, what ``_read_row`` returns, and the row's values. To add gets what is given,
    64 values, the factor, the sums so far, the position in the matrix and how many channels there are from there on.
    """
    row_at, chunks, rows, channels, numel = _pointers_of(place)
    tiles, last, whole = (rows + TILE - 1) // TILE, place[0].size - 1, channels // LANES * LANES
    lo, hi = next_part(parts)
    while lo < hi:
        for tile in range(lo, hi):
            first, s = tile // tiles * rows + tile % tiles * TILE, tile * channels
            _clear(sums, s, channels)
            for row in range(first, min(first + TILE, (tile // tiles + 1) * rows)):
                factor = settle(given, row, _read_row(source, row_at[row], chunks, numel, values), values, channels)
                coming, element = row_at[min(row + 1, last)], row * channels
                for j in range(0, whole, LANES):
                    ask_for(source, coming + j)
                    _update(add, given, load(values, j), factor, sums, s + j, element + j, LANES)
                if whole < channels:
                    count = channels - whole
                    _update(add, given, load(values, whole), factor, sums, s + whole, element + whole, count)
        lo, hi = next_part(parts)


@inlined
def _weight(given: Any, row: int, read: Any, values: Pointer, channels: int) -> Any:
    stat, weighted, filled = given[:3]
    stat[row] = folded(read[0]) if filled else sum_of(values, channels)
    return round_3_bits(stat[row]) if weighted else _f32(1)


@inlined
def _inverse(given: Any, row: int, read: Any, values: Pointer, channels: int) -> Any:
    stat, weighted = given
    stat[row] = largest(read[1])
    weight = round_3_bits(stat[row]) if weighted else _f32(1)
    return _f32(1) / weight if weight > _f32(0) else _f32(0)


@inlined
def _add_signs(given: Any, value: Any, weight: Any, total: Any, none: Any, element: int, count: int) -> Any:
    store_mask(value >= _f32(0), given[3], element, count)
    return total + magnitude(value) * weight, none


@inlined
def _add_moments(given: Any, value: Any, weight: Any, total: Any, energy: Any, element: int, count: int) -> Any:
    m = magnitude(value)
    return total + m * weight, energy + m * m


@inlined
def _add_reach(given: Any, value: Any, inverse: Any, top: Any, none: Any, element: int, count: int) -> Any:
    reach = magnitude(value) * inverse
    return where(reach > top, reach, top), none


@jit
def survey_signs(
    parts: Array,
    source: Any,
    place: Any,
    weighted: bool,
    buffer: Array,
    stat: Array,
    sums: Array,
    packed: Array,
) -> None:
    """For parts of the tiles: sums of magnitudes by row, of ``m * weight`` by channel, and sign codes."""
    given = data_of(stat), weighted, _fill_lanes(place), data_of(packed)
    to = data_of(sums), data_of(sums), False
    _for_all(_weight, _add_signs, given, parts, pointers_of(source, False), place, data_of(buffer), to)


@jit
def survey_moments(
    parts: Array,
    source: Any,
    place: Any,
    weighted: bool,
    buffer: Array,
    stat: Array,
    sums: Array,
    squares: Array,
) -> None:
    """For parts of the tiles: sums of magnitudes by row, of ``m * weight`` and of ``m * m`` by channel."""
    given, to = (data_of(stat), weighted, _fill_lanes(place)), (data_of(sums), data_of(squares), True)
    _for_all(_weight, _add_moments, given, parts, pointers_of(source, False), place, data_of(buffer), to)


@jit
def survey_reach(
    parts: Array, source: Any, place: Any, weighted: bool, buffer: Array, stat: Array, reach: Array
) -> None:
    """For parts of the tiles: bits of the largest magnitude by row, and the largest ``m / weight`` by channel."""
    given, to = (data_of(stat), weighted), (data_of(reach), data_of(reach), False)
    _for_all(_inverse, _add_reach, given, parts, pointers_of(source, False), place, data_of(buffer), to)
