"""The second pass over the elements where scales belong to rows and channels, and the receiver's only one.

What both ends compute is in the order of ``reference.py`` to the bit, so ``fastmath`` is out of the question.
Sixty-four elements are read before any is written, for input and output may be the same memory.

A loop is made for a kind of code, and for whether there is ``one`` term, the usual thing, or any number. What is fixed
is constant to the compiler, and the loop holds nothing that it does not need. Where 64 elements are left of a row,
nothing asks how many there are. ``out`` may be empty, and is written past the caches if that is said.

A *place* is what tells where matrix elements lie: ``(row_at, chunk_at, chunk_from, chunk_len, rows, channels,
numel)``, see ``places.py``. A *source* is ``(x, base, velocity, terms)``: bits, of which the first ``1 + terms`` are
there. A *tile* is 64 rows of one group. *Parts* are what threads take, see ``next_part``. All arrays are flat.

Numba looks at one file's date to tell whether its cache on disk still holds, and does not see what the file imports:
after a change in the files this one imports, touch it.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from compactdist.kernels.cpu_elements import Array, inlined, jit, next_part
from compactdist.kernels.cpu_memory import data_of, load_first, pointers_of, settle_streams, sixteen_at
from compactdist.kernels.cpu_packing import store_codes
from compactdist.kernels.cpu_settle import LINEAR
from compactdist.kernels.cpu_steps import (
    AHEAD,
    ask_for,
    ask_for_expected,
    change_of,
    expected_at,
    nearest_codes,
    put,
    reaching,
    search_of,
)
from compactdist.kernels.cpu_vectors import chosen, magnitude
from compactdist.kernels.reference import LANES

_AHEAD_OF_LITTLE = 3 * AHEAD
"""Where there is little to compute, memory has to be asked earlier."""

_f32 = np.float32


@inlined
def _for_all(step: Any, given: Any, parts: Array, place: Any, weights: Any) -> None:
    """A step for all elements of some rows, 64 at a time.

    It gets what is given, its row's weights, where elements lie, the positions of the first among them, among the
    channels of all groups and among the codes, how many channels there are from there on, and how many elements.
    """
    row_at, chunk_at, chunk_from, chunk_len, rows, channels, numel = place
    t, inverse_t = weights
    lo, hi = next_part(parts)
    while lo < hi:
        for row in range(lo, hi):
            pair = t[row], inverse_t[row]
            for k in range(chunk_at.size):
                n, left, at = chunk_len[k], chunk_at[k], row_at[row] + chunk_from[k]
                channel, code, have = row // rows * channels + left, row * channels + left, min(n, numel - at)
                whole = max(have, 0) // LANES * LANES
                for j in range(0, whole, LANES):
                    step(given, pair, at + j, channel + j, code + j, LANES, LANES)
                for j in range(whole, n, LANES):
                    step(given, pair, at + j, channel + j, code + j, n - j, have - j)
        lo, hi = next_part(parts)
    settle_streams()


@inlined
def _nearest(given: Any, weights: Any, at: int, channel: int, code: int, count: int, have: int) -> None:
    source, target, to, cs, inverses, levels, bits, search, trits, stores = given
    ask_for(source, at + AHEAD)
    expected = expected_at(source, at, have)
    value = load_first(source[0], at, have) - expected
    u = magnitude(value) * load_first(inverses, channel, count) * weights[1]
    codes = nearest_codes(value, u, search, trits)
    store_codes(codes, bits, to, code, count)
    if stores:
        change = (load_first(cs, channel, count) * weights[0]) * chosen(levels, codes)
        put(expected, change, target, at, have)


@inlined
def _reaching(given: Any, weights: Any, at: int, channel: int, code: int, count: int, have: int) -> None:
    source, target, to, cs, inverses, kind, stores = given
    ask_for(source, at + AHEAD)
    expected = expected_at(source, at, have)
    value = load_first(source[0], at, have) - expected
    u = value * load_first(inverses, channel, count) * weights[1]
    scale = load_first(cs, channel, count) * weights[0]
    codes, change = reaching(kind, u, value < _f32(0), scale)
    store_codes(codes, -8 if kind == LINEAR else 8, to, code, count)
    if stores:
        put(expected, change, target, at, have)


@inlined
def _apply(given: Any, weights: Any, at: int, channel: int, code: int, count: int, have: int) -> None:
    source, target, packed, cs, kind, bits, levels = given
    ask_for_expected(source, at + _AHEAD_OF_LITTLE)
    scale = load_first(cs, channel, count) * weights[0]
    put(expected_at(source, at, have), change_of(kind, scale, packed, bits, levels, code, count), target, at, have)


@cache
def code_nearest(one: bool, bits: int, trits: bool) -> Any:
    """For parts of the rows: codes of the nearest magnitude and the sign, and what the receiver makes of them.

    Borders are a tuple, so that the search among them is unrolled.
    """

    @jit
    def loop(
        parts: Array,
        source: Any,
        place: Any,
        packed: Array,
        out: Array,
        streams: Any,
        t: Array,
        inverse_t: Array,
        c: Array,
        inverse_c: Array,
        borders: Any,
        table: Array,
    ) -> None:
        target, levels = (data_of(out), streams[0]), sixteen_at(data_of(table), 0)
        scales = data_of(c), data_of(inverse_c)
        given = (
            pointers_of(source, one),
            target,
            (data_of(packed), streams[1]),
            *scales,
            levels,
            bits,
            search_of(borders, data_of(table)),
            trits,
            out.size > 0,
        )
        _for_all(_nearest, given, parts, place, (data_of(t), data_of(inverse_t)))

    return loop


@cache
def code_reaching(one: bool, kind: int) -> Any:
    """For parts of the rows: the nearest integer or float8 of ``m / (t * c)`` with the sign of the element."""

    @jit
    def loop(
        parts: Array,
        source: Any,
        place: Any,
        packed: Array,
        out: Array,
        streams: Any,
        t: Array,
        inverse_t: Array,
        c: Array,
        inverse_c: Array,
    ) -> None:
        scales = data_of(c), data_of(inverse_c)
        target, to = (data_of(out), streams[0]), (data_of(packed), streams[1])
        given = pointers_of(source, one), target, to, *scales, kind, out.size > 0
        _for_all(_reaching, given, parts, place, (data_of(t), data_of(inverse_t)))

    return loop


@cache
def apply_codes(one: bool, kind: int, bits: int) -> Any:
    """For parts of the rows: ``out = expected + change``, rounded, kept finite; ``change_of`` tells the kinds.

    The source's first two are both the base.
    """

    @jit
    def loop(
        parts: Array,
        source: Any,
        place: Any,
        packed: Array,
        out: Array,
        streams: Any,
        t: Array,
        c: Array,
        table: Array,
    ) -> None:
        levels, target = sixteen_at(data_of(table), 0), (data_of(out), streams[0])
        given = pointers_of(source, one), target, data_of(packed), data_of(c), kind, bits, levels
        _for_all(_apply, given, parts, place, (data_of(t), data_of(t)))

    return loop
