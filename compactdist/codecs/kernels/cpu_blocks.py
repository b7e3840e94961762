"""One pass over the elements where each block has a scale: everything about a block happens while it is in the cache.

Blocks are the rows of a *place* (``cpu_loops.py``), consecutive in memory. They are coded in batches, so that what is
one value for a block, a chain of slow operations, is computed for several at a time. The arithmetic is that of
``scales.py`` for layouts of one row. The width of codes is compiled in.

After a change in the files this one imports, touch it: Numba's cache on disk looks at this file's date only.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from compactdist.codecs.kernels.cpu_elements import Array, Pointer, inlined, jit
from compactdist.codecs.kernels.cpu_memory import (
    data_of,
    load_first,
    pointers_of,
    settle_streams,
    stack_floats,
    table_at,
)
from compactdist.codecs.kernels.cpu_packing import store_codes, store_mask
from compactdist.codecs.kernels.cpu_settle import NEAREST, SIGN, bf16_bits, gaussian, is_safe, over, storable
from compactdist.codecs.kernels.cpu_steps import (
    change_of,
    expected_at,
    nearest_codes,
    put,
    reaching,
    residual_at,
)
from compactdist.codecs.kernels.cpu_vectors import (
    as_floats,
    bits_of_magnitude,
    chosen,
    folded,
    lane_mask,
    larger,
    largest,
    magnitude,
    no_bits,
    table_of,
    where,
    zeros,
)
from compactdist.codecs.kernels.reference import LANES

_BATCH = 16

_f32 = np.float32


@inlined
def _unsafe(stats: Pointer, count: int) -> Any:
    """Whether sums and squares of some block leave float32, or are not finite."""
    unsafe = 0
    for b in range(count):
        unsafe += 0 if is_safe(stats[b]) else 1
    return unsafe


@inlined
def _for_block(step: Any, given: Any, at: int, n: int, numel: int, sums: Any) -> Any:
    """A step for every 64 of the ``n`` elements from ``at`` on. It gets what is given, the position, how many belong to
    the block from there on, how many of them are there, and the sums so far, and returns those to go on with.
    """
    have = min(n, numel - at)
    whole = max(have, 0) // LANES * LANES
    for j in range(0, whole, LANES):
        sums = step(given, at + j, LANES, LANES, sums)
    for j in range(whole, n, LANES):
        sums = step(given, at + j, n - j, have - j, sums)
    return sums


@inlined
def _restore(given: Any, at: int, count: int, have: int, scale: Any) -> Any:
    """What the receiver makes of codes."""
    source, target, packed, kind, bits, table = given
    change = change_of(kind, scale, packed, bits, table, at, count)
    put(expected_at(source, at, have), change, target, at, have)
    return scale


@inlined
def _signs(given: Any, at: int, count: int, have: int, lanes: Any) -> Any:
    source, packed = given
    value = residual_at(source, at, have)
    store_mask(value >= _f32(0), packed, at, count)
    return lanes + magnitude(value)


@inlined
def _moments(source: Any, at: int, count: int, have: int, sums: Any) -> Any:
    value = residual_at(source, at, have)
    return sums[0] + magnitude(value), sums[1] + value * value


@inlined
def _reach(source: Any, at: int, count: int, have: int, bits: Any) -> Any:
    return larger(bits, bits_of_magnitude(residual_at(source, at, have)))


@inlined
def _nearest(given: Any, at: int, count: int, have: int, sums: Any) -> Any:
    """Codes, and by lanes the sums for the fit of the scale to them."""
    source, packed, bits, borders, levels, inverse = given
    value = residual_at(source, at, have)
    codes = nearest_codes(magnitude(value) * inverse, value < _f32(0), borders, False)
    store_codes(codes, bits, packed, at, count)
    level = chosen(levels, codes)
    if count < LANES:
        level = where(lane_mask(count), level, zeros())
    return sums[0] + value * level, sums[1] + level * level


@inlined
def _reaching(given: Any, at: int, count: int, have: int, c: Any) -> Any:
    source, target, packed, inverse, kind, steps, stores = given
    expected = expected_at(source, at, have)
    value = load_first(source[0], at, have) - expected
    codes, change = reaching(kind, value * inverse, value < _f32(0), c, steps)
    store_codes(codes, 8, packed, at, count)
    if stores:
        put(expected, change, target, at, have)
    return c


@jit
def block_signs(
    lo: int, hi: int, source: Any, place: Any, packed: Array, stored: Array, bad: Array, out: Array, streams: bool
) -> None:
    """Blocks ``lo`` to ``hi``: sign codes, scales, and what the receiver makes of them; ``bad[0]`` for unsafe ones."""
    given, bytes_, target = pointers_of(source), data_of(packed), (data_of(out), streams)
    n, numel, stats, cs, table = place[5], place[6], stack_floats(), stack_floats(), table_of((_f32(0),))
    unsafe = 0  # not in ``bad`` until the end: all threads share its cache line
    for first in range(lo, hi, _BATCH):
        blocks = min(_BATCH, hi - first)
        for b in range(blocks):
            stats[b] = folded(_for_block(_signs, (given, bytes_), (first + b) * n, n, numel, zeros()))
        unsafe += _unsafe(stats, blocks)
        for b in range(blocks):
            cs[b] = storable(stats[b] / _f32(n), False)
            stored[first + b] = bf16_bits(cs[b])
        for b in range(blocks if out.size else 0):
            codes = given, target, bytes_, SIGN, 1, table
            _for_block(_restore, codes, (first + b) * n, n, numel, as_floats(cs[b]))
    settle_streams()
    if unsafe:
        bad[0] = 1


@cache
def block_nearest(bits: int) -> Any:
    """The same for sign and magnitude; ``bound`` is what ``gaussian_scale`` holds c below, in mean magnitudes."""

    @jit
    def loop(
        lo: int,
        hi: int,
        source: Any,
        place: Any,
        packed: Array,
        stored: Array,
        bad: Array,
        out: Array,
        streams: bool,
        borders: Any,
        table: Array,
        widening: int,
        bound: Any,
    ) -> None:
        given, bytes_, target = pointers_of(source), data_of(packed), (data_of(out), streams)
        n, numel, means, others, levels = (
            place[5],
            place[6],
            stack_floats(),
            stack_floats(),
            table_at(data_of(table), 0),
        )
        cs, unsafe = stack_floats(), 0
        for first in range(lo, hi, _BATCH):
            blocks = min(_BATCH, hi - first)
            for b in range(blocks):
                lanes, squares = _for_block(_moments, given, (first + b) * n, n, numel, (zeros(), zeros()))
                means[b], others[b] = folded(lanes), folded(squares)
            unsafe += _unsafe(means, blocks)
            for b in range(blocks):
                cs[b] = gaussian(others[b], means[b], _f32(n), bound, widening)
            for b in range(blocks):
                codes = given, bytes_, bits, borders, levels, over(_f32(1), cs[b])
                lanes, squares = _for_block(_nearest, codes, (first + b) * n, n, numel, (zeros(), zeros()))
                means[b], others[b] = folded(lanes), folded(squares)
            for b in range(blocks):
                fitted = storable(over(means[b], others[b]), False)
                cs[b] = fitted if cs[b] > _f32(0) else cs[b]
                stored[first + b] = bf16_bits(cs[b])
            for b in range(blocks if out.size else 0):
                found = given, target, bytes_, NEAREST, bits, levels
                _for_block(_restore, found, (first + b) * n, n, numel, as_floats(cs[b]))
        settle_streams()
        if unsafe:
            bad[0] = 1

    return loop


@cache
def block_reaching(kind: int) -> Any:
    """The same for integers and for float8, the largest of them ``steps``."""

    @jit
    def loop(
        lo: int,
        hi: int,
        source: Any,
        place: Any,
        packed: Array,
        stored: Array,
        bad: Array,
        out: Array,
        streams: bool,
        steps: Any,
    ) -> None:
        given, bytes_, target = pointers_of(source), data_of(packed), (data_of(out), streams)
        n, numel, stats, cs = place[5], place[6], stack_floats(), stack_floats()
        unsafe = 0
        for first in range(lo, hi, _BATCH):
            blocks = min(_BATCH, hi - first)
            for b in range(blocks):
                stats[b] = largest(_for_block(_reach, given, (first + b) * n, n, numel, no_bits()))
            unsafe += _unsafe(stats, blocks)
            for b in range(blocks):
                cs[b] = storable(stats[b] / steps, True)
                stored[first + b] = bf16_bits(cs[b])
            for b in range(blocks):
                codes = given, target, bytes_, over(_f32(1), cs[b]), kind, steps, out.size > 0
                _for_block(_reaching, codes, (first + b) * n, n, numel, as_floats(cs[b]))
        settle_streams()
        if unsafe:
            bad[0] = 1

    return loop
