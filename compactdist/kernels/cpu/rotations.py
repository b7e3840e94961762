"""Jacobi sweeps compiled by Numba: the bits of ``reference/rotations.py``, a round's moves folded into its writes."""

from __future__ import annotations

from typing import Any

import numpy as np

from compactdist.kernels.cpu import call
from compactdist.kernels.cpu.simd.jit import inlined
from compactdist.kernels.cpu.simd.slots import floats_at, next_part, own_room, shifted_floats

_f32, _at = np.float32, np.uintp
_FIRST_PASS, _X, _OUT, _LENGTH, _NUMBERS = call.FIRST_PASS, call.X, call.OUT, call.LENGTH, call.NUMBERS


@inlined
def _settle_angles(matrix: Any, n: int, smallest: Any, cosines: Any, sines: Any) -> None:
    half = n // 2
    for i in range(half):
        j = i + half
        first, second, between = matrix[i * n + i], matrix[j * n + j], matrix[i * n + j]
        cosine, sine = _f32(1), _f32(0)
        if not between * between <= smallest * abs(first * second):
            ratio = (second - first) / (between + between)
            tangent = _f32(1) / (abs(ratio) + np.sqrt(_f32(1) + ratio * ratio))
            tangent = -tangent if ratio < _f32(0) else tangent
            cosine = _f32(1) / np.sqrt(_f32(1) + tangent * tangent)
            sine = tangent * cosine
        cosines[_at(i)], sines[_at(i)] = cosine, sine


@inlined
def _turn_rows(given: Any, out: Any, n: int, cosines: Any, sines: Any) -> None:
    half = n // 2
    for i in range(half):
        # where the rows of places i and i + half go
        upper = 0 if i == 0 else (n - 1 if i == half - 1 else i + 1)
        lower = 1 if i == 0 else half + i - 1
        a, b = shifted_floats(given, i * n), shifted_floats(given, (i + half) * n)
        to_a, to_b = shifted_floats(out, upper * n), shifted_floats(out, lower * n)
        cosine, sine = cosines[_at(i)], sines[_at(i)]
        for j in range(n):
            x, y = a[_at(j)], b[_at(j)]
            to_a[_at(j)] = cosine * x - sine * y
            to_b[_at(j)] = sine * x + cosine * y


@inlined
def _turn_columns(given: Any, out: Any, n: int, cosines: Any, sines: Any) -> None:
    half = n // 2
    for row in range(n):
        a, to = shifted_floats(given, row * n), shifted_floats(out, row * n)
        b, to_a, to_b = shifted_floats(a, half), shifted_floats(to, 1), shifted_floats(to, half - 1)
        for i in range(1, half - 1):
            to_a[_at(i)] = cosines[_at(i)] * a[_at(i)] - sines[_at(i)] * b[_at(i)]
        for i in range(1, half):
            to_b[_at(i)] = sines[_at(i)] * a[_at(i)] + cosines[_at(i)] * b[_at(i)]
        last = half - 1
        to[0] = cosines[0] * a[0] - sines[0] * b[0]
        to[1] = sines[0] * a[0] + cosines[0] * b[0]
        to[n - 1] = cosines[last] * a[last] - sines[last] * b[last]


def sweep() -> Any:
    """Matrices and bases ``(M, n, n)`` in place, n even and at least 4; the number taken is the smallest angle."""

    def body(args: Any) -> int:
        n, smallest = args[_LENGTH], floats_at(args, _NUMBERS)[0]
        size = n * n
        room = own_room(args, _FIRST_PASS)
        other, cosines = shifted_floats(room, size), shifted_floats(room, 2 * size)
        sines = shifted_floats(cosines, n // 2)
        lo, hi = next_part(args, _FIRST_PASS)
        while lo < hi:
            for one in range(lo, hi):
                matrix, basis = shifted_floats(floats_at(args, _X), one * size), floats_at(args, _OUT)
                given, taken = shifted_floats(basis, one * size), other
                for _ in range(n - 1):
                    _settle_angles(matrix, n, smallest, cosines, sines)
                    _turn_rows(matrix, room, n, cosines, sines)
                    _turn_columns(room, matrix, n, cosines, sines)
                    _turn_rows(given, taken, n, cosines, sines)
                    given, taken = taken, given
                for j in range(size):  # after an odd number of rounds the basis lies in the other room
                    taken[_at(j)] = given[_at(j)]
            lo, hi = next_part(args, _FIRST_PASS)
        return 0

    return body
