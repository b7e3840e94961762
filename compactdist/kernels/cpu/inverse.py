"""The inverse of the transform codec, compiled by Numba for processors that multiply bytes (VNNI).

Levels times weights, scaled, added to the prediction and put out, some rows at a time: what is between stays in caches.

A weight has two limbs of 8 bits. Their sums are whole numbers, so the result has the bits of the float32 products.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from compactdist.kernels.cpu import call
from compactdist.kernels.cpu.elements import expected_at, put, source_of
from compactdist.kernels.cpu.rows import offsets_in
from compactdist.kernels.cpu.simd.dots import above_128, dotted, quads_of, words_of
from compactdist.kernels.cpu.simd.ints import as_whole_floats, nearest_ints, no_bits
from compactdist.kernels.cpu.simd.jit import inlined
from compactdist.kernels.cpu.simd.memory import load, load_first, store
from compactdist.kernels.cpu.simd.packing import codes_at
from compactdist.kernels.cpu.simd.slots import (
    ELEMENTS_AT,
    bytes_at,
    floats_at,
    longs_at,
    next_part,
    own_room,
    shifted_floats,
    words_at,
)
from compactdist.kernels.cpu.simd.vectors import zeros
from compactdist.kernels.reference import LANES

_f32 = np.float32
_HEIGHT = call.HEIGHT
_FIRST_PASS, _OUT, _CODES, _ROWS, _COMPONENTS = call.FIRST_PASS, call.OUT, call.CODES, call.ROWS, call.COMPONENTS
_BLOCKS, _QUADS, _STARTS = call.PLANES, call.DEPTHS, call.PLACES
_WEIGHTS, _CORRECTIONS, _UNITS, _ROW_SCALES = call.TURNED, call.STEPS, call.INVERSES, call.ROW_SCALES


@inlined
def _limbs_at(weights: Any, k: int, last: int, width: int, s: int) -> Any:
    """Of sixty-four weights of a component: 128 times the first limb plus the second is the weight."""
    if k >= last:
        return no_bits(), no_bits()
    weight = load_first(weights, k * width + s, width - s)
    upper = nearest_ints(weight * _f32(0.0078125))
    return upper, nearest_ints(weight - as_whole_floats(upper) * _f32(128))


def pack() -> Any:
    """Blocks: weights as bytes, four components to a word, of all channels the upper limbs, then the lower ones; and
    what takes the 128 away again that is added to each level.
    """

    def body(args: Any) -> int:
        width, quads, starts, given = args[_COMPONENTS], args[_QUADS], longs_at(args, _STARTS), floats_at(args, _UNITS)
        words, corrections = words_at(args, _WEIGHTS), words_at(args, _CORRECTIONS)
        limb = (width + LANES - 1) // LANES * LANES
        lo, hi = next_part(args, _FIRST_PASS)
        while lo < hi:
            for b in range(lo, hi):
                first, last = starts[b], starts[b + 1]
                for s in range(0, width, LANES):
                    upper, lower = zeros(), zeros()
                    for q in range((last - first + 3) // 4):
                        k, at = first + 4 * q, (b * quads + q) * 2 * limb + s
                        a, e = _limbs_at(given, k, last, width, s)
                        b2, f = _limbs_at(given, k + 1, last, width, s)
                        c, g = _limbs_at(given, k + 2, last, width, s)
                        d, h = _limbs_at(given, k + 3, last, width, s)
                        store(quads_of(a, b2, c, d), words, at)
                        store(quads_of(e, f, g, h), words, at + limb)
                        upper = upper + (as_whole_floats(a) + as_whole_floats(b2))
                        upper = upper + (as_whole_floats(c) + as_whole_floats(d))
                        lower = lower + (as_whole_floats(e) + as_whole_floats(f))
                        lower = lower + (as_whole_floats(g) + as_whole_floats(h))
                    store(nearest_ints(upper * _f32(-128)), corrections, 2 * b * limb + s)
                    store(nearest_ints(lower * _f32(-128)), corrections, (2 * b + 1) * limb + s)
            lo, hi = next_part(args, _FIRST_PASS)
        return 0

    return body


@inlined
def _take_levels(args: Any, r: int, out: Any) -> None:
    """Levels of sixty-four rows from ``r`` on: a word holds four components of a row."""
    rows, quads, levels, starts = args[_ROWS], args[_QUADS], bytes_at(args, _CODES), longs_at(args, _STARTS)
    for b in range(args[_BLOCKS]):
        first, last = starts[b], starts[b + 1]
        for q in range((last - first + 3) // 4):
            k, count = first + 4 * q, rows - r
            one = codes_at(levels, 8, k * rows + r, count)
            two = codes_at(levels, 8, (k + 1) * rows + r, count) if k + 1 < last else no_bits()
            three = codes_at(levels, 8, (k + 2) * rows + r, count) if k + 2 < last else no_bits()
            four = codes_at(levels, 8, (k + 3) * rows + r, count) if k + 3 < last else no_bits()
            store(above_128(quads_of(one, two, three, four)), out, (b * quads + q) * LANES)


@inlined
def _multiply(args: Any, levels: Any, top: int, height: int, out: Any, pitch: int) -> None:
    """Products of some rows, times the units of their channels; two rows and sixty-four channels at a time."""
    width, quads, starts, units = args[_COMPONENTS], args[_QUADS], longs_at(args, _STARTS), floats_at(args, _UNITS)
    weights, corrections = words_at(args, _WEIGHTS), words_at(args, _CORRECTIONS)
    limb = (width + LANES - 1) // LANES * LANES
    for b in range(args[_BLOCKS]):
        count = (starts[b + 1] - starts[b] + 3) // 4
        for s in range(0, width, LANES):
            unit = load_first(units, b * width + s, width - s)
            for r in range(top, top + height, 2):
                high, low = load(corrections, 2 * b * limb + s), load(corrections, (2 * b + 1) * limb + s)
                next_high, next_low = high, low
                for q in range(count):
                    at, o = (b * quads + q) * 2 * limb + s, (b * quads + q) * LANES + r
                    upper, lower = load(weights, at), load(weights, at + limb)
                    one, two = levels[o], levels[o + 1]
                    high, low = dotted(high, one, upper), dotted(low, one, lower)
                    next_high, next_low = dotted(next_high, two, upper), dotted(next_low, two, lower)
                to = (r - top) * pitch + b * width + s
                store((as_whole_floats(high) * _f32(128) + as_whole_floats(low)) * unit, out, to)
                store((as_whole_floats(next_high) * _f32(128) + as_whole_floats(next_low)) * unit, out, to + pitch)


def put_out(dtype: str) -> Any:
    """Runs of sixty-four rows of a group."""
    elements_at = ELEMENTS_AT[dtype]

    def body(args: Any) -> int:
        row_at, (chunk_at, chunk_from, chunk_len, chunks), rows, _, numel, _ = offsets_in(args)
        given, outs, scales = source_of(args, elements_at), elements_at(args, _OUT), floats_at(args, _ROW_SCALES)
        own, width, blocks = own_room(args, _FIRST_PASS), args[_COMPONENTS], args[_BLOCKS]
        levels, products = words_of(own), shifted_floats(own, blocks * args[_QUADS] * LANES)
        pitch = (blocks - 1) * width + (width + LANES - 1) // LANES * LANES
        lo, hi = next_part(args, _FIRST_PASS)
        while lo < hi:
            for start in range(lo * LANES, min(hi * LANES, rows), _HEIGHT):
                if start % LANES == 0:
                    _take_levels(args, start, levels)
                height = min(_HEIGHT, rows - start)
                _multiply(args, levels, start % LANES, height, products, pitch)
                for row in range(start, start + height):
                    for k in range(chunks):
                        n, at, o = chunk_len[k], row_at[row] + chunk_from[k], (row - start) * pitch + chunk_at[k]
                        for j in range(0, n, LANES):
                            have = min(n, numel - at) - j
                            change = load_first(products, o + j, n - j) * scales[row]
                            put(expected_at(given, at + j, have), change, (outs, False), at + j, have)
            lo, hi = next_part(args, _FIRST_PASS)
        return 0

    return body
