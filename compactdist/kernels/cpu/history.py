"""One pass over the elements where channel scales come from the frame before: ``reference/history.py``.

A row is read, which settles its scale, and read again from the nearest caches to be coded; beside it runs the sum of
squares of each channel. Loops run over tiles, for those sums have an order; all else is as in ``rows.py``.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from compactdist.kernels.cpu import call
from compactdist.kernels.cpu.call import SIGN
from compactdist.kernels.cpu.checksum import add_rest, sum_between
from compactdist.kernels.cpu.elements import (
    AHEAD,
    SOURCES,
    ask_early,
    bound_of,
    floats_from,
    grain_of,
    residual_at,
    search_of,
    table_of,
    target_of,
)
from compactdist.kernels.cpu.entries import clear_padding
from compactdist.kernels.cpu.rows import (
    apply_step,
    fill_lanes,
    nearest_step,
    offsets_in,
    reaching_step,
)
from compactdist.kernels.cpu.scales import bf16_bits, fold_run, gaussian, is_safe, over, storable, stored_scales
from compactdist.kernels.cpu.simd.ints import bits_of_magnitude, larger, largest, no_bits
from compactdist.kernels.cpu.simd.jit import inlined
from compactdist.kernels.cpu.simd.memory import load_first, settle_streams, shifted, sixteen_at, store, store_first
from compactdist.kernels.cpu.simd.packing import store_signs
from compactdist.kernels.cpu.simd.sixteen import choose, root, store_bf16
from compactdist.kernels.cpu.simd.slots import (
    ELEMENTS_AT,
    add_to,
    bytes_at,
    floats_at,
    halves_from,
    longs_at,
    next_part,
    own_room,
    room_at,
    run,
    words_at,
)
from compactdist.kernels.cpu.simd.vectors import folded, magnitude, where, zeros
from compactdist.kernels.cpu.simd.words import all_of, no_sums
from compactdist.kernels.reference import LANES
from compactdist.kernels.reference import TILE_ROWS as TILE
from compactdist.kernels.reference.history import FLOOR, SMALLEST
from compactdist.kernels.reference.scales import LEVEL_OF_TRITS, SAFE_STATISTIC, SIGMA_OF_MEAN_MAGNITUDE

_f32 = np.float32
_HIGHEST = np.float32(SAFE_STATISTIC[1])
_SIGMA_OF_MEAN_MAGNITUDE, _LEVEL_OF_TRITS = np.float32(SIGMA_OF_MEAN_MAGNITUDE), np.float32(LEVEL_OF_TRITS)
_FLOOR, _SMALLEST = np.float32(FLOOR), np.float32(SMALLEST)
_SMALLEST_STORED, _LARGEST_STORED = np.float32(2.0**-126), np.float32(2.0**100)
_LARGEST_SCALE = np.float32(2.0**90)

_FIRST_PASS, _FOLD, _SECOND_PASS, _APART_PASS = call.FIRST_PASS, call.FOLD, call.SECOND_PASS, call.APART_PASS
_GROUPS, _ROWS, _CHANNELS, _TILES, _ROW_COUNT = call.GROUPS, call.ROWS, call.CHANNELS, call.TILES, call.ROW_COUNT
_OUT, _CODES, _PAYLOAD, _APART = call.OUT, call.CODES, call.PAYLOAD, call.APART
_ROW_SCALES_AT, _ROW_WORDS, _SUM, _HISTORY = call.ROW_SCALES_AT, call.ROW_WORDS, call.SUM, call.HISTORY
_ROWS_APART = call.ROWS_APART
_STAT_ROOM, _T_ROOM, _NORMS_ROOM, _FIRST_ROOM = call.STAT_ROOM, call.T_ROOM, call.NORMS_ROOM, call.FIRST_ROOM
_C_ROOM, _INVERSE_C_ROOM, _WIDENING, _BORDERS = call.C_ROOM, call.INVERSE_C_ROOM, call.WIDENING, call.BORDERS


@inlined
def _row_scales(args: Any) -> Any:
    """Where the row scales are in the payload: uint16 bits of bfloat16."""
    return halves_from(bytes_at(args, _PAYLOAD), args[_ROW_SCALES_AT])


@inlined
def _look_at(look: Any, found: Any, place: Any, at: int, left: int, count: int, have: int) -> Any:
    """Take notice of a run of 64 channels from ``left`` on, which begins at ``at`` in memory."""
    source, (c, inverse), (sums, s, adds), (signs, packed, code), (filled, values) = place
    ask_early(source, at + AHEAD)
    value = residual_at(source, at, have)
    if signs:
        store_signs(value, packed, code + left, count)
    if adds:
        store_first(load_first(sums, s + left, count) + value * value, sums, s + left, count)
    if filled:
        return look(found, value, load_first(c, left, count), load_first(inverse, left, count))
    store(value, values, left)
    return found


@inlined
def _look_again(look: Any, found: Any, scales: Any, values: Any, channels: int) -> Any:
    """The same for what was kept of a row, in the order of its channels."""
    c, inverse = scales
    for j in range(0, channels, LANES):
        count = channels - j
        found = look(found, load_first(values, j, count), load_first(c, j, count), load_first(inverse, j, count))
    return found


@inlined
def _code(step: Any, given: Any, pair: Any, offsets: Any, row: int, of_group: int) -> None:
    row_at, (chunk_at, chunk_from, chunk_len, chunks), _, channels, numel, _ = offsets
    for k in range(chunks):
        n, left, at = chunk_len[k], chunk_at[k], row_at[row] + chunk_from[k]
        have, code = min(n, numel - at), row * channels + left
        whole = max(have, 0) // LANES * LANES
        for j in range(0, whole, LANES):
            step(given, pair, at + j, of_group + left + j, code + j, LANES, LANES)
        for j in range(whole, n, LANES):
            step(given, pair, at + j, of_group + left + j, code + j, n - j, have - j)


@inlined
def _for_tiles(look: Any, none: Any, settle: Any, step: Any, known: Any, given: Any, args: Any, source: Any) -> None:
    """Rows of parts of the tiles: look at one, settle its scale, code it.

    Calls ``look(found, value, c, inverse_c)`` for each run of 64 values, beginning with ``none()``, and
    ``settle(known, found, group)``, which returns the statistic and ``t``. ``step``: as for ``rows.py``.
    """
    row_at, (chunk_at, chunk_from, chunk_len, chunks), rows, channels, numel, _ = offsets = offsets_in(args)
    signs, wanted, grain, filled, tiles = known[0], known[1], known[2], fill_lanes(offsets), args[_TILES]
    c, inverse, sums = room_at(args, _C_ROOM), room_at(args, _INVERSE_C_ROOM), room_at(args, _FIRST_ROOM)
    values, packed, stat, ts = (
        own_room(args, _FIRST_PASS),
        bytes_at(args, _CODES),
        room_at(args, _STAT_ROOM),
        _row_scales(args),
    )
    words, row_words, checksum, skipped = words_at(args, _CODES), args[_ROW_WORDS], no_sums(), args[_ROWS_APART] - 1
    lo, hi = next_part(args, _FIRST_PASS)
    while lo < hi:
        for tile in range(lo, hi):
            group = tile // tiles
            first, s, of_group = group * rows + tile % tiles * TILE, tile * channels, group * channels
            scales = shifted(c, of_group), shifted(inverse, of_group)
            for j in range(0, channels, LANES):
                store_first(zeros(), sums, s + j, channels - j)
            for row in range(first, min(first + TILE, (group + 1) * rows)):
                to = sums, s, (row - first) & skipped == 0
                found, place = none(), (source, scales, to, (signs, packed, row * channels), (filled, values))
                for k in range(chunks):
                    n, left, at = chunk_len[k], chunk_at[k], row_at[row] + chunk_from[k]
                    have = min(n, numel - at)
                    whole = max(have, 0) // LANES * LANES
                    for j in range(0, whole, LANES):
                        found = _look_at(look, found, place, at + j, left + j, LANES, LANES)
                    for j in range(whole, n, LANES):
                        found = _look_at(look, found, place, at + j, left + j, n - j, have - j)
                if not filled:
                    found = _look_again(look, found, scales, values, channels)
                statistic, t = settle(known, found, group)
                stat[row], ts[row] = statistic, bf16_bits(t)
                if wanted or not signs:
                    _code(step, given, (t, over(_f32(1), t) * grain), offsets, row, of_group)
                checksum = sum_between(checksum, words, row * row_words, (row + 1) * row_words)
        lo, hi = next_part(args, _FIRST_PASS)
    settle_streams()
    add_to(args, _SUM, all_of(checksum))


@inlined
def _products(lanes: Any, value: Any, c: Any, inverse: Any) -> Any:
    return lanes + magnitude(value) * c


@inlined
def _moments(found: Any, value: Any, c: Any, inverse: Any) -> Any:
    m = magnitude(value)
    product = m * c
    return found[0] + product, found[1] + product * (m * inverse)


@inlined
def _reach(bits: Any, value: Any, c: Any, inverse: Any) -> Any:
    return larger(bits, bits_of_magnitude(value * inverse))


@inlined
def _zeros() -> Any:
    return zeros()


@inlined
def _no_bits() -> Any:
    return no_bits()


@inlined
def _two_zeros() -> Any:
    return zeros(), zeros()


@inlined
def _settle_signs(known: Any, found: Any, group: int) -> Any:
    total = folded(found)
    return total, storable(over(total, known[3][group]), False)


@inlined
def _settle_nearest(known: Any, found: Any, group: int) -> Any:
    total, energy = folded(found[0]), folded(found[1])
    return total, gaussian(energy, total, known[3][group], known[4], known[5])


@inlined
def _settle_trits(known: Any, found: Any, group: int) -> Any:
    total, energy = folded(found[0]), folded(found[1])
    sigma = storable(over(energy, total * _SIGMA_OF_MEAN_MAGNITUDE), False)
    return total, storable(sigma * _LEVEL_OF_TRITS, False)


@inlined
def _settle_reach(known: Any, found: Any, group: int) -> Any:
    top = largest(found)
    return top, storable(top / known[4], True)


@inlined
def _known(args: Any, signs: bool) -> Any:
    """What ``_for_tiles`` and its parts know: whether codes are signs, whether a reconstruction is wanted, the grain,
    sums of squared channel scales by group, the bound and the widening.
    """
    table = table_of(args)
    return signs, args[_OUT] != 0, grain_of(table), room_at(args, _NORMS_ROOM), bound_of(table), args[_WIDENING]


def code_signs(dtype: str, terms: int) -> Any:
    """A work over tiles: signs, row scales, sums of squares by channel, and what the receiver makes of them."""
    elements_at, source_of = ELEMENTS_AT[dtype], SOURCES[terms]

    def body(args: Any) -> int:
        source, target = source_of(args, elements_at), target_of(args, elements_at)
        given = source, target, bytes_at(args, _CODES), room_at(args, _C_ROOM), SIGN, 1, sixteen_at(table_of(args), 0)
        _for_tiles(_products, _zeros, _settle_signs, apply_step, _known(args, True), given, args, source)
        return 0

    return body


def code_nearest(dtype: str, terms: int, bits: int, borders: int, trits: bool) -> Any:
    """The same for codes of the nearest magnitude and the sign."""
    elements_at, source_of = ELEMENTS_AT[dtype], SOURCES[terms]
    settle = _settle_trits if trits else _settle_nearest

    def body(args: Any) -> int:
        table, source = table_of(args), source_of(args, elements_at)
        given = (
            source,
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
        _for_tiles(_moments, _two_zeros, settle, nearest_step, _known(args, False), given, args, source)
        return 0

    return body


def code_reaching(dtype: str, terms: int, kind: int) -> Any:
    """The same for integers and float8."""
    elements_at, source_of = ELEMENTS_AT[dtype], SOURCES[terms]

    def body(args: Any) -> int:
        source = source_of(args, elements_at)
        given = (
            source,
            target_of(args, elements_at),
            bytes_at(args, _CODES),
            room_at(args, _C_ROOM),
            room_at(args, _INVERSE_C_ROOM),
            kind,
            args[_OUT] != 0,
        )
        _for_tiles(_reach, _no_bits, _settle_reach, reaching_step, _known(args, False), given, args, source)
        return 0

    return body


def fold_squares() -> Any:
    """A work over runs of 64 channels: fold the tiles' sums of squares, and store their roots."""

    def body(args: Any) -> int:
        channels, tiles, sums, stored = args[_CHANNELS], args[_TILES], room_at(args, _FIRST_ROOM), stored_scales(args)
        runs = (channels + LANES - 1) // LANES
        lo, hi = next_part(args, _FOLD)
        while lo < hi:
            for one in range(lo, hi):
                group, j = one // runs, one % runs * LANES
                at = group * tiles * channels + j
                fold_run(sums, at, tiles, channels, channels - j, False)
                for i in range(0, min(LANES, channels - j), 16):
                    roots = root(sixteen_at(sums, at + i))
                    roots = storable(choose(roots < _LARGEST_STORED, roots, _LARGEST_STORED), False)
                    store_bf16(roots, stored, group * channels + j + i, min(16, channels - j - i))
            lo, hi = next_part(args, _FOLD)
        return 0

    return body


@inlined
def _take_scales(args: Any, inverses: bool) -> None:
    """Copy the channel scales that both ends hold; ``inverses``: with 1 / c, and by group the sum of their squares."""
    held, channels = floats_at(longs_at(args, _HISTORY), 0), args[_CHANNELS]
    c, inverse, weights = room_at(args, _C_ROOM), room_at(args, _INVERSE_C_ROOM), room_at(args, _NORMS_ROOM)
    for group in range(args[_GROUPS]):
        lanes, first = zeros(), group * channels
        for j in range(0, channels, LANES):
            some = load_first(held, first + j, channels - j)
            store_first(some, c, first + j, channels - j)
            if inverses:
                lanes = lanes + some * some
                positive = some > _f32(0)
                safe = where(positive, some, _f32(1))
                store_first(where(positive, _f32(1) / safe, _f32(0)), inverse, first + j, channels - j)
        if inverses:
            weights[group] = folded(lanes)


@inlined
def _roots_at(stored: Any, at: int, count: int) -> Any:
    some = load_first(stored, at, count)
    some = where(some >= _SMALLEST_STORED, some, _f32(0))
    return where(some <= _LARGEST_STORED, some, _f32(0))


@inlined
def _settle_next(args: Any) -> None:
    """Write the channel scales of the next frame: ``reference.history.scales_after``."""
    held, after, channels = (
        floats_at(longs_at(args, _HISTORY), 0),
        floats_at(longs_at(args, _HISTORY), 1),
        args[_CHANNELS],
    )
    stored, per_channel = stored_scales(args), _FLOOR / _f32(args[_CHANNELS])
    for group in range(args[_GROUPS]):
        first, bits = group * channels, no_bits()
        for j in range(0, channels, LANES):
            bits = larger(bits, bits_of_magnitude(_roots_at(stored, first + j, channels - j)))
        top, lanes = largest(bits), zeros()
        exponent = np.int64(np.uint32(_f32(top).view(np.uint32) >> np.uint32(23)))
        norm = _f32(0.5) * np.uint32(min(max(254 - exponent, 1), 254) << 23).view(_f32)
        for j in range(0, channels, LANES):
            some = _roots_at(stored, first + j, channels - j) * norm
            some = where(some >= _SMALLEST, some, _f32(0))
            store_first(some, after, first + j, channels - j)
            lanes = lanes + some
        floor = folded(lanes) * per_channel
        for j in range(0, channels, LANES):
            some, before = load_first(after, first + j, channels - j), load_first(held, first + j, channels - j)
            if top > _f32(0):
                raised = where(some > floor, some, floor)
                some = where(some > _f32(0), raised, where(before > _f32(0), raised, _f32(0)))
            else:
                some = before
            store_first(some, after, first + j, channels - j)


@inlined
def _all_safe(args: Any) -> bool:
    stat, rows = room_at(args, _STAT_ROOM), args[_ROWS]
    for group in range(args[_GROUPS]):
        top = _f32(0)
        for row in range(group * rows, (group + 1) * rows):
            if not stat[row] <= _HIGHEST:  # NaN as well
                return False
            top = max(top, stat[row])
        if not is_safe(top):
            return False
    return True


def encode() -> Any:
    """Encode with channel scales from the frame before; 0 to decline."""

    def body(args: Any) -> int:
        clear_padding(args)
        args[_SUM] = 0
        _take_scales(args, True)
        run(args, _FIRST_PASS)
        if not _all_safe(args):
            return 0
        run(args, _FOLD)
        _settle_next(args)
        if args[_APART] != 0:
            run(args, _APART_PASS)
        add_rest(args)
        return 1

    return body


def decode() -> Any:
    """Decode with channel scales from the frame before; 0 to decline."""

    def body(args: Any) -> int:
        t, stored, bad = room_at(args, _T_ROOM), _row_scales(args), 0
        for row in range(args[_ROW_COUNT]):
            t[row] = np.uint32(np.uint32(stored[row]) << np.uint32(16)).view(_f32)
            bad += 0 if t[row] >= _f32(0) and t[row] <= _LARGEST_SCALE else 1
        if bad:
            return 0
        _take_scales(args, False)
        if args[_APART] != 0:
            run(args, _APART_PASS)
        run(args, _SECOND_PASS)
        _settle_next(args)
        return 1

    return body
