"""One pass over the elements where each block has a scale: everything about a block happens while it is in the cache.

Blocks are the rows of a *place* (``cpu_loops.py``), consecutive in memory. They are coded in batches, so that what is
one value for a block, a chain of slow operations, is computed for several at a time. Residuals are kept from one step
over a batch to the next. The arithmetic is that of ``scales.py`` for layouts of one row. The width of codes, and
whether there is just ``one`` term, is compiled in.

After a change in the files this one imports, touch it: Numba's cache on disk looks at this file's date only.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from compactdist.codecs.kernels.cpu_elements import Array, Pointer, inlined, jit
from compactdist.codecs.kernels.cpu_memory import (
    data_of,
    load,
    pointers_of,
    settle_streams,
    shifted,
    sixteen_at,
    stack_floats,
    store,
)
from compactdist.codecs.kernels.cpu_packing import mask_at, store_codes, store_mask
from compactdist.codecs.kernels.cpu_settle import LINEAR, gaussian, is_safe, over, storable
from compactdist.codecs.kernels.cpu_sixteen import (
    COUNT,
    both,
    choose,
    everywhere,
    fold_in,
    folded_rows,
    store_bf16,
    store_sixteen,
)
from compactdist.codecs.kernels.cpu_steps import (
    ask_for_expected,
    ask_for_x,
    expected_at,
    nearest_codes,
    put,
    reaching,
    residual_at,
    search_of,
)
from compactdist.codecs.kernels.cpu_vectors import (
    as_floats,
    bits_of_magnitude,
    chosen,
    lane_mask,
    larger,
    magnitude,
    negative,
    no_bits,
    where,
    zeros,
)
from compactdist.codecs.kernels.reference import LANES

_KEPT = 2048
"""Elements of a batch, unless one block is more: with base and new base they fit the first cache."""

_AHEAD, _AHEAD_OF_LAST = _KEPT + _KEPT // 2, 2 * _KEPT + _KEPT // 2
"""Elements between those of this batch, or of the last one, and those that are asked for: half of the next batch is
there when it begins. Asking for x and base in different steps keeps memory at work in both.
"""

_f32 = np.float32


def kept_for(block: int) -> int:
    """Elements of the buffer that a loop over blocks of this length keeps residuals in."""
    return 2 * max(_KEPT, -(-block // LANES) * LANES)


@inlined
def _source_of(source: Any, one: bool) -> Any:
    x, base, velocity, terms = pointers_of(source)
    return x, base, velocity, 1 if one else terms


@inlined
def _batch(n: int) -> Any:
    """Elements between the kept blocks of a batch, and how many blocks there are at most."""
    stride = (n + LANES - 1) // LANES * LANES
    return stride, min(max(_KEPT // stride, 1), COUNT)


@inlined
def _for_block(step: Any, given: Any, at: int, kept: int, n: int, numel: int, sums: Any) -> Any:
    """A step for every 64 of the ``n`` elements from ``at`` on. It gets what is given, the position, that of what is
    kept, how many belong to the block from there on, how many of them are there, and the sums so far, and returns
    those to go on with.
    """
    have = min(n, numel - at)
    whole = max(have, 0) // LANES * LANES
    for j in range(0, whole, LANES):
        sums = step(given, at + j, kept + j, LANES, LANES, sums)
    for j in range(whole, n, LANES):
        sums = step(given, at + j, kept + j, n - j, have - j, sums)
    return sums


@inlined
def _signs(given: Any, at: int, kept: int, count: int, have: int, lanes: Any) -> Any:
    source, packed = given
    ask_for_x(source, at + _AHEAD)
    value = residual_at(source, at, have)
    store_mask(value >= _f32(0), packed, at, count)
    return lanes + magnitude(value)


@inlined
def _restore_signs(given: Any, at: int, kept: int, count: int, have: int, scale: Any) -> Any:
    source, target, packed = given
    ask_for_expected(source, at + _AHEAD_OF_LAST)
    change = where(mask_at(packed, at, count), scale, negative(scale))
    put(expected_at(source, at, have), change, target, at, have)
    return scale


@inlined
def _moments(given: Any, at: int, kept: int, count: int, have: int, sums: Any) -> Any:
    source, values = given
    value = residual_at(source, at, have)
    store(value, values, kept)
    return sums[0] + magnitude(value), sums[1] + value * value


@inlined
def _nearest(given: Any, at: int, kept: int, count: int, have: int, sums: Any) -> Any:
    """Codes, levels in the place of residuals, and by lanes the sums for the fit of the scale to them."""
    source, values, packed, bits, search, levels, inverse = given
    ask_for_x(source, at + _AHEAD)
    value = load(values, kept)
    codes = nearest_codes(value, magnitude(value) * inverse, search, False)
    store_codes(codes, bits, packed, at, count)
    level = chosen(levels, codes)
    if count < LANES:
        level = where(lane_mask(count), level, zeros())
    store(level, values, kept)
    return sums[0] + value * level, sums[1] + level * level


@inlined
def _restore_levels(given: Any, at: int, kept: int, count: int, have: int, scale: Any) -> Any:
    source, target, values = given
    ask_for_expected(source, at + _AHEAD_OF_LAST)
    put(expected_at(source, at, have), scale * load(values, kept), target, at, have)
    return scale


@inlined
def _reach(given: Any, at: int, kept: int, count: int, have: int, bits: Any) -> Any:
    source, values = given
    ask_for_x(source, at + _AHEAD)
    value = residual_at(source, at, have)
    store(value, values, kept)
    return larger(bits, bits_of_magnitude(value))


@inlined
def _reaching(given: Any, at: int, kept: int, count: int, have: int, c: Any) -> Any:
    source, target, stores, packed, values, inverse, kind = given
    ask_for_expected(source, at + _AHEAD_OF_LAST)
    value = load(values, kept)
    codes, change = reaching(kind, value * inverse, value < _f32(0), c)
    store_codes(codes, -8 if kind == LINEAR else 8, packed, at, count)
    if stores:
        put(expected_at(source, at, have), change, target, at, have)
    return c


@inlined
def _state_of(kept: Array, room: Pointer) -> Any:
    """Two buffers of what is kept, and of scales: those of this batch and of the last one, in turn."""
    for at in range(0, COUNT * COUNT, LANES):
        store(zeros(), room, at)  # rows of blocks that there are not
    values, cs = data_of(kept), stack_floats(32)
    return (values, cs), (shifted(values, kept.size // 2), shifted(cs, COUNT))


@cache
def block_signs(one: bool) -> Any:
    """For blocks ``lo`` to ``hi``: sign codes, scales, and what the receiver makes of them; ``bad[0]`` for unsafe ones.

    ``kept`` is a buffer of ``kept_for``.
    """

    @inlined
    def restore(given: Any, first: int, blocks: int, size: Any, state: Any) -> None:
        n, numel, _ = size
        for b in range(blocks):
            _for_block(_restore_signs, given, (first + b) * n, 0, n, numel, as_floats(state[1][b]))

    @jit
    def loop(
        lo: int,
        hi: int,
        kept: Array,
        source: Any,
        place: Any,
        packed: Array,
        stored: Array,
        bad: Array,
        out: Array,
        streams: bool,
    ) -> None:
        given, bytes_, scales = _source_of(source, one), data_of(packed), data_of(stored)
        codes, room = (given, (data_of(out), streams), bytes_), stack_floats(256)
        n, numel, (stride, most) = place[5], place[6], _batch(place[5])
        this, other = _state_of(kept, room)
        size, before = (n, numel, stride), 0
        safe = is_safe(folded_rows(room, False))  # not in ``bad`` until the end: all threads share its cache line
        for first in range(lo, hi, most):
            blocks = min(most, hi - first)
            for b in range(blocks):
                fold_in(_for_block(_signs, (given, bytes_), (first + b) * n, 0, n, numel, zeros()), room, b)
            means = folded_rows(room, False)
            safe, c = both(safe, is_safe(means)), storable(means / _f32(n), False)
            store_sixteen(c, this[1])
            store_bf16(c, scales, first, blocks)
            this, other = other, this
            restore(codes, first - before, before, size, this)
            before = blocks if out.size else 0
        restore(codes, hi - before, before, size, other)
        settle_streams()
        if not everywhere(safe):
            bad[0] = 1

    return loop


@cache
def block_nearest(one: bool, bits: int) -> Any:
    """The same for sign and magnitude; ``bound`` is what ``gaussian_scale`` holds c below, in mean magnitudes."""

    @inlined
    def restore(given: Any, first: int, blocks: int, size: Any, state: Any) -> None:
        n, numel, stride = size
        for b in range(blocks):
            found = *given, state[0]
            _for_block(_restore_levels, found, (first + b) * n, b * stride, n, numel, as_floats(state[1][b]))

    @jit
    def loop(
        lo: int,
        hi: int,
        kept: Array,
        source: Any,
        place: Any,
        packed: Array,
        stored: Array,
        bad: Array,
        out: Array,
        streams: bool,
        grain: Any,
        borders: Any,
        table: Array,
        widening: int,
        bound: Any,
    ) -> None:
        given, bytes_, scales = _source_of(source, one), data_of(packed), data_of(stored)
        back, inverses = (given, (data_of(out), streams)), stack_floats(16)
        room, more_room = stack_floats(256), stack_floats(256)
        levels, search = sixteen_at(data_of(table), 0), search_of(borders, data_of(table))
        n, numel, (stride, most) = place[5], place[6], _batch(place[5])
        _state_of(kept, more_room)
        this, other = _state_of(kept, room)
        size, before = (n, numel, stride), 0
        safe = is_safe(folded_rows(room, False))
        for first in range(lo, hi, most):
            blocks = min(most, hi - first)
            for b in range(blocks):
                at = (first + b) * n
                two = _for_block(_moments, (given, this[0]), at, b * stride, n, numel, (zeros(), zeros()))
                fold_in(two[0], room, b)
                fold_in(two[1], more_room, b)
            means, squares = folded_rows(room, False), folded_rows(more_room, False)
            safe, c = both(safe, is_safe(means)), gaussian(squares, means, _f32(n), bound, widening)
            store_sixteen(over(_f32(1), c) * grain, inverses)
            restore(back, first - before, before, size, other)
            before = blocks if out.size else 0
            for b in range(blocks):
                codes = given, this[0], bytes_, bits, search, levels, inverses[b]
                two = _for_block(_nearest, codes, (first + b) * n, b * stride, n, numel, (zeros(), zeros()))
                fold_in(two[0], room, b)
                fold_in(two[1], more_room, b)
            fitted = storable(over(folded_rows(room, False), folded_rows(more_room, False)), False)
            c = choose(c > _f32(0), fitted, c)
            store_sixteen(c, this[1])
            store_bf16(c, scales, first, blocks)
            this, other = other, this
        restore(back, hi - before, before, size, other)
        settle_streams()
        if not everywhere(safe):
            bad[0] = 1

    return loop


@cache
def block_reaching(one: bool, kind: int) -> Any:
    """The same for integers and for float8, the largest of them ``steps``."""

    @inlined
    def code(given: Any, first: int, blocks: int, size: Any, state: Any, inverses: Pointer) -> None:
        n, numel, stride = size
        store_sixteen(over(_f32(1), sixteen_at(state[1], 0)), inverses)
        for b in range(blocks):
            codes = *given, state[0], inverses[b], kind
            _for_block(_reaching, codes, (first + b) * n, b * stride, n, numel, as_floats(state[1][b]))

    @jit
    def loop(
        lo: int,
        hi: int,
        kept: Array,
        source: Any,
        place: Any,
        packed: Array,
        stored: Array,
        bad: Array,
        out: Array,
        streams: bool,
        steps: Any,
    ) -> None:
        given, scales, room, inverses = _source_of(source, one), data_of(stored), stack_floats(256), stack_floats(16)
        to = given, (data_of(out), streams), out.size > 0, data_of(packed)
        n, numel, (stride, most) = place[5], place[6], _batch(place[5])
        this, other = _state_of(kept, room)
        size, before = (n, numel, stride), 0
        safe = is_safe(folded_rows(room, True))
        for first in range(lo, hi, most):
            blocks = min(most, hi - first)
            for b in range(blocks):
                at = (first + b) * n
                fold_in(_for_block(_reach, (given, this[0]), at, b * stride, n, numel, no_bits()), room, b)
            largest = folded_rows(room, True)
            safe, c = both(safe, is_safe(largest)), storable(largest / steps, True)
            store_sixteen(c, this[1])
            store_bf16(c, scales, first, blocks)
            this, other = other, this
            code(to, first - before, before, size, this, inverses)
            before = blocks
        code(to, hi - before, before, size, other, inverses)
        settle_streams()
        if not everywhere(safe):
            bad[0] = 1

    return loop
