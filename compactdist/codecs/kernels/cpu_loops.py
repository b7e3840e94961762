"""The passes over the elements where scales belong to rows and channels, compiled by Numba. ``cpu.py`` says what for.

What both ends compute is in the order of ``reference.py`` to the bit, so ``fastmath`` is out of the question. Loops
read into a small buffer before they write, for input and output may be the same memory.

A *place* is what tells where matrix elements lie: ``(row_at, chunk_at, chunk_from, chunk_len, rows, channels,
numel)``, see ``cpu.py``. A *source* is ``(x, base, velocity)`` as bits, empty for none. A *tile* is 64 rows of one
group. All arrays are flat.

Numba looks at one file's date to tell whether its cache on disk still holds, and does not see what the file imports:
after a change in ``cpu_elements.py``, ``cpu_codes.py`` or ``cpu_vectors.py``, touch this one.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from compactdist.codecs.kernels.cpu_codes import code_views, level_of, nearest, pack, unpack
from compactdist.codecs.kernels.cpu_elements import (
    LANES,
    Array,
    finish,
    inlined,
    jit,
    lane_sum,
    largest_of,
    predict,
    residual,
    round_3_bits,
    subtract,
)
from compactdist.codecs.kernels.cpu_vectors import load_word, negate_where_clear, not_negative, store_word
from compactdist.codecs.kernels.places import WIDTH

TILE = 64
"""Rows that share running sums, as in the reference."""


_u32, _f32, _at = np.uint32, np.float32, np.uintp
_ROUNDING = np.float32(12582912.0)  # 1.5 * 2**23: adding it rounds to an integer, half to even


@inlined
def _load_row(source: Any, place: Any, row: int, buffer: Array) -> None:
    x, base, velocity = source
    row_at, chunk_at, chunk_from, chunk_len, _, _, numel = place
    for k in range(chunk_at.size):
        residual(x, base, velocity, row_at[row] + chunk_from[k], numel, buffer, chunk_at[k], chunk_len[k])


@inlined
def _pack_signs(values: Array, n: int, packed: Array, element: int, views: Any) -> None:
    """Sign codes of ``n`` float32 values, to position ``element`` and on."""
    one = views[0]
    whole = n // LANES
    for k in range(whole):
        store_word(not_negative(values, _at(k * LANES)), packed, _at((element >> 3) + 8 * k))
    rest, o = n - whole * LANES, _at(whole * LANES)
    for j in range(rest):
        one[_at(j)] = np.uint8(values[o + _at(j)] >= _f32(0))
    pack(views, 1, rest, packed, element + whole * LANES)


@jit
def survey_signs(
    source: Any, place: Any, weighted: bool, lo: int, hi: int, stat: Array, sums: Array, packed: Array
) -> None:
    """For tiles ``lo`` to ``hi``: sums of magnitudes by row, of ``m * weight`` by channel, and sign codes."""
    rows, channels = place[4], place[5]
    tiles = (rows + TILE - 1) // TILE
    buffer, lanes, views = np.empty(channels, np.float32), np.empty(LANES, np.float32), code_views(LANES)
    for tile in range(lo, hi):
        first, s = tile // tiles * rows + tile % tiles * TILE, _at(tile * channels)
        for j in range(channels):
            sums[s + _at(j)] = _f32(0)
        for row in range(first, min(first + TILE, (tile // tiles + 1) * rows)):
            _load_row(source, place, row, buffer)
            total = lane_sum(buffer, channels, lanes)
            stat[row] = total
            weight = round_3_bits(total) if weighted else _f32(1)
            for j in range(channels):
                sums[s + _at(j)] += abs(buffer[_at(j)]) * weight
            _pack_signs(buffer, channels, packed, row * channels, views)


@jit
def survey_moments(
    source: Any, place: Any, weighted: bool, lo: int, hi: int, stat: Array, sums: Array, squares: Array
) -> None:
    """For tiles ``lo`` to ``hi``: sums of magnitudes by row, of ``m * weight`` and of ``m * m`` by channel."""
    rows, channels = place[4], place[5]
    tiles = (rows + TILE - 1) // TILE
    buffer, lanes = np.empty(channels, np.float32), np.empty(LANES, np.float32)
    for tile in range(lo, hi):
        first, s = tile // tiles * rows + tile % tiles * TILE, _at(tile * channels)
        for j in range(channels):
            sums[s + _at(j)] = _f32(0)
            squares[s + _at(j)] = _f32(0)
        for row in range(first, min(first + TILE, (tile // tiles + 1) * rows)):
            _load_row(source, place, row, buffer)
            total = lane_sum(buffer, channels, lanes)
            stat[row] = total
            weight = round_3_bits(total) if weighted else _f32(1)
            for j in range(channels):
                m = abs(buffer[_at(j)])
                sums[s + _at(j)] += m * weight
                squares[s + _at(j)] += m * m


@jit
def survey_reach(source: Any, place: Any, weighted: bool, lo: int, hi: int, stat: Array, reach: Array) -> None:
    """For tiles ``lo`` to ``hi``: bits of the largest magnitude by row, and the largest ``m / weight`` by channel."""
    rows, channels = place[4], place[5]
    tiles = (rows + TILE - 1) // TILE
    buffer = np.empty(channels, np.float32)
    bits, cell = buffer.view(np.uint32), np.empty(1, np.float32)
    cell_bits = cell.view(np.uint32)
    for tile in range(lo, hi):
        first, s = tile // tiles * rows + tile % tiles * TILE, _at(tile * channels)
        for j in range(channels):
            reach[s + _at(j)] = _f32(0)
        for row in range(first, min(first + TILE, (tile // tiles + 1) * rows)):
            _load_row(source, place, row, buffer)
            largest = largest_of(bits, channels, cell, cell_bits)
            stat[row] = largest
            weight = round_3_bits(largest) if weighted else _f32(1)
            inverse = _f32(1) / weight if weight > _f32(0) else _f32(0)
            for j in range(channels):
                value = abs(buffer[_at(j)]) * inverse
                reach[s + _at(j)] = value if value > reach[s + _at(j)] else reach[s + _at(j)]


@jit
def weight_squares(stat: Array, weighted: bool, rows: int, sums: Array) -> None:
    """Sum of ``weight * weight`` over every tile."""
    tiles = (rows + TILE - 1) // TILE
    for tile in range(sums.size):
        first, total = tile // tiles * rows + tile % tiles * TILE, _f32(0)
        for row in range(first, min(first + TILE, (tile // tiles + 1) * rows)):
            weight = round_3_bits(stat[row]) if weighted else _f32(1)
            total += weight * weight
        sums[tile] = total


@jit
def code_nearest(
    source: Any,
    place: Any,
    bits: int,
    borders: Any,
    magnitudes: Any,
    t: Array,
    inverse_t: Array,
    c: Array,
    inverse_c: Array,
    limit: Any,
    lo: int,
    hi: int,
    packed: Array,
    out: Array,
) -> None:
    """For rows ``lo`` to ``hi``: codes of the nearest magnitude and the sign, and what the receiver makes of them.

    Borders and magnitudes are tuples, so that the search among them is unrolled. ``out`` may be empty. A smallest
    magnitude of zero means trits: 0, or 1 and 2 for a sign.
    """
    x, base, velocity = source
    row_at, chunk_at, chunk_from, chunk_len, rows, channels, numel = place
    values, expected, views = np.empty(WIDTH, np.float32), np.empty(WIDTH, np.float32), code_views(WIDTH)
    code, trits = views[0], magnitudes[0] == _f32(0)
    for row in range(lo, hi):
        weight, inverse_weight = t[row], inverse_t[row]
        for k in range(chunk_at.size):
            n, s, at = chunk_len[k], _at(row // rows * channels + chunk_at[k]), row_at[row] + chunk_from[k]
            predict(base, velocity, at, numel, expected, n)
            subtract(x, at, numel, expected, values, n)
            for j in range(n):
                value = values[_at(j)]
                index = nearest(abs(value) * inverse_c[s + _at(j)] * inverse_weight, borders)
                change = (weight * c[s + _at(j)]) * level_of(index, magnitudes)
                negative = value < _f32(0)
                below = _u32(index << _u32(1)) if trits else _u32(index | _u32(len(magnitudes)))
                code[_at(j)] = np.uint8(below if negative else index)
                values[_at(j)] = (-change if negative else change) + _f32(0)  # no code means -0
            if out.size:
                finish(expected, values, limit, out, at, numel, n)
            pack(views, bits, n, packed, row * channels + chunk_at[k])


@jit
def code_linear(
    source: Any,
    place: Any,
    largest: Any,
    t: Array,
    inverse_t: Array,
    c: Array,
    inverse_c: Array,
    limit: Any,
    lo: int,
    hi: int,
    packed: Array,
    out: Array,
) -> None:
    """For rows ``lo`` to ``hi``: the nearest integer of ``m / (t * c)`` with the sign of the element, in a byte."""
    x, base, velocity = source
    row_at, chunk_at, chunk_from, chunk_len, rows, channels, numel = place
    values, expected = np.empty(WIDTH, np.float32), np.empty(WIDTH, np.float32)
    for row in range(lo, hi):
        weight, inverse_weight = t[row], inverse_t[row]
        for k in range(chunk_at.size):
            n, s, at = chunk_len[k], _at(row // rows * channels + chunk_at[k]), row_at[row] + chunk_from[k]
            predict(base, velocity, at, numel, expected, n)
            subtract(x, at, numel, expected, values, n)
            p = _at(row * channels + chunk_at[k])
            for j in range(n):
                value = values[_at(j)]
                steps = abs(value) * inverse_c[s + _at(j)] * inverse_weight
                steps = largest if steps > largest else steps
                steps = (steps + _ROUNDING) - _ROUNDING
                steps = -steps if value < _f32(0) else steps
                packed[p + _at(j)] = np.uint8(np.int32(steps))
                values[_at(j)] = (weight * c[s + _at(j)]) * (steps + _f32(0))  # a code has no -0
            if out.size:
                finish(expected, values, limit, out, at, numel, n)


@jit
def apply_signs(
    packed: Array,
    t: Array,
    c: Array,
    base: Array,
    velocity: Array,
    place: Any,
    limit: Any,
    lo: int,
    hi: int,
    out: Array,
) -> None:
    """For rows ``lo`` to ``hi``: ``out = expected + t * c`` or ``- t * c``, kept within ``limit`` and rounded."""
    row_at, chunk_at, chunk_from, chunk_len, rows, channels, numel = place
    change, expected, views = np.empty(WIDTH, np.float32), np.empty(WIDTH, np.float32), code_views(LANES)
    one = views[0]
    for row in range(lo, hi):
        weight = t[row]
        for k in range(chunk_at.size):
            n, s, at = chunk_len[k], _at(row // rows * channels + chunk_at[k]), row_at[row] + chunk_from[k]
            element, whole = row * channels + chunk_at[k], n // LANES
            for j in range(n):
                change[_at(j)] = weight * c[s + _at(j)]
            for i in range(whole):
                negate_where_clear(load_word(packed, _at((element >> 3) + 8 * i)), change, _at(i * LANES))
            rest, o = n - whole * LANES, _at(whole * LANES)
            unpack(packed, 1, element + whole * LANES, views, rest)
            for j in range(rest):
                change[o + _at(j)] = change[o + _at(j)] if one[_at(j)] else -change[o + _at(j)]
            predict(base, velocity, at, numel, expected, n)
            finish(expected, change, limit, out, at, numel, n)


@jit
def apply_levels(
    packed: Array,
    bits: int,
    magnitudes: Any,
    t: Array,
    c: Array,
    base: Array,
    velocity: Array,
    place: Any,
    limit: Any,
    lo: int,
    hi: int,
    out: Array,
) -> None:
    """For rows ``lo`` to ``hi``: ``out = expected + (t * c) * level``; codes are sign and index of a magnitude."""
    row_at, chunk_at, chunk_from, chunk_len, rows, channels, numel = place
    change, expected, views = np.empty(WIDTH, np.float32), np.empty(WIDTH, np.float32), code_views(WIDTH)
    code = views[0]
    for row in range(lo, hi):
        weight = t[row]
        for k in range(chunk_at.size):
            n, s, at = chunk_len[k], _at(row // rows * channels + chunk_at[k]), row_at[row] + chunk_from[k]
            unpack(packed, bits, row * channels + chunk_at[k], views, n)
            for j in range(n):
                index = _u32(code[_at(j)])
                d = (weight * c[s + _at(j)]) * level_of(index, magnitudes)
                change[_at(j)] = -d if index & _u32(len(magnitudes)) else d
            predict(base, velocity, at, numel, expected, n)
            finish(expected, change, limit, out, at, numel, n)


@jit
def apply_table(
    codes: Array,
    table: Array,
    t: Array,
    c: Array,
    base: Array,
    velocity: Array,
    place: Any,
    limit: Any,
    lo: int,
    hi: int,
    out: Array,
) -> None:
    """The same for codes of a byte; an empty table stands for the integers of two's complement."""
    row_at, chunk_at, chunk_from, chunk_len, rows, channels, numel = place
    change, expected = np.empty(WIDTH, np.float32), np.empty(WIDTH, np.float32)
    for row in range(lo, hi):
        weight = t[row]
        for k in range(chunk_at.size):
            n, s, at = chunk_len[k], _at(row // rows * channels + chunk_at[k]), row_at[row] + chunk_from[k]
            p = _at(row * channels + chunk_at[k])
            if table.size:
                for j in range(n):
                    change[_at(j)] = (weight * c[s + _at(j)]) * table[_at(codes[p + _at(j)])]
            else:
                for j in range(n):
                    change[_at(j)] = (weight * c[s + _at(j)]) * _f32(np.int8(codes[p + _at(j)]))
            predict(base, velocity, at, numel, expected, n)
            finish(expected, change, limit, out, at, numel, n)
