"""The two passes over the elements where scales belong to rows and channels, and the receiver's only one.

The first pass finds what the scales are made of. What a row's scale is, is settled as soon as the row has been read, so
the sums over channels that need it run at once. The second pass makes codes, and what the receiver makes of them.

What both ends compute is in the order of ``reference`` to the bit, so ``fastmath`` is out of the question. Sixty-four
elements are read before any is written, for the receiver's input and output may be the same memory.

Each maker returns a loop for a dtype and a kind of code, and for terms (``call.py``). What is fixed is constant to the
compiler, and the loop holds nothing that it does not need. Where 64 elements are left of a row, nothing asks how many
there are. Where the address of ``out`` is 0, no reconstruction is wanted.

*Offsets* tell where matrix elements lie: ``(row_at, (chunk_at, chunk_from, chunk_len, chunks), rows, channels, numel,
row_count)``, see ``offsets.py``. A *source* is ``(x, base, velocity, terms)``: pointers, of which the first
``1 + terms`` are good. A *tile* is 64 rows of one group.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from compactdist.kernels.cpu import call
from compactdist.kernels.cpu.call import LINEAR
from compactdist.kernels.cpu.checksum import sum_between
from compactdist.kernels.cpu.elements import (
    AHEAD,
    SOURCES,
    ask_early,
    ask_for,
    ask_for_expected,
    change_of,
    expected_at,
    floats_from,
    nearest_codes,
    put_twice,
    reaching,
    residual_at,
    search_of,
    table_of,
    target_of,
)
from compactdist.kernels.cpu.scales import sum_of
from compactdist.kernels.cpu.simd.elements import Pointer, round_3_bits
from compactdist.kernels.cpu.simd.ints import bits_of_magnitude, larger, largest, no_bits
from compactdist.kernels.cpu.simd.jit import inlined
from compactdist.kernels.cpu.simd.memory import load, load_first, settle_streams, sixteen_at, store, store_first
from compactdist.kernels.cpu.simd.packing import store_codes, store_signs
from compactdist.kernels.cpu.simd.slots import (
    ELEMENTS_AT,
    add_to,
    bytes_at,
    longs_at,
    next_part,
    own_room,
    room_at,
    words_at,
)
from compactdist.kernels.cpu.simd.vectors import folded, level_of, magnitude, where, zeros
from compactdist.kernels.cpu.simd.words import all_of, no_sums
from compactdist.kernels.reference import LANES
from compactdist.kernels.reference import TILE_ROWS as TILE

_AHEAD_OF_LITTLE = 3 * AHEAD
"""Where there is little to compute, memory has to be asked earlier."""

_SUMMED_WORDS = 512
"""Codes are summed up once there are so many words of them: rows of few words would fill few lanes."""

_f32 = np.float32
_FIRST_PASS = call.FIRST_PASS
_BORDERS = call.BORDERS
_SECOND_PASS = call.SECOND_PASS
_ROW_AT = call.ROW_AT
_CHUNK_AT = call.CHUNK_AT
_CHUNK_FROM = call.CHUNK_FROM
_CHUNK_LEN = call.CHUNK_LEN
_CHUNKS = call.CHUNKS
_ROWS = call.ROWS
_CHANNELS = call.CHANNELS
_NUMEL = call.NUMEL
_ROW_COUNT = call.ROW_COUNT
_WEIGHTED = call.WEIGHTED
_STAT_ROOM = call.STAT_ROOM
_T_ROOM = call.T_ROOM
_INVERSE_T_ROOM = call.INVERSE_T_ROOM
_FIRST_ROOM = call.FIRST_ROOM
_SECOND_ROOM = call.SECOND_ROOM
_C_ROOM = call.C_ROOM
_INVERSE_C_ROOM = call.INVERSE_C_ROOM
_OUT = call.OUT
_CODES = call.CODES
_ROW_WORDS = call.ROW_WORDS
_SUM = call.SUM


@inlined
def offsets_in(args: Any) -> Any:
    """The offsets in a block."""
    chunks = longs_at(args, _CHUNK_AT), longs_at(args, _CHUNK_FROM), longs_at(args, _CHUNK_LEN), args[_CHUNKS]
    return longs_at(args, _ROW_AT), chunks, args[_ROWS], args[_CHANNELS], args[_NUMEL], args[_ROW_COUNT]


@inlined
def _read_row(source: Any, at: int, chunks: Any, numel: int, values: Pointer) -> Any:
    """Residuals of a row, in the order of its channels, of which up to 63 zeros follow.

    What the row after will need is asked for here and, as caches forget, when this row is added to the sums: with
    either alone memory rests for a part of the time.

    Returns:
        By lanes, sums of magnitudes, good where all chunks but the last fill the lanes, and bits of the largest.
    """
    chunk_at, chunk_from, chunk_len, count = chunks
    lanes, bits = zeros(), no_bits()
    for k in range(count):
        n, left, start = chunk_len[k], chunk_at[k], at + chunk_from[k]
        have = min(n, numel - start)
        whole = max(have, 0) // LANES * LANES
        for j in range(0, whole, LANES):
            ask_early(source, start + j + AHEAD)
            value = residual_at(source, start + j, LANES)
            lanes, bits = lanes + magnitude(value), larger(bits, bits_of_magnitude(value))
            store(value, values, left + j)
        for j in range(whole, n, LANES):
            value = residual_at(source, start + j, have - j)
            lanes, bits = lanes + magnitude(value), larger(bits, bits_of_magnitude(value))
            store(value, values, left + j)
    return lanes, bits


@inlined
def fill_lanes(offsets: Any) -> bool:
    """Whether all chunks of a row but the last are whole runs of 64 channels."""
    chunk_len, count, filled = offsets[1][2], offsets[1][3], True
    for k in range(count - 1):
        filled = filled and chunk_len[k] % LANES == 0
    return filled


@inlined
def _clear(sums: Any, at: int, n: int) -> None:
    one, two, both = sums
    for j in range(0, n, LANES):
        store_first(zeros(), one, at + j, n - j)
        if both:
            store_first(zeros(), two, at + j, n - j)


@inlined
def _update(add: Any, given: Any, value: Any, factor: Any, sums: Any, s: int, element: int, count: int) -> None:
    one, two, both = sums
    first, second = load_first(one, s, count), zeros()
    if both:
        second = load_first(two, s, count)
    first, second = add(given, value, factor, first, second, element, count)
    store_first(first, one, s, count)
    if both:
        store_first(second, two, s, count)


@inlined
def _for_tiles(settle: Any, add: Any, given: Any, args: Any, source: Any, offsets: Any, sums: Any) -> None:
    """Rows of parts of the tiles: read one, settle its factor, and add it to the tile's sums by channel.

    Calls ``settle(given, row, read, values, channels)`` for each row, ``read`` being what ``_read_row`` returned; then
    ``add(given, value, factor, first, second, element, count)`` for each run of 64 values. ``given``: opaque to
    this loop; ``element``: position in the matrix; ``count``: channels from there on.
    """
    row_at, chunks, rows, channels, numel, row_count = offsets
    tiles, last, whole = (rows + TILE - 1) // TILE, row_count - 1, channels // LANES * LANES
    values = own_room(args, _FIRST_PASS)
    lo, hi = next_part(args, _FIRST_PASS)
    while lo < hi:
        for tile in range(lo, hi):
            first, s = tile // tiles * rows + tile % tiles * TILE, tile * channels
            _clear(sums, s, channels)
            for row in range(first, min(first + TILE, (tile // tiles + 1) * rows)):
                factor = settle(given, row, _read_row(source, row_at[row], chunks, numel, values), values, channels)
                coming, element = row_at[min(row + 1, last)], row * channels
                for j in range(0, whole, LANES):
                    ask_early(source, coming + j)
                    _update(add, given, load(values, j), factor, sums, s + j, element + j, LANES)
                if whole < channels:
                    count = channels - whole
                    _update(add, given, load(values, whole), factor, sums, s + whole, element + whole, count)
        lo, hi = next_part(args, _FIRST_PASS)


@inlined
def _weight(given: Any, row: int, read: Any, values: Pointer, channels: int) -> Any:
    stat, weighted, filled = given[:3]
    stat[row] = folded(read[0]) if filled else sum_of(values, channels)
    return round_3_bits(stat[row]) if weighted else _f32(1)


@inlined
def _inverse(given: Any, row: int, read: Any, values: Pointer, channels: int) -> Any:
    stat, weighted = given
    stat[row] = largest(read[1])
    weight = round_3_bits(stat[row]) if weighted else _f32(1)
    return _f32(1) / weight if weight > _f32(0) else _f32(0)


@inlined
def _add_signs(given: Any, value: Any, weight: Any, total: Any, none: Any, element: int, count: int) -> Any:
    store_signs(value, given[3], element, count)
    return total + magnitude(value) * weight, none


@inlined
def _add_moments(given: Any, value: Any, weight: Any, total: Any, energy: Any, element: int, count: int) -> Any:
    m = magnitude(value)
    return total + m * weight, energy + m * m


@inlined
def _add_reach(given: Any, value: Any, inverse: Any, top: Any, none: Any, element: int, count: int) -> Any:
    reach = magnitude(value) * inverse
    return where(reach > top, reach, top), none


def survey_signs(dtype: str, terms: int) -> Any:
    """A work over tiles: sums of magnitudes by row, of ``m * weight`` by channel, and sign codes."""
    elements_at, source_of = ELEMENTS_AT[dtype], SOURCES[terms]

    def body(args: Any) -> int:
        offsets, one = offsets_in(args), room_at(args, _FIRST_ROOM)
        given = room_at(args, _STAT_ROOM), args[_WEIGHTED] != 0, fill_lanes(offsets), bytes_at(args, _CODES)
        _for_tiles(_weight, _add_signs, given, args, source_of(args, elements_at), offsets, (one, one, False))
        return 0

    return body


def survey_moments(dtype: str, terms: int) -> Any:
    """A work over tiles: sums of magnitudes by row, of ``m * weight`` and of ``m * m`` by channel."""
    elements_at, source_of = ELEMENTS_AT[dtype], SOURCES[terms]

    def body(args: Any) -> int:
        offsets, to = offsets_in(args), (room_at(args, _FIRST_ROOM), room_at(args, _SECOND_ROOM), True)
        given = room_at(args, _STAT_ROOM), args[_WEIGHTED] != 0, fill_lanes(offsets)
        _for_tiles(_weight, _add_moments, given, args, source_of(args, elements_at), offsets, to)
        return 0

    return body


def survey_reach(dtype: str, terms: int) -> Any:
    """A work over tiles: bits of the largest magnitude by row, and the largest ``m / weight`` by channel."""
    elements_at, source_of = ELEMENTS_AT[dtype], SOURCES[terms]

    def body(args: Any) -> int:
        offsets, one = offsets_in(args), room_at(args, _FIRST_ROOM)
        given = room_at(args, _STAT_ROOM), args[_WEIGHTED] != 0
        _for_tiles(_inverse, _add_reach, given, args, source_of(args, elements_at), offsets, (one, one, False))
        return 0

    return body


@inlined
def _for_rows(step: Any, given: Any, args: Any, offsets: Any, weights: Any) -> None:
    """Call ``step(given, (t, 1 / t), at, channel, code, count, have)`` for each run of 64 channels of some rows.

    ``at``: offset in x, terms and out. ``channel``: number among the channels of all groups. ``code``: first code in
    the payload. ``count``: channels from there on in the run. ``have``: elements from there on in memory.
    """
    row_at, (chunk_at, chunk_from, chunk_len, chunks), rows, channels, numel, _ = offsets
    t, inverse_t = weights
    words, row_words, sums = words_at(args, _CODES), args[_ROW_WORDS], no_sums()
    lo, hi = next_part(args, _SECOND_PASS)
    while lo < hi:
        summed = lo * row_words
        for row in range(lo, hi):
            pair = t[row], inverse_t[row]
            for k in range(chunks):
                n, left, at = chunk_len[k], chunk_at[k], row_at[row] + chunk_from[k]
                channel, code, have = row // rows * channels + left, row * channels + left, min(n, numel - at)
                whole = max(have, 0) // LANES * LANES
                for j in range(0, whole, LANES):
                    step(given, pair, at + j, channel + j, code + j, LANES, LANES)
                for j in range(whole, n, LANES):
                    step(given, pair, at + j, channel + j, code + j, n - j, have - j)
            coded = (row + 1) * row_words
            if coded - summed >= _SUMMED_WORDS or (row + 1 == hi and row_words != 0):
                sums, summed = sum_between(sums, words, summed, coded), coded
        lo, hi = next_part(args, _SECOND_PASS)
    settle_streams()
    add_to(args, _SUM, all_of(sums))


@inlined
def nearest_step(given: Any, weights: Any, at: int, channel: int, code: int, count: int, have: int) -> None:
    """A step of ``_for_rows``: codes of the nearest magnitude, and what the receiver makes of them."""
    source, target, packed, cs, inverses, levels, bits, search, trits, stores = given
    ask_for(source, at + AHEAD)
    expected = expected_at(source, at, have)
    value = load_first(source[0], at, have) - expected
    u = magnitude(value) * load_first(inverses, channel, count) * weights[1]
    codes = nearest_codes(value, u, search, trits)
    store_codes(codes, bits, packed, code, count)
    if stores:
        change = (load_first(cs, channel, count) * weights[0]) * level_of(levels, codes, bits)
        put_twice(expected, change, target, at, have)


@inlined
def reaching_step(given: Any, weights: Any, at: int, channel: int, code: int, count: int, have: int) -> None:
    """A step of ``_for_rows``: the same for integers and float8."""
    source, target, packed, cs, inverses, kind, stores = given
    ask_for(source, at + AHEAD)
    expected = expected_at(source, at, have)
    value = load_first(source[0], at, have) - expected
    u = value * load_first(inverses, channel, count) * weights[1]
    scale = load_first(cs, channel, count) * weights[0]
    codes, change = reaching(kind, u, value < _f32(0), scale)
    store_codes(codes, -8 if kind == LINEAR else 8, packed, code, count)
    if stores:
        put_twice(expected, change, target, at, have)


@inlined
def apply_step(given: Any, weights: Any, at: int, channel: int, code: int, count: int, have: int) -> None:
    """A step of ``_for_rows``: what the receiver makes of codes."""
    source, target, packed, cs, kind, bits, levels = given
    ask_for_expected(source, at + _AHEAD_OF_LITTLE)
    scale = load_first(cs, channel, count) * weights[0]
    change = change_of(kind, scale, packed, bits, levels, code, count)
    put_twice(expected_at(source, at, have), change, target, at, have)


def code_nearest(dtype: str, terms: int, bits: int, borders: int, trits: bool) -> Any:
    """A work over rows: codes of the nearest magnitude and the sign, and what the receiver makes of them.

    Borders are a tuple, so that the search among them is unrolled.
    """
    elements_at, source_of = ELEMENTS_AT[dtype], SOURCES[terms]

    def body(args: Any) -> int:
        table = table_of(args)
        given = (
            source_of(args, elements_at),
            target_of(args, elements_at),
            bytes_at(args, _CODES),
            room_at(args, _C_ROOM),
            room_at(args, _INVERSE_C_ROOM),
            sixteen_at(table, 0),
            bits,
            search_of(floats_from(table, _BORDERS, borders), table),
            trits,
            args[_OUT] != 0,
        )
        _for_rows(nearest_step, given, args, offsets_in(args), (room_at(args, _T_ROOM), room_at(args, _INVERSE_T_ROOM)))
        return 0

    return body


def code_reaching(dtype: str, terms: int, kind: int) -> Any:
    """A work over rows: the nearest integer or float8 of ``m / (t * c)`` with the sign of the element."""
    elements_at, source_of = ELEMENTS_AT[dtype], SOURCES[terms]

    def body(args: Any) -> int:
        given = (
            source_of(args, elements_at),
            target_of(args, elements_at),
            bytes_at(args, _CODES),
            room_at(args, _C_ROOM),
            room_at(args, _INVERSE_C_ROOM),
            kind,
            args[_OUT] != 0,
        )
        _for_rows(
            reaching_step, given, args, offsets_in(args), (room_at(args, _T_ROOM), room_at(args, _INVERSE_T_ROOM))
        )
        return 0

    return body


def apply_codes(dtype: str, terms: int, kind: int, bits: int) -> Any:
    """A work over rows: ``out = expected + change``, rounded, kept finite; ``change_of`` tells the kinds."""
    elements_at, source_of = ELEMENTS_AT[dtype], SOURCES[terms]

    def body(args: Any) -> int:
        source, t, levels = source_of(args, elements_at), room_at(args, _T_ROOM), sixteen_at(table_of(args), 0)
        given = source, target_of(args, elements_at), bytes_at(args, _CODES), room_at(args, _C_ROOM), kind, bits, levels
        _for_rows(apply_step, given, args, offsets_in(args), (t, t))
        return 0

    return body
