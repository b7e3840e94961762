"""The loops of the transform codec, compiled by Numba: take in residuals, choose levels and pack planes of bits, read
them, and put out scaled products. What both ends compute has the bits of ``reference/components.py``.

Levels need no table look-up: a code counts borders, and each border that is passed adds a step to the level.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from compactdist.kernels.cpu import call
from compactdist.kernels.cpu.elements import expected_at, put, residual_at, source_of
from compactdist.kernels.cpu.rows import offsets_in
from compactdist.kernels.cpu.simd.ints import nearest_ints
from compactdist.kernels.cpu.simd.jit import inlined
from compactdist.kernels.cpu.simd.memory import load_first, rounded_for, shifted, store_first
from compactdist.kernels.cpu.simd.packing import mask_at, store_codes, store_mask
from compactdist.kernels.cpu.simd.slots import (
    ELEMENTS_AT,
    bytes_at,
    floats_at,
    longs_at,
    next_part,
    shifted_floats,
)
from compactdist.kernels.cpu.simd.vectors import folded, where, zeros
from compactdist.kernels.reference import LANES
from compactdist.kernels.reference.components import STRIDE

_f32 = np.float32
_FIRST_PASS, _OUT, _CODES, _ROWS = call.FIRST_PASS, call.OUT, call.CODES, call.ROWS
_COMPONENTS, _PLACES, _DEPTHS, _PLANES = call.COMPONENTS, call.PLACES, call.DEPTHS, call.PLANES
_STEPS, _TURNED, _ROW_SCALES, _ROW_INVERSES = call.STEPS, call.TURNED, call.ROW_SCALES, call.ROW_INVERSES
_INVERSES, _ENERGIES, _AGREEMENTS = call.INVERSES, call.ENERGIES, call.AGREEMENTS


def take_in(dtype: str, kept: str) -> Any:
    """Rows of all groups: the residual in the dtype it is ``kept`` in, zeros beyond the channels, and the sum of its
    squares before it was rounded to that.
    """
    elements_at, kept_at = ELEMENTS_AT[dtype], ELEMENTS_AT[kept]

    def body(args: Any) -> int:
        row_at, (chunk_at, chunk_from, chunk_len, chunks), _, channels, numel, _ = offsets_in(args)
        given, out, squares = source_of(args, elements_at), kept_at(args, _TURNED), floats_at(args, _ENERGIES)
        width = args[_COMPONENTS]
        lo, hi = next_part(args, _FIRST_PASS)
        while lo < hi:
            for row in range(lo, hi):
                lanes = zeros()
                for j in range(
                    channels, width, LANES
                ):  # a plain loop would become a call of memset, which is not linked
                    store_first(rounded_for(out, zeros()), out, row * width + j, width - j)
                for k in range(chunks):
                    n, o, at = chunk_len[k], row * width + chunk_at[k], row_at[row] + chunk_from[k]
                    for j in range(0, n, LANES):
                        value = residual_at(given, at + j, min(n, numel - at) - j)
                        lanes = lanes + value * value
                        store_first(rounded_for(out, value), out, o + j, n - j)
                squares[row] = folded(lanes)
            lo, hi = next_part(args, _FIRST_PASS)
        return 0

    return body


@inlined
def _chosen(deviation: Any, steps: Any, depth: int) -> Any:
    """Code, as a float, and level: how many borders are at most the deviation, and the steps they add up to."""
    code, level = zeros(), zeros() + steps[STRIDE]
    for b in range((1 << depth) - 1):
        border = steps[b]
        code = code + where(deviation >= border, _f32(1), zeros())
        level = level + where(deviation >= border, steps[STRIDE + 1 + b], zeros())
    return code, level


def choose(kept: str) -> Any:
    """Components with bits: their planes, their levels, and of levels times rows' scales the sums of squares and of
    products with the components.
    """
    kept_at = ELEMENTS_AT[kept]

    def body(args: Any) -> int:
        rows, planes, out = args[_ROWS], bytes_at(args, _CODES), bytes_at(args, _OUT)
        scales, inverses = floats_at(args, _ROW_SCALES), floats_at(args, _ROW_INVERSES)
        places, depths, first_planes = longs_at(args, _PLACES), longs_at(args, _DEPTHS), longs_at(args, _PLANES)
        stride = (rows + 7) // 8 * 8
        lo, hi = next_part(args, _FIRST_PASS)
        while lo < hi:
            for k in range(lo, hi):
                depth, plane, inverse = depths[k], first_planes[k], floats_at(args, _INVERSES)[k]
                given = shifted(kept_at(args, _TURNED), places[k] * rows)
                steps = shifted_floats(floats_at(args, _STEPS), depth * 2 * STRIDE)
                energy, agreement = zeros(), zeros()
                for r in range(0, rows, LANES):
                    count = rows - r
                    value, scale = load_first(given, r, count), load_first(scales, r, count)
                    if depth == 1:
                        code = where(value >= _f32(0), _f32(1), zeros())
                        level = where(value >= _f32(0), _f32(127), zeros() - _f32(127))
                    else:
                        code, level = _chosen((value * inverse) * load_first(inverses, r, count), steps, depth)
                    if count < LANES:  # bits of rows that are not there are 0
                        code = code * load_first(floats_at(args, _STEPS), 0, count)
                    size = (min(count, LANES) + 7) // 8 * 8
                    for bit in range(depth - 1, -1, -1):
                        half = _f32(1 << bit)
                        mask = code >= half
                        store_mask(mask, planes, (plane + bit) * stride + r, size)
                        code = where(mask, code - half, code)
                    store_codes(nearest_ints(level), -8, out, k * rows + r, count)
                    level = level * scale
                    energy, agreement = energy + level * level, agreement + level * value
                floats_at(args, _ENERGIES)[k] = folded(energy)
                floats_at(args, _AGREEMENTS)[k] = folded(agreement)
            lo, hi = next_part(args, _FIRST_PASS)
        return 0

    return body


def read() -> Any:
    """Components with bits: their levels, from the planes."""

    def body(args: Any) -> int:
        rows, planes, out = args[_ROWS], bytes_at(args, _CODES), bytes_at(args, _OUT)
        depths, first_planes = longs_at(args, _DEPTHS), longs_at(args, _PLANES)
        stride = (rows + 7) // 8 * 8
        lo, hi = next_part(args, _FIRST_PASS)
        while lo < hi:
            for k in range(lo, hi):
                depth, plane = depths[k], first_planes[k]
                steps = shifted_floats(floats_at(args, _STEPS), depth * 2 * STRIDE)
                for r in range(0, rows, LANES):
                    count = rows - r
                    size, at = (min(count, LANES) + 7) // 8 * 8, plane * stride + r
                    if depth == 1:
                        level = where(mask_at(planes, at, size), _f32(127), zeros() - _f32(127))
                    else:
                        code, level = zeros(), zeros() + steps[STRIDE]
                        for bit in range(depth):
                            mask = mask_at(planes, at + bit * stride, size)
                            code = code + where(mask, _f32(1 << bit), zeros())
                        for b in range((1 << depth) - 1):
                            level = level + where(code > _f32(b), steps[STRIDE + 1 + b], zeros())
                    store_codes(nearest_ints(level), -8, out, k * rows + r, count)
            lo, hi = next_part(args, _FIRST_PASS)
        return 0

    return body


@inlined
def _squared(given: Any, at: int, left: int) -> Any:
    value = load_first(given, at, left - at)
    return value * value


def weigh(kept: str) -> Any:
    """Runs of 256 rows, half a page of a component: the sums of squares of chosen components times their weights."""
    kept_at = ELEMENTS_AT[kept]

    def body(args: Any) -> int:
        rows, count, out = args[_ROWS], args[_COMPONENTS], floats_at(args, _OUT)
        places, weights = longs_at(args, _PLACES), floats_at(args, _INVERSES)
        lo, hi = next_part(args, _FIRST_PASS)
        while lo < hi:
            for run in range(lo, hi):
                r, a, b, c, d = run * 4 * LANES, zeros(), zeros(), zeros(), zeros()
                for k in range(count):
                    given, left, weight = shifted(kept_at(args, _TURNED), places[k] * rows + r), rows - r, weights[k]
                    a = a + _squared(given, 0, left) * weight
                    b = b + _squared(given, LANES, left) * weight
                    c = c + _squared(given, 2 * LANES, left) * weight
                    d = d + _squared(given, 3 * LANES, left) * weight
                store_first(a, out, r, rows - r)
                store_first(b, out, r + LANES, rows - r - LANES)
                store_first(c, out, r + 2 * LANES, rows - r - 2 * LANES)
                store_first(d, out, r + 3 * LANES, rows - r - 3 * LANES)
            lo, hi = next_part(args, _FIRST_PASS)
        return 0

    return body


def put_out(dtype: str) -> Any:
    """Rows of all groups: the sum of the terms, plus products times their channel's unit times their row's scale."""
    elements_at = ELEMENTS_AT[dtype]

    def body(args: Any) -> int:
        row_at, (chunk_at, chunk_from, chunk_len, chunks), rows, _, numel, _ = offsets_in(args)
        given, outs, products = source_of(args, elements_at), elements_at(args, _OUT), floats_at(args, _TURNED)
        width, scales = args[_COMPONENTS], floats_at(args, _ROW_SCALES)
        lo, hi = next_part(args, _FIRST_PASS)
        while lo < hi:
            for row in range(lo, hi):
                units, scale = shifted_floats(floats_at(args, _INVERSES), row // rows * width), scales[row]
                for k in range(chunks):
                    n, at = chunk_len[k], row_at[row] + chunk_from[k]
                    from_unit, o = chunk_at[k], row * width + chunk_at[k]
                    for j in range(0, n, LANES):
                        have = min(n, numel - at) - j
                        product = load_first(products, o + j, n - j) + _f32(0)  # not -0, see codecs/transform/ends.py
                        value = product * load_first(units, from_unit + j, n - j)
                        put(expected_at(given, at + j, have), value * scale, (outs, False), at + j, have)
            lo, hi = next_part(args, _FIRST_PASS)
        return 0

    return body
