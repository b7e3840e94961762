"""The second pass over the elements where scales belong to rows and channels, and the receiver's only one.

What both ends compute is in the order of ``reference.py`` to the bit, so ``fastmath`` is out of the question.
Sixty-four elements are read before any is written, for input and output may be the same memory.

A *place* is what tells where matrix elements lie: ``(row_at, chunk_at, chunk_from, chunk_len, rows, channels,
numel)``, see ``places.py``. A *source* is ``(x, base, velocity, terms)``: bits, of which the first ``1 + terms`` are
there. A *tile* is 64 rows of one group. All arrays are flat.

Numba looks at one file's date to tell whether its cache on disk still holds, and does not see what the file imports:
after a change in the files this one imports, touch it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from compactdist.codecs.kernels.cpu_elements import ROUNDING, Array, inlined, jit
from compactdist.codecs.kernels.cpu_memory import data_of, load_first, pointers_of, settle_streams, table_at
from compactdist.codecs.kernels.cpu_packing import store_codes
from compactdist.codecs.kernels.cpu_steps import (
    AHEAD,
    ask_for,
    change_by_integer,
    change_by_level,
    change_by_sign,
    expected_at,
    nearest_codes,
    nearest_steps,
    put,
)
from compactdist.codecs.kernels.cpu_vectors import bits_of, chosen, magnitude
from compactdist.codecs.kernels.reference import LANES

_f32 = np.float32


@jit
def code_nearest(
    lo: int,
    hi: int,
    source: Any,
    place: Any,
    packed: Array,
    out: Array,
    streams: bool,
    t: Array,
    inverse_t: Array,
    c: Array,
    inverse_c: Array,
    bits: int,
    borders: Any,
    table: Array,
    trits: bool,
) -> None:
    """For rows ``lo`` to ``hi``: codes of the nearest magnitude and the sign, and what the receiver makes of them.

    Borders are a tuple, so that the search among them is unrolled. ``out`` may be empty.
    """
    given, bytes_, target = pointers_of(source), data_of(packed), (data_of(out), streams)
    row_at, chunk_at, chunk_from, chunk_len, rows, channels, numel = place
    cs, inverses, levels = data_of(c), data_of(inverse_c), table_at(data_of(table), 0)
    for row in range(lo, hi):
        weight, inverse_weight, first = t[row], inverse_t[row], row // rows * channels
        for k in range(chunk_at.size):
            n, left, at = chunk_len[k], chunk_at[k], row_at[row] + chunk_from[k]
            for j in range(0, n, LANES):
                count, have, s = n - j, min(n, numel - at) - j, first + left + j
                ask_for(given, at + j + AHEAD)
                expected = expected_at(given, at + j, have)
                value = load_first(given[0], at + j, have) - expected
                u = magnitude(value) * load_first(inverses, s, count) * inverse_weight
                codes = nearest_codes(u, value < _f32(0), borders, trits)
                store_codes(codes, bits, bytes_, row * channels + left + j, count)
                if out.size:
                    change = (load_first(cs, s, count) * weight) * chosen(levels, codes)
                    put(expected, change, target, at + j, have)
    settle_streams()


@jit
def code_linear(
    lo: int,
    hi: int,
    source: Any,
    place: Any,
    packed: Array,
    out: Array,
    streams: bool,
    t: Array,
    inverse_t: Array,
    c: Array,
    inverse_c: Array,
    largest: Any,
) -> None:
    """For rows ``lo`` to ``hi``: the nearest integer of ``m / (t * c)`` with the sign of the element, in a byte."""
    given, bytes_, target = pointers_of(source), data_of(packed), (data_of(out), streams)
    row_at, chunk_at, chunk_from, chunk_len, rows, channels, numel = place
    cs, inverses = data_of(c), data_of(inverse_c)
    for row in range(lo, hi):
        weight, inverse_weight, first = t[row], inverse_t[row], row // rows * channels
        for k in range(chunk_at.size):
            n, left, at = chunk_len[k], chunk_at[k], row_at[row] + chunk_from[k]
            for j in range(0, n, LANES):
                count, have, s = n - j, min(n, numel - at) - j, first + left + j
                ask_for(given, at + j + AHEAD)
                expected = expected_at(given, at + j, have)
                value = load_first(given[0], at + j, have) - expected
                steps = nearest_steps(value * load_first(inverses, s, count) * inverse_weight, largest)
                store_codes(bits_of(steps), 8, bytes_, row * channels + left + j, count)
                if out.size:
                    change = (load_first(cs, s, count) * weight) * (steps - ROUNDING)
                    put(expected, change, target, at + j, have)
    settle_streams()


@inlined
def _apply(lo: int, hi: int, change_by: Any, given: Any, place: Any, out: Array, streams: bool) -> None:
    packed, bits, table, t, c, base, velocity, terms = given
    row_at, chunk_at, chunk_from, chunk_len, rows, channels, numel = place
    source = data_of(base), data_of(base), data_of(velocity), terms
    bytes_, target, cs, levels = data_of(packed), (data_of(out), streams), data_of(c), table_at(data_of(table), 0)
    for row in range(lo, hi):
        weight, first = t[row], row // rows * channels
        for k in range(chunk_at.size):
            n, left, at = chunk_len[k], chunk_at[k], row_at[row] + chunk_from[k]
            for j in range(0, n, LANES):
                count, have = n - j, min(n, numel - at) - j
                scale = load_first(cs, first + left + j, count) * weight
                change = change_by(scale, bytes_, bits, levels, row * channels + left + j, count)
                put(expected_at(source, at + j, have), change, target, at + j, have)
    settle_streams()


@jit
def apply_signs(lo: int, hi: int, given: Any, place: Any, out: Array, streams: bool) -> None:
    """For rows ``lo`` to ``hi``: ``out = expected + t * c`` or ``- t * c``, rounded and kept finite.

    What is given: packed codes, their bits, the table of levels, t, c, base, velocity, and how many of the latter.
    """
    _apply(lo, hi, change_by_sign, given, place, out, streams)


@jit
def apply_levels(lo: int, hi: int, given: Any, place: Any, out: Array, streams: bool) -> None:
    """The same for ``(t * c) * level``; codes below 16 choose among 16 levels."""
    _apply(lo, hi, change_by_level, given, place, out, streams)


@jit
def apply_integers(lo: int, hi: int, given: Any, place: Any, out: Array, streams: bool) -> None:
    """The same for codes that are integers, a byte each, in two's complement."""
    _apply(lo, hi, change_by_integer, given, place, out, streams)
