"""The second pass over the elements where scales belong to rows and channels, and the receiver's only one.

What both ends compute is in the order of ``reference.py`` to the bit, so ``fastmath`` is out of the question. Sixty-four
elements are read before any is written, for input and output may be the same memory.

A *place* is what tells where matrix elements lie: ``(row_at, chunk_at, chunk_from, chunk_len, rows, channels,
numel)``, see ``places.py``. A *source* is ``(x, base, velocity, terms)``: bits, of which the first ``1 + terms`` are
there. A *tile* is 64 rows of one group. All arrays are flat.

Numba looks at one file's date to tell whether its cache on disk still holds, and does not see what the file imports:
after a change in the files this one imports, touch it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from compactdist.codecs.kernels.cpu_elements import Array, inlined, jit
from compactdist.codecs.kernels.cpu_memory import data_of, load_first, pointers_of, store_codes, table_at
from compactdist.codecs.kernels.cpu_steps import (
    change_by_integer,
    change_by_level,
    change_by_sign,
    expected_at,
    nearest_codes,
    nearest_steps,
    put,
)
from compactdist.codecs.kernels.cpu_vectors import chosen, magnitude, whole_number
from compactdist.codecs.kernels.reference import LANES

_f32 = np.float32


@jit
def code_nearest(
    source: Any,
    place: Any,
    bits: int,
    borders: Any,
    table: Array,
    trits: bool,
    t: Array,
    inverse_t: Array,
    c: Array,
    inverse_c: Array,
    limit: Any,
    lo: int,
    hi: int,
    packed: Array,
    out: Array,
) -> None:
    """For rows ``lo`` to ``hi``: codes of the nearest magnitude and the sign, and what the receiver makes of them.

    Borders are a tuple, so that the search among them is unrolled. ``out`` may be empty.
    """
    given, bytes_, outs = pointers_of(source), data_of(packed), data_of(out)
    row_at, chunk_at, chunk_from, chunk_len, rows, channels, numel = place
    cs, inverses, levels = data_of(c), data_of(inverse_c), table_at(data_of(table), 0)
    for row in range(lo, hi):
        weight, inverse_weight, first = t[row], inverse_t[row], row // rows * channels
        for k in range(chunk_at.size):
            n, left, at = chunk_len[k], chunk_at[k], row_at[row] + chunk_from[k]
            for j in range(0, n, LANES):
                count, have, s = n - j, min(n, numel - at) - j, first + left + j
                expected = expected_at(given, at + j, have)
                value = load_first(given[0], at + j, have) - expected
                u = magnitude(value) * load_first(inverses, s, count) * inverse_weight
                codes = nearest_codes(u, value < _f32(0), borders, trits)
                store_codes(codes, bits, bytes_, row * channels + left + j, count)
                if out.size:
                    change = (load_first(cs, s, count) * weight) * chosen(levels, codes)
                    put(expected, change, limit, outs, at + j, have)


@jit
def code_linear(
    source: Any,
    place: Any,
    largest: Any,
    t: Array,
    inverse_t: Array,
    c: Array,
    inverse_c: Array,
    limit: Any,
    lo: int,
    hi: int,
    packed: Array,
    out: Array,
) -> None:
    """For rows ``lo`` to ``hi``: the nearest integer of ``m / (t * c)`` with the sign of the element, in a byte."""
    given, bytes_, outs = pointers_of(source), data_of(packed), data_of(out)
    row_at, chunk_at, chunk_from, chunk_len, rows, channels, numel = place
    cs, inverses = data_of(c), data_of(inverse_c)
    for row in range(lo, hi):
        weight, inverse_weight, first = t[row], inverse_t[row], row // rows * channels
        for k in range(chunk_at.size):
            n, left, at = chunk_len[k], chunk_at[k], row_at[row] + chunk_from[k]
            for j in range(0, n, LANES):
                count, have, s = n - j, min(n, numel - at) - j, first + left + j
                expected = expected_at(given, at + j, have)
                value = load_first(given[0], at + j, have) - expected
                u = magnitude(value) * load_first(inverses, s, count) * inverse_weight
                steps = nearest_steps(u, value < _f32(0), largest)
                store_codes(whole_number(steps), 8, bytes_, row * channels + left + j, count)
                if out.size:
                    change = (load_first(cs, s, count) * weight) * (steps + _f32(0))  # a code has no -0
                    put(expected, change, limit, outs, at + j, have)


@inlined
def _apply(
    change_by: Any,
    packed: Array,
    bits: int,
    table: Array,
    t: Array,
    c: Array,
    base: Array,
    velocity: Array,
    terms: int,
    place: Any,
    limit: Any,
    lo: int,
    hi: int,
    out: Array,
) -> None:
    row_at, chunk_at, chunk_from, chunk_len, rows, channels, numel = place
    given = data_of(base), data_of(base), data_of(velocity), terms
    bytes_, outs, cs, levels = data_of(packed), data_of(out), data_of(c), table_at(data_of(table), 0)
    for row in range(lo, hi):
        weight, first = t[row], row // rows * channels
        for k in range(chunk_at.size):
            n, left, at = chunk_len[k], chunk_at[k], row_at[row] + chunk_from[k]
            for j in range(0, n, LANES):
                count, have = n - j, min(n, numel - at) - j
                scale = load_first(cs, first + left + j, count) * weight
                change = change_by(scale, bytes_, bits, levels, row * channels + left + j, count)
                put(expected_at(given, at + j, have), change, limit, outs, at + j, have)


@jit
def apply_signs(packed: Array, bits: int, table: Array, t: Array, c: Array, base: Array, velocity: Array, terms: int, place: Any, limit: Any, lo: int, hi: int, out: Array) -> None:
    """For rows ``lo`` to ``hi``: ``out = expected + t * c`` or ``- t * c``, kept within ``limit`` and rounded."""
    _apply(change_by_sign, packed, bits, table, t, c, base, velocity, terms, place, limit, lo, hi, out)


@jit
def apply_levels(packed: Array, bits: int, table: Array, t: Array, c: Array, base: Array, velocity: Array, terms: int, place: Any, limit: Any, lo: int, hi: int, out: Array) -> None:
    """The same for ``(t * c) * level``; codes below 16 choose among 16 levels."""
    _apply(change_by_level, packed, bits, table, t, c, base, velocity, terms, place, limit, lo, hi, out)


@jit
def apply_integers(packed: Array, bits: int, table: Array, t: Array, c: Array, base: Array, velocity: Array, terms: int, place: Any, limit: Any, lo: int, hi: int, out: Array) -> None:
    """The same for codes that are integers, a byte each, in two's complement."""
    _apply(change_by_integer, packed, bits, table, t, c, base, velocity, terms, place, limit, lo, hi, out)
