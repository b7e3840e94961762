"""One pass over the elements where each block has a scale: everything about a block happens while it is in the cache.

Blocks are consecutive in memory. They are coded in batches of up to sixteen, so that what is one value for a block, a
chain of slow operations, is computed for all of them in one go. While a batch is read, the one before is coded and the
one before that is written, block by block in turn: scales are there when they are needed, and memory has something to
do all the time. The arithmetic is that of ``reference`` for sections of one row. The width of codes, and what terms
there are, is compiled in.

Steps are called as ``step(given, at, kept, count, have, sums)`` for each run of 64 elements of a block. ``at``: offset
in x, terms, out and codes. ``kept``: offset in what is kept of the block. ``count``: elements of the block from there
on. ``have``: elements from there on in memory. They return ``sums`` with this run added.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from compactdist.kernels.cpu import call
from compactdist.kernels.cpu.call import LINEAR
from compactdist.kernels.cpu.checksum import sum_between
from compactdist.kernels.cpu.elements import (
    SOURCES,
    ask_for,
    bound_of,
    expected_at,
    floats_from,
    grain_of,
    nearest_codes,
    put_twice,
    reaching,
    residual_at,
    search_of,
    table_of,
    target_of,
)
from compactdist.kernels.cpu.scales import gaussian, is_safe, over, storable, stored_scales
from compactdist.kernels.cpu.simd.elements import Pointer
from compactdist.kernels.cpu.simd.ints import bits_of_magnitude, larger, no_bits
from compactdist.kernels.cpu.simd.jit import inlined
from compactdist.kernels.cpu.simd.memory import load, settle_streams, shifted, sixteen_at, stack_floats, store
from compactdist.kernels.cpu.simd.packing import signed_by, store_codes, store_signs
from compactdist.kernels.cpu.simd.sixteen import (
    COUNT,
    both,
    choose,
    everywhere,
    fold_in,
    folded_rows,
    store_bf16,
    store_sixteen,
)
from compactdist.kernels.cpu.simd.slots import ELEMENTS_AT, add_to, bytes_at, next_part, own_room, words_at
from compactdist.kernels.cpu.simd.vectors import as_floats, lane_mask, level_of, magnitude, where, zeros
from compactdist.kernels.cpu.simd.words import all_of, no_sums
from compactdist.kernels.reference import LANES

_f32 = np.float32
_FIRST_PASS = call.FIRST_PASS
_BORDERS = call.BORDERS
_OUT = call.OUT
_CODES = call.CODES
_ROW_WORDS = call.ROW_WORDS
_SUM = call.SUM
_CHANNELS = call.CHANNELS
_NUMEL = call.NUMEL
_OWN_EACH = call.OWN_EACH
_WIDENING = call.WIDENING
_BAD = call.BAD
_LITTLE = call.LITTLE
_MUCH = call.MUCH


@inlined
def _for_block(step: Any, given: Any, at: int, kept: int, n: int, numel: int, sums: Any) -> Any:
    """A step for every 64 of the ``n`` elements from ``at`` on, and what they made of the block."""
    have = min(n, numel - at)
    whole = max(have, 0) // LANES * LANES
    for j in range(0, whole, LANES):
        sums = step(given, at + j, kept + j, LANES, LANES, sums)
    for j in range(whole, n, LANES):
        sums = step(given, at + j, kept + j, n - j, have - j, sums)
    return sums


@inlined
def find_signs(given: Any, at: int, kept: int, count: int, have: int, lanes: Any) -> Any:
    """Sign codes, and by lanes the sums of magnitudes."""
    source, bytes_ = given
    ask_for(source, at + _LITTLE)
    value = residual_at(source, at, have)
    store_signs(value, bytes_, at, count)
    return lanes + magnitude(value)


@inlined
def restore_signs(given: Any, at: int, kept: int, count: int, have: int, scale: Any) -> Any:
    """What the receiver makes of sign codes."""
    source, target, bytes_ = given
    put_twice(expected_at(source, at, have), signed_by(scale, bytes_, at, count), target, at, have)
    return scale


@inlined
def find_moments(given: Any, at: int, kept: int, count: int, have: int, sums: Any) -> Any:
    """Residuals to keep, and by lanes the sums of their magnitudes and squares."""
    source, values = given
    ask_for(source, at + _MUCH)
    value = residual_at(source, at, have)
    store(value, values, kept)
    return sums[0] + magnitude(value), sums[1] + value * value


@inlined
def code_nearest(given: Any, at: int, kept: int, count: int, have: int, sums: Any) -> Any:
    """Codes, levels in the place of residuals, and by lanes the sums for the fit of the scale to them."""
    values, packed, bits, search, levels, inverse = given
    value = load(values, kept)
    codes = nearest_codes(value, magnitude(value) * inverse, search, False)
    store_codes(codes, bits, packed, at, count)
    level = level_of(levels, codes, bits)
    if count < LANES:
        level = where(lane_mask(count), level, zeros())
    store(level, values, kept)
    return sums[0] + value * level, sums[1] + level * level


@inlined
def restore_levels(given: Any, at: int, kept: int, count: int, have: int, scale: Any) -> Any:
    """What the receiver makes of levels that were kept."""
    source, target, values = given
    put_twice(expected_at(source, at, have), scale * load(values, kept), target, at, have)
    return scale


@inlined
def find_reach(given: Any, at: int, kept: int, count: int, have: int, bits: Any) -> Any:
    """Residuals to keep, and by lanes the bits of the largest magnitude."""
    source, values = given
    ask_for(source, at + _LITTLE)
    value = residual_at(source, at, have)
    store(value, values, kept)
    return larger(bits, bits_of_magnitude(value))


@inlined
def code_reaching(given: Any, at: int, kept: int, count: int, have: int, c: Any) -> Any:
    """Codes of integers or float8, and what the receiver makes of them."""
    source, target, stores, packed, values, inverse, kind = given
    value = load(values, kept)
    codes, change = reaching(kind, value * inverse, value < _f32(0), c)
    store_codes(codes, -8 if kind == LINEAR else 8, packed, at, count)
    if stores:
        put_twice(expected_at(source, at, have), change, target, at, have)
    return c


@inlined
def _sizes(args: Any, elements: int) -> Any:
    """Elements to a block, all of them, those between kept blocks, and how many blocks a batch has at most."""
    n = args[_CHANNELS]
    stride = (n + LANES - 1) // LANES * LANES
    return n, args[_NUMEL], stride, min(max(elements // stride, 1), COUNT)


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


def block_signs(dtype: str, terms: int) -> Any:
    """A work over blocks: sign codes, scales, and what the receiver makes of them; ``BAD`` is set for unsafe ones."""
    elements_at, source_of = ELEMENTS_AT[dtype], SOURCES[terms]

    def body(args: Any) -> int:
        wanted = args[_OUT] != 0
        given, bytes_, scales = source_of(args, elements_at), bytes_at(args, _CODES), stored_scales(args)
        codes, cs, room = (
            (given, target_of(args, elements_at), bytes_),
            stack_floats(16),
            _cleared(stack_floats(256)),
        )
        n, numel, _, most = _sizes(args, _LITTLE)
        safe = is_safe(folded_rows(room, False))
        lo, hi = next_part(args, _FIRST_PASS)
        while lo < hi:
            before = 0
            for first in range(lo, hi + most, most):
                blocks = _count(first, hi, most)
                for b in range(most):
                    at = (first + b) * n
                    if b < blocks:
                        fold_in(_for_block(find_signs, (given, bytes_), at, 0, n, numel, zeros()), room, b)
                    if b < before:
                        _for_block(restore_signs, codes, at - most * n, 0, n, numel, as_floats(cs[b]))
                means = folded_rows(room, False)
                safe, c = both(safe, is_safe(means)), storable(means / _f32(n), False)
                store_sixteen(c, cs)
                store_bf16(c, scales, first, blocks)
                before = blocks if wanted else 0
            lo, hi = next_part(args, _FIRST_PASS)
        settle_streams()
        if not everywhere(safe):  # only now, as all threads share its cache line
            args[_BAD] = 1
        return 0

    return body


def block_nearest(dtype: str, terms: int, bits: int, borders: int) -> Any:
    """The same for sign and magnitude."""
    elements_at, source_of = ELEMENTS_AT[dtype], SOURCES[terms]

    def body(args: Any) -> int:
        wanted, table = args[_OUT] != 0, table_of(args)
        given, target, packed = (
            source_of(args, elements_at),
            target_of(args, elements_at),
            bytes_at(args, _CODES),
        )
        levels, search, scales = (
            sixteen_at(table, 0),
            search_of(floats_from(table, _BORDERS, borders), table),
            stored_scales(args),
        )
        n, numel, stride, most = _sizes(args, _MUCH)
        values, third = own_room(args, _FIRST_PASS), args[_OWN_EACH] // 3
        grain, bound, widening = grain_of(table), bound_of(table), args[_WIDENING]
        new, known, old = values, shifted(values, third), shifted(values, 2 * third)
        inverses, cs = stack_floats(16), stack_floats(16)
        one_sum, two_sum = _cleared(stack_floats(256)), _cleared(stack_floats(256))
        one_fit, two_fit = _cleared(stack_floats(256)), _cleared(stack_floats(256))
        c = folded_rows(one_sum, False)
        safe = is_safe(c)
        words, row_words, sums = words_at(args, _CODES), args[_ROW_WORDS], no_sums()
        lo, hi = next_part(args, _FIRST_PASS)
        while lo < hi:
            before, earlier = 0, 0
            for first in range(lo, hi + 2 * most, most):
                blocks = _count(first, hi, most)
                for b in range(most):
                    at, at_kept = (first + b) * n, b * stride
                    if b < blocks:
                        two = _for_block(find_moments, (given, new), at, at_kept, n, numel, (zeros(), zeros()))
                        fold_in(two[0], one_sum, b)
                        fold_in(two[1], two_sum, b)
                    if b < before:
                        codes = known, packed, bits, search, levels, inverses[b]
                        two = _for_block(code_nearest, codes, at - most * n, at_kept, n, numel, (zeros(), zeros()))
                        fold_in(two[0], one_fit, b)
                        fold_in(two[1], two_fit, b)
                    if b < earlier:
                        found = given, target, old
                        _for_block(restore_levels, found, at - 2 * most * n, at_kept, n, numel, as_floats(cs[b]))
                sums = sum_between(sums, words, (first - most) * row_words, (first - most + before) * row_words)
                fitted = storable(over(folded_rows(one_fit, False), folded_rows(two_fit, False)), False)
                fitted = choose(c > _f32(0), fitted, c)
                store_sixteen(fitted, cs)
                store_bf16(fitted, scales, first - most, before)
                means, squares = folded_rows(one_sum, False), folded_rows(two_sum, False)
                safe, c = both(safe, is_safe(means)), gaussian(squares, means, _f32(n), bound, widening)
                store_sixteen(over(_f32(1), c) * grain, inverses)
                new, known, old = old, new, known
                before, earlier = blocks, before if wanted else 0
            lo, hi = next_part(args, _FIRST_PASS)
        settle_streams()
        add_to(args, _SUM, all_of(sums))
        if not everywhere(safe):
            args[_BAD] = 1
        return 0

    return body


def block_reaching(dtype: str, terms: int, kind: int) -> Any:
    """The same for integers and for float8; the bound is the level of the largest code."""
    elements_at, source_of = ELEMENTS_AT[dtype], SOURCES[terms]

    def body(args: Any) -> int:
        wanted = args[_OUT] != 0
        given, target, packed = (
            source_of(args, elements_at),
            target_of(args, elements_at),
            bytes_at(args, _CODES),
        )
        n, numel, stride, most = _sizes(args, _LITTLE)
        new, scales, steps = own_room(args, _FIRST_PASS), stored_scales(args), bound_of(table_of(args))
        known = shifted(new, args[_OWN_EACH] // 3)
        inverses, cs, room = stack_floats(16), stack_floats(16), _cleared(stack_floats(256))
        safe = is_safe(folded_rows(room, True))
        words, row_words, sums = words_at(args, _CODES), args[_ROW_WORDS], no_sums()
        lo, hi = next_part(args, _FIRST_PASS)
        while lo < hi:
            before = 0
            for first in range(lo, hi + most, most):
                blocks = _count(first, hi, most)
                for b in range(most):
                    at, at_kept = (first + b) * n, b * stride
                    if b < blocks:
                        fold_in(_for_block(find_reach, (given, new), at, at_kept, n, numel, no_bits()), room, b)
                    if b < before:
                        codes = given, target, wanted, packed, known, inverses[b], kind
                        _for_block(code_reaching, codes, at - most * n, at_kept, n, numel, as_floats(cs[b]))
                sums = sum_between(sums, words, (first - most) * row_words, (first - most + before) * row_words)
                largest = folded_rows(room, True)
                safe, c = both(safe, is_safe(largest)), storable(largest / steps, True)
                store_sixteen(c, cs)
                store_sixteen(over(_f32(1), c), inverses)
                store_bf16(c, scales, first, blocks)
                new, known, before = known, new, blocks
            lo, hi = next_part(args, _FIRST_PASS)
        settle_streams()
        add_to(args, _SUM, all_of(sums))
        if not everywhere(safe):
            args[_BAD] = 1
        return 0

    return body
