"""One pass over the elements where each block has a scale: everything about a block happens while it is in the cache.

Blocks are the rows of a *place* (``cpu_loops.py``), consecutive in memory. They are coded in batches, so that what is
one value for a block, a chain of slow operations, is computed for several at a time. The arithmetic is that of
``scales.py`` for layouts of one row.

After a change in the files this one imports, touch it: Numba's cache on disk looks at this file's date only.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from compactdist.codecs.kernels.cpu_codes import look_up, nearest_index, nearest_step, pack, pack_signs
from compactdist.codecs.kernels.cpu_elements import (
    Array,
    Pointer,
    finish,
    inlined,
    jit,
    lane_product,
    lane_sum,
    largest_of,
    predict,
    subtract,
)
from compactdist.codecs.kernels.cpu_settle import gaussian, is_safe, over, storable
from compactdist.codecs.kernels.cpu_vectors import STACK_ELEMENTS, as_u32, data_of, stack_codes, stack_floats

_BATCH = 16
_USUAL = 128

_u32, _f32, _at = np.uint32, np.float32, np.uintp


@inlined
def _unsafe(stats: Pointer, count: int) -> Any:
    """Whether sums and squares of some block leave float32, or are not finite."""
    unsafe = 0
    for b in range(count):
        unsafe += 0 if is_safe(stats[_at(b)]) else 1
    return unsafe


@inlined
def _signs(
    source: Any, place: Any, limit: Any, lo: int, hi: int, packed: Array, scales: Array, bad: Array, out: Array, n: int
) -> None:
    x, base, velocity, terms = source
    numel = place[6]
    xs, bases, velocities, bytes_, outs = data_of(x), data_of(base), data_of(velocity), data_of(packed), data_of(out)
    values, expected, lanes, codes = stack_floats(), stack_floats(), stack_floats(), stack_codes()
    stats, step = stack_floats(), min(_BATCH, STACK_ELEMENTS // n)
    unsafe = 0  # not in ``bad`` until the end: all threads share its cache line
    for first in range(lo, hi, step):
        blocks, at = min(step, hi - first), first * n
        predict(bases, velocities, terms, at, numel, expected, blocks * n)
        subtract(xs, at, numel, expected, values, blocks * n)
        for b in range(blocks):
            stats[_at(b)] = lane_sum(values, b * n, n, lanes)
        unsafe += _unsafe(stats, blocks)
        pack_signs(values, blocks * n, bytes_, at, codes)
        for b in range(blocks):
            c, o = storable(stats[_at(b)] / _f32(n), False), _at(b * n)
            scales[first + b] = c
            for j in range(n):
                values[o + _at(j)] = c if values[o + _at(j)] >= _f32(0) else -c
        if out.size:
            finish(expected, values, limit, outs, at, numel, blocks * n)
    if unsafe:
        bad[0] = 1


@jit
def block_signs(
    source: Any, place: Any, limit: Any, lo: int, hi: int, packed: Array, scales: Array, bad: Array, out: Array
) -> None:
    """Blocks ``lo`` to ``hi``: sign codes, scales, and what the receiver makes of them; ``bad[0]`` for unsafe ones."""
    if place[5] == _USUAL:  # loops of a length that the compiler knows are a quarter faster
        _signs(source, place, limit, lo, hi, packed, scales, bad, out, _USUAL)
    else:
        _signs(source, place, limit, lo, hi, packed, scales, bad, out, place[5])


@inlined
def _nearest(
    source: Any,
    place: Any,
    bits: int,
    borders: Any,
    table: Array,
    widening: int,
    bound: Any,
    limit: Any,
    lo: int,
    hi: int,
    packed: Array,
    scales: Array,
    bad: Array,
    out: Array,
    n: int,
) -> None:
    x, base, velocity, terms = source
    numel = place[6]
    xs, bases, velocities, bytes_, outs = data_of(x), data_of(base), data_of(velocity), data_of(packed), data_of(out)
    values, expected, lanes, codes = stack_floats(), stack_floats(), stack_floats(), stack_codes()
    levels, every, length, sign = stack_floats(), data_of(table), _f32(n), _u32(len(borders) + 1)
    means, others, cs, step = stack_floats(), stack_floats(), stack_floats(), min(_BATCH, STACK_ELEMENTS // n)
    unsafe = 0  # not in ``bad`` until the end: all threads share its cache line
    for first in range(lo, hi, step):
        blocks, at = min(step, hi - first), first * n
        predict(bases, velocities, terms, at, numel, expected, blocks * n)
        subtract(xs, at, numel, expected, values, blocks * n)
        for b in range(blocks):
            means[_at(b)] = lane_sum(values, b * n, n, lanes)
            others[_at(b)] = lane_product(values, values, b * n, n, lanes)
        unsafe += _unsafe(means, blocks)
        for b in range(blocks):
            mean, energy = means[_at(b)], others[_at(b)]
            cs[_at(b)] = gaussian(energy, mean, length, bound, widening)
        for b in range(blocks):
            inverse, o = over(_f32(1), cs[_at(b)]), _at(b * n)
            for j in range(n):
                index = nearest_index(abs(values[o + _at(j)]) * inverse, borders)
                codes[o + _at(j)] = np.uint8(_u32(index | sign) if values[o + _at(j)] < _f32(0) else index)
        look_up(codes, every, blocks * n, levels)
        pack(codes, bits, blocks * n, bytes_, at)
        for b in range(blocks):
            means[_at(b)] = lane_product(values, levels, b * n, n, lanes)
            others[_at(b)] = lane_product(levels, levels, b * n, n, lanes)
        for b in range(blocks):
            fitted = storable(over(means[_at(b)], others[_at(b)]), False)
            cs[_at(b)] = fitted if cs[_at(b)] > _f32(0) else cs[_at(b)]
        for b in range(blocks):
            c, o = cs[_at(b)], _at(b * n)
            scales[first + b] = c
            for j in range(n):
                levels[o + _at(j)] = c * levels[o + _at(j)]
        if out.size:
            finish(expected, levels, limit, outs, at, numel, blocks * n)
    if unsafe:
        bad[0] = 1


@jit
def block_nearest(
    source: Any,
    place: Any,
    bits: int,
    borders: Any,
    table: Array,
    widening: int,
    bound: Any,
    limit: Any,
    lo: int,
    hi: int,
    packed: Array,
    scales: Array,
    bad: Array,
    out: Array,
) -> None:
    """The same for sign and magnitude; ``bound`` is what ``gaussian_scale`` holds c below, in mean magnitudes."""
    if place[5] == _USUAL:  # loops of a length that the compiler knows are a quarter faster
        _nearest(source, place, bits, borders, table, widening, bound, limit, lo, hi, packed, scales, bad, out, _USUAL)
    else:
        _nearest(
            source, place, bits, borders, table, widening, bound, limit, lo, hi, packed, scales, bad, out, place[5]
        )


@inlined
def _linear(
    source: Any,
    place: Any,
    largest: Any,
    limit: Any,
    lo: int,
    hi: int,
    packed: Array,
    scales: Array,
    bad: Array,
    out: Array,
    n: int,
) -> None:
    x, base, velocity, terms = source
    numel = place[6]
    xs, bases, velocities, bytes_, outs = data_of(x), data_of(base), data_of(velocity), data_of(packed), data_of(out)
    values, expected, cell, stats = stack_floats(), stack_floats(), stack_floats(), stack_floats()
    pattern, step = as_u32(values), min(_BATCH, STACK_ELEMENTS // n)
    unsafe = 0  # not in ``bad`` until the end: all threads share its cache line
    for first in range(lo, hi, step):
        blocks, at = min(step, hi - first), first * n
        predict(bases, velocities, terms, at, numel, expected, blocks * n)
        subtract(xs, at, numel, expected, values, blocks * n)
        for b in range(blocks):
            stats[_at(b)] = largest_of(pattern, b * n, n, cell)
        unsafe += _unsafe(stats, blocks)
        for b in range(blocks):
            c, o = storable(stats[_at(b)] / largest, True), _at(b * n)
            scales[first + b] = c
            inverse, p = over(_f32(1), c), _at(at) + o
            for j in range(n):
                value = values[o + _at(j)]
                steps = nearest_step(abs(value) * inverse, largest, value)
                bytes_[p + _at(j)] = np.uint8(np.int32(steps))
                values[o + _at(j)] = c * (steps + _f32(0))
        if out.size:
            finish(expected, values, limit, outs, at, numel, blocks * n)
    if unsafe:
        bad[0] = 1


@jit
def block_linear(
    source: Any,
    place: Any,
    largest: Any,
    limit: Any,
    lo: int,
    hi: int,
    packed: Array,
    scales: Array,
    bad: Array,
    out: Array,
) -> None:
    """The same for integers up to ``largest``."""
    if place[5] == _USUAL:  # loops of a length that the compiler knows are a quarter faster
        _linear(source, place, largest, limit, lo, hi, packed, scales, bad, out, _USUAL)
    else:
        _linear(source, place, largest, limit, lo, hi, packed, scales, bad, out, place[5])
