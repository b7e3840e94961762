"""The second pass over the elements where scales belong to rows and channels, and the receiver's only one.

What both ends compute is in the order of ``reference.py`` to the bit, so ``fastmath`` is out of the question. Loops
read into a small buffer before they write, for input and output may be the same memory.

A *place* is what tells where matrix elements lie: ``(row_at, chunk_at, chunk_from, chunk_len, rows, channels,
numel)``, see ``places.py``. A *source* is ``(x, base, velocity, terms)``: bits, of which the first ``1 + terms`` are
there. A *tile* is 64 rows of one group. All arrays are flat.

Numba looks at one file's date to tell whether its cache on disk still holds, and does not see what the file imports:
after a change in ``cpu_elements.py``, ``cpu_codes.py`` or ``cpu_vectors.py``, touch this one.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from compactdist.codecs.kernels.cpu_codes import look_up, nearest_index, nearest_step, pack, unpack
from compactdist.codecs.kernels.cpu_elements import (
    Array,
    finish,
    jit,
    predict,
    subtract,
)
from compactdist.codecs.kernels.cpu_vectors import (
    data_of,
    load_word,
    negate_where_clear,
    stack_codes,
    stack_floats,
)
from compactdist.codecs.kernels.reference import LANES

_u32, _f32, _at = np.uint32, np.float32, np.uintp


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

    Borders are a tuple, so that the search among them is unrolled. ``out`` may be empty. The sign is the bit above the
    index; trits are 0, or 1 and 2 for a sign.
    """
    x, base, velocity, terms = source
    row_at, chunk_at, chunk_from, chunk_len, rows, channels, numel = place
    values, expected, code = stack_floats(), stack_floats(), stack_codes()
    xs, bases, velocities, bytes_, outs = data_of(x), data_of(base), data_of(velocity), data_of(packed), data_of(out)
    cs, inverses, levels = data_of(c), data_of(inverse_c), data_of(table)
    sign = _u32(len(borders) + 1)
    for row in range(lo, hi):
        weight, inverse_weight = t[row], inverse_t[row]
        for k in range(chunk_at.size):
            n, s, at = chunk_len[k], _at(row // rows * channels + chunk_at[k]), row_at[row] + chunk_from[k]
            predict(bases, velocities, terms, at, numel, expected, n)
            subtract(xs, at, numel, expected, values, n)
            for j in range(n):
                value = values[_at(j)]
                u = abs(value) * inverses[s + _at(j)] * inverse_weight
                index = nearest_index(u, borders)
                below = _u32(index << _u32(1)) if trits else _u32(index | sign)
                code[_at(j)] = np.uint8(below if value < _f32(0) else index)
            look_up(code, levels, n, values)
            for j in range(n):
                values[_at(j)] = (weight * cs[s + _at(j)]) * values[_at(j)]
            if out.size:
                finish(expected, values, limit, outs, at, numel, n)
            pack(code, bits, n, bytes_, row * channels + chunk_at[k])


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
    x, base, velocity, terms = source
    row_at, chunk_at, chunk_from, chunk_len, rows, channels, numel = place
    values, expected = stack_floats(), stack_floats()
    xs, bases, velocities, bytes_, outs = data_of(x), data_of(base), data_of(velocity), data_of(packed), data_of(out)
    cs, inverses = data_of(c), data_of(inverse_c)
    for row in range(lo, hi):
        weight, inverse_weight = t[row], inverse_t[row]
        for k in range(chunk_at.size):
            n, s, at = chunk_len[k], _at(row // rows * channels + chunk_at[k]), row_at[row] + chunk_from[k]
            predict(bases, velocities, terms, at, numel, expected, n)
            subtract(xs, at, numel, expected, values, n)
            p = _at(row * channels + chunk_at[k])
            for j in range(n):
                value = values[_at(j)]
                steps = nearest_step(abs(value) * inverses[s + _at(j)] * inverse_weight, largest, value)
                bytes_[p + _at(j)] = np.uint8(np.int32(steps))
                values[_at(j)] = (weight * cs[s + _at(j)]) * (steps + _f32(0))  # a code has no -0
            if out.size:
                finish(expected, values, limit, outs, at, numel, n)


@jit
def apply_signs(
    packed: Array,
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
    """For rows ``lo`` to ``hi``: ``out = expected + t * c`` or ``- t * c``, kept within ``limit`` and rounded."""
    row_at, chunk_at, chunk_from, chunk_len, rows, channels, numel = place
    change, expected, one = stack_floats(), stack_floats(), stack_codes()
    bases, velocities, bytes_, outs, cs = data_of(base), data_of(velocity), data_of(packed), data_of(out), data_of(c)
    for row in range(lo, hi):
        weight = t[row]
        for k in range(chunk_at.size):
            n, s, at = chunk_len[k], _at(row // rows * channels + chunk_at[k]), row_at[row] + chunk_from[k]
            element, whole = row * channels + chunk_at[k], n // LANES
            for j in range(n):
                change[_at(j)] = weight * cs[s + _at(j)]
            for i in range(whole):
                negate_where_clear(load_word(bytes_, _at((element >> 3) + 8 * i)), change, _at(i * LANES))
            rest, o = n - whole * LANES, _at(whole * LANES)
            unpack(bytes_, 1, element + whole * LANES, one, rest)
            for j in range(rest):
                change[o + _at(j)] = change[o + _at(j)] if one[_at(j)] else -change[o + _at(j)]
            predict(bases, velocities, terms, at, numel, expected, n)
            finish(expected, change, limit, outs, at, numel, n)


@jit
def apply_levels(
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
    """For rows ``lo`` to ``hi``: ``out = expected + (t * c) * level``; codes below 16 choose among 16 levels."""
    levels = data_of(table)
    row_at, chunk_at, chunk_from, chunk_len, rows, channels, numel = place
    change, expected, code = stack_floats(), stack_floats(), stack_codes()
    bases, velocities, bytes_, outs, cs = data_of(base), data_of(velocity), data_of(packed), data_of(out), data_of(c)
    for row in range(lo, hi):
        weight = t[row]
        for k in range(chunk_at.size):
            n, s, at = chunk_len[k], _at(row // rows * channels + chunk_at[k]), row_at[row] + chunk_from[k]
            unpack(bytes_, bits, row * channels + chunk_at[k], code, n)
            look_up(code, levels, n, change)
            for j in range(n):
                change[_at(j)] = (weight * cs[s + _at(j)]) * change[_at(j)]
            predict(bases, velocities, terms, at, numel, expected, n)
            finish(expected, change, limit, outs, at, numel, n)


@jit
def apply_integers(
    packed: Array,
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
    """The same for codes that are integers, a byte each, in two's complement."""
    row_at, chunk_at, chunk_from, chunk_len, rows, channels, numel = place
    change, expected = stack_floats(), stack_floats()
    bases, velocities, bytes_, outs, cs = data_of(base), data_of(velocity), data_of(packed), data_of(out), data_of(c)
    for row in range(lo, hi):
        weight = t[row]
        for k in range(chunk_at.size):
            n, s, at = chunk_len[k], _at(row // rows * channels + chunk_at[k]), row_at[row] + chunk_from[k]
            p = _at(row * channels + chunk_at[k])
            for j in range(n):
                change[_at(j)] = (weight * cs[s + _at(j)]) * _f32(np.int8(bytes_[p + _at(j)]))
            predict(bases, velocities, terms, at, numel, expected, n)
            finish(expected, change, limit, outs, at, numel, n)
