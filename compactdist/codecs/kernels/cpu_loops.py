"""The passes over the elements, compiled by Numba. ``cpu.py`` calls them and says what they are for.

What both ends compute is in the order of ``reference.py`` to the bit, so ``fastmath`` is out of the question. Loops
read into a small buffer before they write, for input and output may be the same memory.

A *place* is what tells where matrix elements lie: ``(row_at, chunk_at, chunk_from, chunk_len, rows, channels,
numel)``, see ``cpu.py``. A *tile* is 32 rows of one group. All arrays are flat.

Numba looks at one file's date to tell whether its cache on disk still holds, and does not see what the file imports:
after a change in ``cpu_elements.py``, touch this one.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from compactdist.codecs.kernels.cpu_elements import (
    Array,
    add,
    code_views,
    copy,
    fill,
    fold,
    jit,
    pack,
    residual,
    unpack,
)

TILE = 32
"""Rows summed together, as in the reference."""

WIDTH = 256
"""Longest chunk of channels: a tile of it fits in the second-level cache, and a row of it into the first."""

_u32, _f32, _at = np.uint32, np.float32, np.uintp
_LARGEST = np.float32(3.4028234663852886e38)
_ROUNDING = np.float32(12582912.0)  # 1.5 * 2**23: adding it rounds to an integer, half to even


@jit
def row_statistics(
    x: Array,
    base: Array,
    place: Any,
    factors: Array,
    lo: int,
    hi: int,
    sums: bool,
    stat: Array,
    most: Array,
    least: Array,
) -> None:
    """For rows ``lo`` to ``hi``: the folded sum of scaled magnitudes (if ``sums``), and the bits of the largest and of
    the smallest nonzero magnitude, the latter less one.
    """
    row_at, chunk_at, chunk_from, chunk_len, rows, channels, numel = place
    buffer = np.empty(channels, np.float32)
    bits = buffer.view(np.uint32)
    for row in range(lo, hi):
        for k in range(chunk_at.size):
            residual(x, base, row_at[row] + chunk_from[k], numel, buffer, chunk_at[k], chunk_len[k])
        large, small = _u32(0), _u32(0xFFFFFFFF)
        for j in range(channels):
            v = _u32(bits[_at(j)] & _u32(0x7FFFFFFF))
            large = max(large, v)
            small = min(small, _u32(v - _u32(1)))
        most[row], least[row] = large, small
        if sums:
            factor = factors[row // rows]
            for j in range(channels):
                buffer[_at(j)] = abs(buffer[_at(j)]) * factor
            fold(buffer, channels, 1)
            stat[row] = buffer[0]


@jit
def sign_codes(
    x: Array, base: Array, place: Any, factors: Array, t: Array, lo: int, hi: int, packed: Array, sums: Array
) -> None:
    """For tiles ``lo`` to ``hi``: sign codes, and by channel the sums of ``m * t``."""
    row_at, chunk_at, chunk_from, chunk_len, rows, channels, numel = place
    tiles = (rows + TILE - 1) // TILE
    whole = np.empty(TILE * WIDTH, np.float32)
    code, two_codes, four_codes, eight_codes = code_views(WIDTH)
    for tile in range(lo, hi):
        group, first = tile // tiles, tile % tiles * TILE
        factor, here = factors[group], min(TILE, rows - first)
        for k in range(chunk_at.size):
            n = chunk_len[k]
            for r in range(here):
                row, o = group * rows + first + r, _at(r * n)
                residual(x, base, row_at[row] + chunk_from[k], numel, whole, r * n, n)
                for j in range(n):
                    code[_at(j)] = np.uint8(whole[o + _at(j)] >= _f32(0))
                weight = t[row]
                for j in range(n):
                    whole[o + _at(j)] = abs(whole[o + _at(j)]) * factor * weight
                pack(code, two_codes, four_codes, eight_codes, 1, n, packed, row * channels + chunk_at[k])
            fill(whole, here * n, (TILE - here) * n, _f32(0))
            fold(whole, TILE * n, n)
            copy(whole, sums, tile * channels + chunk_at[k], n)


@jit
def energies(
    x: Array, base: Array, place: Any, factors: Array, t: Array, lo: int, hi: int, squares: Array, sums: Array
) -> None:
    """For tiles ``lo`` to ``hi``, by channel: the sums of ``m * m`` and of ``m * t``."""
    row_at, chunk_at, chunk_from, chunk_len, rows, channels, numel = place
    tiles = (rows + TILE - 1) // TILE
    one, two = np.empty(TILE * WIDTH, np.float32), np.empty(TILE * WIDTH, np.float32)
    for tile in range(lo, hi):
        group, first = tile // tiles, tile % tiles * TILE
        factor, here = factors[group], min(TILE, rows - first)
        for k in range(chunk_at.size):
            n = chunk_len[k]
            for r in range(here):
                row, o = group * rows + first + r, _at(r * n)
                residual(x, base, row_at[row] + chunk_from[k], numel, one, r * n, n)
                weight = t[row]
                for j in range(n):
                    m = abs(one[o + _at(j)]) * factor
                    one[o + _at(j)] = m * m
                    two[o + _at(j)] = m * weight
            fill(one, here * n, (TILE - here) * n, _f32(0))
            fill(two, here * n, (TILE - here) * n, _f32(0))
            fold(one, TILE * n, n)
            fold(two, TILE * n, n)
            copy(one, squares, tile * channels + chunk_at[k], n)
            copy(two, sums, tile * channels + chunk_at[k], n)


@jit
def nearest_codes(
    x: Array,
    base: Array,
    place: Any,
    factors: Array,
    t: Array,
    inverse_t: Array,
    inverse_c: Array,
    borders: Any,
    magnitudes: Any,
    lo: int,
    hi: int,
    packed: Array,
    products: Array,
    squares: Array,
) -> None:
    """For tiles ``lo`` to ``hi``: sign and index of the nearest magnitude, and by channel, with w the chosen
    magnitude times t, the sums of ``m * w`` and of ``w * w``.

    Borders and magnitudes are tuples, so that the search among them is unrolled.
    """
    row_at, chunk_at, chunk_from, chunk_len, rows, channels, numel = place
    tiles = (rows + TILE - 1) // TILE
    bits = 1
    while 1 << bits < 2 * len(magnitudes):
        bits += 1
    one, two = np.empty(TILE * WIDTH, np.float32), np.empty(TILE * WIDTH, np.float32)
    code, two_codes, four_codes, eight_codes = code_views(WIDTH)
    for tile in range(lo, hi):
        group, first = tile // tiles, tile % tiles * TILE
        factor, here = factors[group], min(TILE, rows - first)
        for k in range(chunk_at.size):
            n, c = chunk_len[k], _at(group * channels + chunk_at[k])
            for r in range(here):
                row, o = group * rows + first + r, _at(r * n)
                residual(x, base, row_at[row] + chunk_from[k], numel, one, r * n, n)
                weight, inverse_weight = t[row], inverse_t[row]
                for j in range(n):
                    value = one[o + _at(j)]
                    m = abs(value) * factor
                    v = m * inverse_c[c + _at(j)] * inverse_weight
                    index = _u32(len(magnitudes)) if value < _f32(0) else _u32(0)
                    level = magnitudes[0]
                    for i in range(len(borders)):
                        above = v > borders[i]
                        index = _u32(index + _u32(1)) if above else index
                        level = magnitudes[i + 1] if above else level
                    w = level * weight
                    one[o + _at(j)] = m * w
                    two[o + _at(j)] = w * w
                    code[_at(j)] = np.uint8(index)
                pack(code, two_codes, four_codes, eight_codes, bits, n, packed, row * channels + chunk_at[k])
            fill(one, here * n, (TILE - here) * n, _f32(0))
            fill(two, here * n, (TILE - here) * n, _f32(0))
            fold(one, TILE * n, n)
            fold(two, TILE * n, n)
            copy(one, products, tile * channels + chunk_at[k], n)
            copy(two, squares, tile * channels + chunk_at[k], n)


@jit
def reaches(x: Array, base: Array, place: Any, factors: Array, inverse_t: Array, lo: int, hi: int, out: Array) -> None:
    """For tiles ``lo`` to ``hi``, by channel: the largest ``m / t``."""
    row_at, chunk_at, chunk_from, chunk_len, rows, channels, numel = place
    tiles = (rows + TILE - 1) // TILE
    values, top = np.empty(WIDTH, np.float32), np.empty(WIDTH, np.float32)
    for tile in range(lo, hi):
        group, first = tile // tiles, tile % tiles * TILE
        factor = factors[group]
        for k in range(chunk_at.size):
            n = chunk_len[k]
            fill(top, 0, n, _f32(0))
            for row in range(group * rows + first, group * rows + min(first + TILE, rows)):
                residual(x, base, row_at[row] + chunk_from[k], numel, values, 0, n)
                inverse = inverse_t[row]
                for j in range(n):
                    reach = abs(values[_at(j)]) * factor * inverse
                    top[_at(j)] = reach if reach > top[_at(j)] else top[_at(j)]
            copy(top, out, tile * channels + chunk_at[k], n)


@jit
def linear_codes(
    x: Array,
    base: Array,
    place: Any,
    factors: Array,
    inverse_t: Array,
    inverse_c: Array,
    largest: Any,
    lo: int,
    hi: int,
    packed: Array,
) -> None:
    """For rows ``lo`` to ``hi``: the nearest integer of ``m / (t * c)`` with the sign of the element, in a byte."""
    row_at, chunk_at, chunk_from, chunk_len, rows, channels, numel = place
    values = np.empty(WIDTH, np.float32)
    for row in range(lo, hi):
        group = row // rows
        factor, inverse_weight = factors[group], inverse_t[row]
        for k in range(chunk_at.size):
            n, c = chunk_len[k], _at(group * channels + chunk_at[k])
            residual(x, base, row_at[row] + chunk_from[k], numel, values, 0, n)
            o = _at(row * channels + chunk_at[k])
            for j in range(n):
                value = values[_at(j)]
                steps = abs(value) * factor * inverse_c[c + _at(j)] * inverse_weight
                steps = largest if steps > largest else steps
                steps = (steps + _ROUNDING) - _ROUNDING
                packed[o + _at(j)] = np.uint8(np.int32(-steps if value < _f32(0) else steps))


@jit
def apply_codes(
    packed: Array,
    bits: int,
    table: Array,
    t: Array,
    c: Array,
    base: Array,
    place: Any,
    limit: Any,
    lo: int,
    hi: int,
    out: Array,
) -> None:
    """For rows ``lo`` to ``hi``: ``out = base + (t * c) * level``, kept within ``limit`` and rounded."""
    row_at, chunk_at, chunk_from, chunk_len, rows, channels, numel = place
    one, _, four, eight = code_views(WIDTH)
    levels = np.empty(WIDTH, np.float32)
    level_pairs, pairs = levels.view(np.uint64), table.view(np.uint64)
    for row in range(lo, hi):
        group, weight = row // rows, t[row]
        for k in range(chunk_at.size):
            n, s = chunk_len[k], _at(group * channels + chunk_at[k])
            unpack(packed, bits, row * channels + chunk_at[k], n, table, pairs, one, four, eight, levels, level_pairs)
            for j in range(n):
                d = (weight * c[s + _at(j)]) * levels[_at(j)]
                d = _LARGEST if d > _LARGEST else d
                levels[_at(j)] = -_LARGEST if d < -_LARGEST else d
            at = row_at[row] + chunk_from[k]
            add(base, at, levels, limit, out, max(0, min(n, numel - at)))
