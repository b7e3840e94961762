"""Jacobi sweeps compiled by Numba: the bits of ``reference/rotations.py``.

Nothing moves on: who meets whom in a round is computed. A pair that stays as it is costs a comparison.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from compactdist.kernels.cpu import call
from compactdist.kernels.cpu.simd.jit import inlined
from compactdist.kernels.cpu.simd.slots import floats_at, longs_at, next_part, own_room, shifted_floats

_f32, _at = np.float32, np.uintp
_FIRST_PASS, _X, _OUT, _LENGTH, _NUMBERS = call.FIRST_PASS, call.X, call.OUT, call.LENGTH, call.NUMBERS
_CHANNELS, _ROW_AT = call.CHANNELS, call.ROW_AT


@inlined
def _at_place(place: int, turn: int, n: int) -> int:
    """Who is at a place in a round: all but the first walk 1, 2, ... n / 2 - 1, n - 1, n - 2, ... n / 2, 1."""
    if place == 0:
        return 0
    half = n // 2
    walked = place - 1 if place < half else half - 2 + n - place
    walked -= turn  # fewer than n - 1; a division would take longer than all else about a pair that stays
    walked = walked + n - 1 if walked < 0 else walked
    return walked + 1 if walked < half - 1 else half - 2 + n - walked


@inlined
def _settle_pairs(matrix: Any, n: int, pitch: int, turn: int, smallest: Any, pairs: Any) -> int:
    """The pairs of a round that rotate, four numbers each: one, other, cosine, sine. How many they are."""
    half, count = n // 2, 0
    for place in range(half):
        i, j = _at_place(place, turn, n), _at_place(place + half, turn, n)
        first, second, between = matrix[i * pitch + i], matrix[j * pitch + j], matrix[i * pitch + j]
        if not between * between <= smallest * abs(first * second):
            ratio = (second - first) / (between + between)
            tangent = _f32(1) / (abs(ratio) + np.sqrt(_f32(1) + ratio * ratio))
            tangent = -tangent if ratio < _f32(0) else tangent
            cosine = _f32(1) / np.sqrt(_f32(1) + tangent * tangent)
            pair = shifted_floats(pairs, 4 * count)
            pair[0], pair[1], pair[2], pair[3] = _f32(i), _f32(j), cosine, tangent * cosine
            count += 1
    return count


@inlined
def _turn_rows(rows: Any, pitch: int, length: int, pairs: Any, count: int) -> None:
    for k in range(count):
        i, j = np.int64(pairs[4 * k]), np.int64(pairs[4 * k + 1])
        cosine, sine = pairs[4 * k + 2], pairs[4 * k + 3]
        a, b = shifted_floats(rows, i * pitch), shifted_floats(rows, j * pitch)
        for m in range(length):
            x, y = a[_at(m)], b[_at(m)]
            a[_at(m)] = cosine * x - sine * y
            b[_at(m)] = sine * x + cosine * y


@inlined
def _turn_columns(matrix: Any, n: int, pitch: int, pairs: Any, count: int) -> None:
    for row in range(n):
        a = shifted_floats(matrix, row * pitch)
        for k in range(count):
            i, j = np.int64(pairs[4 * k]), np.int64(pairs[4 * k + 1])
            x, y, cosine, sine = a[i], a[j], pairs[4 * k + 2], pairs[4 * k + 3]
            a[i] = cosine * x - sine * y
            a[j] = sine * x + cosine * y


def sweep() -> Any:
    """Matrices ``(M, n, n)`` and bases ``(M, n, k)`` in place, of each as many rows as its size says, even and at least
    4; the number taken is the smallest angle.
    """

    def body(args: Any) -> int:
        pitch, width, smallest = args[_LENGTH], args[_CHANNELS], floats_at(args, _NUMBERS)[0]
        pairs, sizes = own_room(args, _FIRST_PASS), longs_at(args, _ROW_AT)
        lo, hi = next_part(args, _FIRST_PASS)
        while lo < hi:
            for one in range(lo, hi):
                n, matrix = sizes[one], shifted_floats(floats_at(args, _X), one * pitch * pitch)
                basis = shifted_floats(floats_at(args, _OUT), one * pitch * width)
                for turn in range(n - 1):
                    count = _settle_pairs(matrix, n, pitch, turn, smallest, pairs)
                    if count > 0:
                        _turn_rows(matrix, pitch, n, pairs, count)
                        _turn_columns(matrix, n, pitch, pairs, count)
                        _turn_rows(basis, width, width, pairs, count)
            lo, hi = next_part(args, _FIRST_PASS)
        return 0

    return body
