"""The loops of the low-rank codecs, compiled by Numba: take in a residual, fit levels to a factor, and put out the
product of two thin matrices. The latter two give the bits of the torch reference.

Numba contracts nothing to a fused multiply-add unless asked to, and is not asked here. Each is a work that stands
alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from compactdist.kernels.cpu import call
from compactdist.kernels.cpu.elements import expected_at, floats_from, put, residual_at, source_of
from compactdist.kernels.cpu.rows import offsets_in
from compactdist.kernels.cpu.simd.elements import fold
from compactdist.kernels.cpu.simd.jit import inlined
from compactdist.kernels.cpu.simd.memory import load_first, rounded_for, shifted, stack_floats, store_first
from compactdist.kernels.cpu.simd.slots import (
    ELEMENTS_AT,
    bytes_at,
    floats_at,
    next_part,
    own_room,
    shifted_floats,
)
from compactdist.kernels.cpu.simd.vectors import folded, magnitude, where, zeros
from compactdist.kernels.offsets import WIDTH
from compactdist.kernels.reference import LANES

_u32, _f32, _at = np.uint32, np.float32, np.uintp
_LARGEST = np.float32(3.4028234663852886e38)
_FIRST_PASS, _X, _OUT, _TERMS, _CODES = call.FIRST_PASS, call.X, call.OUT, call.TERMS, call.CODES
_U, _V, _RANK, _NUMBERS, _GAINS, _SQUARES = call.U, call.V, call.RANK, call.NUMBERS, call.GAINS, call.SQUARES
_LENGTH, _REFITS, _LEVELS, _SCALES, _NEAR = call.LENGTH, call.REFITS, call.LEVELS, call.SCALES, call.NEAR


def take_in(dtype: str) -> Any:
    """Rows of all groups: the residual, rounded to bfloat16, and the sum of its squares."""
    elements_at, rounded_at = ELEMENTS_AT[dtype], ELEMENTS_AT["bfloat16"]

    def body(args: Any) -> int:
        row_at, (chunk_at, chunk_from, chunk_len, chunks), _, channels, numel, _ = offsets_in(args)
        given, outs, squares = source_of(args, elements_at), rounded_at(args, _OUT), floats_at(args, _SQUARES)
        lo, hi = next_part(args, _FIRST_PASS)
        while lo < hi:
            for row in range(lo, hi):
                lanes = zeros()
                for k in range(chunks):
                    n, o, at = chunk_len[k], row * channels + chunk_at[k], row_at[row] + chunk_from[k]
                    for j in range(0, n, LANES):
                        value = residual_at(given, at + j, min(n, numel - at) - j)
                        lanes = lanes + value * value
                        store_first(rounded_for(outs, value), outs, o + j, n - j)
                squares[row] = folded(lanes)
            lo, hi = next_part(args, _FIRST_PASS)
        return 0

    return body


def add_product(dtype: str) -> Any:
    """Rows of all groups: ``out = base + velocity + gain * (u.T @ v)``; with -1 terms the product alone, float32.

    Components in ascending order, four at a time so that a partial sum is loaded and stored once for all four. The
    number that the loop takes is what a sum must reach not to count as zero.
    """
    elements_at = ELEMENTS_AT[dtype]

    def body(args: Any) -> int:
        row_at, (chunk_at, chunk_from, chunk_len, chunks), rows, channels, numel, _ = offsets_in(args)
        rank, terms, smallest = args[_RANK], args[_TERMS], floats_at(args, _NUMBERS)[0]
        given, outs, summed = source_of(args, elements_at), elements_at(args, _OUT), stack_floats(WIDTH)
        lo, hi = next_part(args, _FIRST_PASS)
        while lo < hi:
            for chunk in range(chunks):
                width, start = chunk_len[chunk], chunk_from[chunk]
                for row in range(lo, hi):
                    group = row // rows
                    # of the row in u and of the chunk in v: the component's number is yet to be multiplied and added
                    u = shifted_floats(floats_at(args, _U), group * (rank - 1) * rows + row)
                    v = shifted_floats(floats_at(args, _V), group * rank * channels + chunk_at[chunk])
                    _sum_up(summed, u, v, rank, rows, channels, width)
                    gain, at = floats_at(args, _GAINS)[group], row_at[row] + start
                    for j in range(0, width, LANES):
                        s, have = load_first(summed, j, width - j), min(width, numel - at) - j
                        s = where(magnitude(s) >= smallest, s, zeros()) * gain
                        s = where(s > _LARGEST, _LARGEST, s)
                        s = where(s < -_LARGEST, -_LARGEST, s)
                        if terms < 0:
                            store_first(rounded_for(outs, s), outs, at + j, have)
                        else:
                            put(expected_at(given, at + j, have), s, (outs, False), at + j, have)
            lo, hi = next_part(args, _FIRST_PASS)
        return 0

    return body


@inlined
def _sum_up(sums: Any, u: Any, v: Any, rank: int, rows: int, channels: int, width: int) -> None:
    a = u[0]
    for j in range(width):
        sums[_at(j)] = a * v[_at(j)]
    k = 1
    while k + 4 <= rank:
        a, b, c, d = u[k * rows], u[(k + 1) * rows], u[(k + 2) * rows], u[(k + 3) * rows]
        v_a, v_b = shifted_floats(v, k * channels), shifted_floats(v, (k + 1) * channels)
        v_c, v_d = shifted_floats(v, (k + 2) * channels), shifted_floats(v, (k + 3) * channels)
        for j in range(width):
            s = sums[_at(j)] + a * v_a[_at(j)]
            s = s + b * v_b[_at(j)]
            s = s + c * v_c[_at(j)]
            sums[_at(j)] = s + d * v_d[_at(j)]
        k += 4
    while k < rank:
        a, v_a = u[k * rows], shifted_floats(v, k * channels)
        for j in range(width):
            sums[_at(j)] += a * v_a[_at(j)]
        k += 1


def fit_levels(count: int) -> Any:
    """Rows of a factor: nearest magnitudes and their least-squares scale, in turn, as ``factors._fit`` says.

    The numbers that the loop takes: what an element must reach not to count as zero, sigma in mean magnitudes, the
    ``count`` borders, and the magnitudes between them. ``RANK`` is added to the codes of negative elements.
    """
    levels_at, level_count = 2 + count, count + 1

    def body(args: Any) -> int:
        length, refits, negative = args[_LENGTH], args[_REFITS], _u32(args[_RANK])
        numbers, factors, all_codes = floats_at(args, _NUMBERS), floats_at(args, _X), bytes_at(args, _CODES)
        smallest, sigma = numbers[0], numbers[1]
        borders, magnitudes = floats_from(numbers, 2, count), floats_from(numbers, levels_at, level_count)
        size = own_room(args, _FIRST_PASS)
        products, squares = shifted_floats(size, length), shifted_floats(size, 2 * length)
        lo, hi = next_part(args, _FIRST_PASS)
        while lo < hi:
            for row in range(lo, hi):
                factor = shifted_floats(factors, row * length)
                largest = _f32(0)
                for j in range(length):
                    s = abs(factor[_at(j)])
                    s = s if s >= smallest else _f32(0)
                    size[_at(j)] = s
                    largest = max(largest, s)
                exponent = min(max(254 - np.int64(_f32(largest).view(_u32) >> _u32(23)), 1), 254)
                power = _u32(exponent << 23).view(_f32)
                floats_at(args, _NEAR)[row] = power
                for j in range(length):
                    s = size[_at(j)] * power
                    size[_at(j)] = s
                    squares[_at(j)] = s * s
                    products[_at(j)] = s
                fold(squares, length, 1)
                fold(products, length, 1)
                below = _f32(products[0] * sigma)
                c = squares[0] / below if below > _f32(0) else _f32(0)
                inverse = _f32(0)
                for _ in range(refits):
                    inverse = _f32(1) / c if c > _f32(0) else _f32(0)
                    for j in range(length):
                        s = size[_at(j)]
                        t = s * inverse
                        level = magnitudes[0]
                        for b in range(len(borders)):
                            level = magnitudes[b + 1] if t > borders[b] else level
                        products[_at(j)] = s * level
                        squares[_at(j)] = level * level
                    fold(squares, length, 1)
                    fold(products, length, 1)
                    c = products[0] / squares[0] if squares[0] > _f32(0) else _f32(0)
                codes = shifted(all_codes, row * length)
                levels = shifted_floats(floats_at(args, _LEVELS), row * length)
                for j in range(length):
                    t = size[_at(j)] * inverse
                    below_zero = factor[_at(j)] < _f32(0)
                    found = negative if below_zero else _u32(0)
                    level = magnitudes[0]
                    for b in range(len(borders)):
                        found = _u32(found + _u32(1)) if t > borders[b] else found
                        level = magnitudes[b + 1] if t > borders[b] else level
                    codes[_at(j)] = np.uint8(found)
                    levels[_at(j)] = -level if below_zero else level
                floats_at(args, _SCALES)[row] = c
            lo, hi = next_part(args, _FIRST_PASS)
        return 0

    return body
