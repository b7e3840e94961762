"""One pass over the elements where each block has a scale: everything about a block happens while it is in the cache.

Blocks are the rows of a *place* (``cpu_loops.py``), consecutive in memory. They are coded in batches of up to sixteen,
so that what is one value for a block, a chain of slow operations, is computed for all of them in one go. While a batch
is read, the one before is coded and the one before that is written, block by block in turn: scales are there when they
are needed, and memory has something to do all the time. The arithmetic is that of ``scales.py`` for layouts of one row.
The width of codes, and whether there is just ``one`` term, is compiled in.

After a change in the files this one imports, touch it: Numba's cache on disk looks at this file's date only.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from compactdist.kernels.cpu_block_steps import (
    LITTLE,
    MUCH,
    code_nearest,
    code_reaching,
    find_moments,
    find_reach,
    find_signs,
    for_block,
    restore_levels,
    restore_signs,
)
from compactdist.kernels.cpu_elements import Array, Pointer, inlined, jit, next_part
from compactdist.kernels.cpu_ints import no_bits
from compactdist.kernels.cpu_memory import (
    data_of,
    pointers_of,
    settle_streams,
    shifted,
    sixteen_at,
    stack_floats,
    store,
)
from compactdist.kernels.cpu_settle import gaussian, is_safe, over, storable
from compactdist.kernels.cpu_sixteen import (
    COUNT,
    both,
    choose,
    everywhere,
    fold_in,
    folded_rows,
    store_bf16,
    store_sixteen,
)
from compactdist.kernels.cpu_steps import search_of
from compactdist.kernels.cpu_vectors import as_floats, zeros
from compactdist.kernels.reference import LANES

_f32 = np.float32


def kept_for(block: int) -> int:
    """Elements of the buffer that a loop over blocks of this length keeps residuals in: of three batches."""
    return 3 * max(MUCH, -(-block // LANES) * LANES)


@inlined
def _sizes(place: Any, elements: int) -> Any:
    """Elements to a block, all of them, those between kept blocks, and how many blocks a batch has at most."""
    n = place[5]
    stride = (n + LANES - 1) // LANES * LANES
    return n, place[6], stride, min(max(elements // stride, 1), COUNT)


@inlined
def _count(first: int, hi: int, most: int) -> Any:
    """Blocks of the batch that begins with ``first``."""
    return max(min(most, hi - first), 0)


@inlined
def _cleared(room: Pointer) -> Any:
    """Room for sixteen rows that are folded together; zero where there is no block."""
    for at in range(0, COUNT * COUNT, LANES):
        store(zeros(), room, at)
    return room


@cache
def block_signs(one: bool) -> Any:
    """For parts of the blocks: sign codes, scales, and what the receiver makes of them; ``bad[0]`` for unsafe ones.

    ``kept`` is a buffer of ``kept_for``; ``streams`` tells whether ``out`` and the codes are written past the caches.
    """

    @jit
    def loop(
        parts: Array,
        kept: Array,
        source: Any,
        place: Any,
        packed: Array,
        stored: Array,
        bad: Array,
        out: Array,
        streams: Any,
    ) -> None:
        given, bytes_, scales = pointers_of(source, one), data_of(packed), data_of(stored)
        codes, cs, room = (given, (data_of(out), streams[0]), bytes_), stack_floats(16), _cleared(stack_floats(256))
        n, numel, _, most = _sizes(place, LITTLE)
        safe = is_safe(folded_rows(room, False))
        lo, hi = next_part(parts)
        while lo < hi:
            before = 0
            for first in range(lo, hi + most, most):
                blocks = _count(first, hi, most)
                for b in range(most):
                    at = (first + b) * n
                    if b < blocks:
                        fold_in(for_block(find_signs, (given, bytes_), at, 0, n, numel, zeros()), room, b)
                    if b < before:
                        for_block(restore_signs, codes, at - most * n, 0, n, numel, as_floats(cs[b]))
                means = folded_rows(room, False)
                safe, c = both(safe, is_safe(means)), storable(means / _f32(n), False)
                store_sixteen(c, cs)
                store_bf16(c, scales, first, blocks)
                before = blocks if out.size else 0
            lo, hi = next_part(parts)
        settle_streams()
        if not everywhere(safe):  # only now, as all threads share its cache line
            bad[0] = 1

    return loop


@cache
def block_nearest(one: bool, bits: int) -> Any:
    """The same for sign and magnitude; ``bound`` is what ``gaussian_scale`` holds c below, in mean magnitudes."""

    @jit
    def loop(
        parts: Array,
        kept: Array,
        source: Any,
        place: Any,
        packed: Array,
        stored: Array,
        bad: Array,
        out: Array,
        streams: Any,
        grain: Any,
        borders: Any,
        table: Array,
        widening: int,
        bound: Any,
    ) -> None:
        given, target, to = pointers_of(source, one), (data_of(out), streams[0]), (data_of(packed), streams[1])
        levels, search, scales = sixteen_at(data_of(table), 0), search_of(borders, data_of(table)), data_of(stored)
        n, numel, stride, most = _sizes(place, MUCH)
        values, third = data_of(kept), kept.size // 3
        new, known, old = values, shifted(values, third), shifted(values, 2 * third)
        inverses, cs = stack_floats(16), stack_floats(16)
        one_sum, two_sum = _cleared(stack_floats(256)), _cleared(stack_floats(256))
        one_fit, two_fit = _cleared(stack_floats(256)), _cleared(stack_floats(256))
        c = folded_rows(one_sum, False)
        safe = is_safe(c)
        lo, hi = next_part(parts)
        while lo < hi:
            before, earlier = 0, 0
            for first in range(lo, hi + 2 * most, most):
                blocks = _count(first, hi, most)
                for b in range(most):
                    at, at_kept = (first + b) * n, b * stride
                    if b < blocks:
                        two = for_block(find_moments, (given, new), at, at_kept, n, numel, (zeros(), zeros()))
                        fold_in(two[0], one_sum, b)
                        fold_in(two[1], two_sum, b)
                    if b < before:
                        codes = known, to, bits, search, levels, inverses[b]
                        two = for_block(code_nearest, codes, at - most * n, at_kept, n, numel, (zeros(), zeros()))
                        fold_in(two[0], one_fit, b)
                        fold_in(two[1], two_fit, b)
                    if b < earlier:
                        found = given, target, old
                        for_block(restore_levels, found, at - 2 * most * n, at_kept, n, numel, as_floats(cs[b]))
                fitted = storable(over(folded_rows(one_fit, False), folded_rows(two_fit, False)), False)
                fitted = choose(c > _f32(0), fitted, c)
                store_sixteen(fitted, cs)
                store_bf16(fitted, scales, first - most, before)
                means, squares = folded_rows(one_sum, False), folded_rows(two_sum, False)
                safe, c = both(safe, is_safe(means)), gaussian(squares, means, _f32(n), bound, widening)
                store_sixteen(over(_f32(1), c) * grain, inverses)
                new, known, old = old, new, known
                before, earlier = blocks, before if out.size else 0
            lo, hi = next_part(parts)
        settle_streams()
        if not everywhere(safe):
            bad[0] = 1

    return loop


@cache
def block_reaching(one: bool, kind: int) -> Any:
    """The same for integers and for float8, the largest of them ``steps``."""

    @jit
    def loop(
        parts: Array,
        kept: Array,
        source: Any,
        place: Any,
        packed: Array,
        stored: Array,
        bad: Array,
        out: Array,
        streams: Any,
        steps: Any,
    ) -> None:
        given, target, to = pointers_of(source, one), (data_of(out), streams[0]), (data_of(packed), streams[1])
        n, numel, stride, most = _sizes(place, LITTLE)
        new, known, scales = data_of(kept), shifted(data_of(kept), kept.size // 3), data_of(stored)
        inverses, cs, room = stack_floats(16), stack_floats(16), _cleared(stack_floats(256))
        safe = is_safe(folded_rows(room, True))
        lo, hi = next_part(parts)
        while lo < hi:
            before = 0
            for first in range(lo, hi + most, most):
                blocks = _count(first, hi, most)
                for b in range(most):
                    at, at_kept = (first + b) * n, b * stride
                    if b < blocks:
                        fold_in(for_block(find_reach, (given, new), at, at_kept, n, numel, no_bits()), room, b)
                    if b < before:
                        codes = given, target, out.size > 0, to, known, inverses[b], kind
                        for_block(code_reaching, codes, at - most * n, at_kept, n, numel, as_floats(cs[b]))
                largest = folded_rows(room, True)
                safe, c = both(safe, is_safe(largest)), storable(largest / steps, True)
                store_sixteen(c, cs)
                store_sixteen(over(_f32(1), c), inverses)
                store_bf16(c, scales, first, blocks)
                new, known, before = known, new, blocks
            lo, hi = next_part(parts)
        settle_streams()
        if not everywhere(safe):
            bad[0] = 1

    return loop
