"""Element conversions and the small loops under ``cpu_loops.py``, compiled by Numba.

Tensors come as bits: float32 as float32, bfloat16 as uint16, float16 as int16; the type chooses the conversion.

Loops index with unsigned numbers and an offset, never through slices: an unsigned index cannot mean "from the end",
so LLVM vectorises the loop, and a slice costs two atomic reference counts.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba.extending import overload

from compactdist.codecs.kernels.cpu_vectors import as_u32
from compactdist.codecs.kernels.reference import LANES

Array = Any
Pointer = Any
jit = numba.njit(cache=True, nogil=True, error_model="numpy")
inlined = numba.njit(cache=True, nogil=True, error_model="numpy", forceinline=True)
_u32, _f32, _at = np.uint32, np.float32, np.uintp

ROUNDING = np.float32(12582912.0)
"""1.5 * 2**23: adding it to what is below 2**22 rounds to an integer, half to even."""


def _widen(v: Any) -> Any:
    """An element as float32."""
    raise NotImplementedError


def _narrow(v: Any, like: Any) -> Any:
    """A float32 within the range of the element type of ``like``, rounded to nearest even."""
    raise NotImplementedError


def _narrow_finite(v: Any, like: Any) -> Any:
    """The same, of what is known to be a number."""
    raise NotImplementedError


def _widen_f32(v: Any) -> Any:
    return v


def _widen_bf16(v: Any) -> Any:
    return _u32(_u32(v) << _u32(16)).view(_f32)


def _widen_f16(v: Any) -> Any:
    bits = _u32(_u32(v) & _u32(0xFFFF))
    sign = _u32(_u32(bits & _u32(0x8000)) << _u32(16))
    body = _u32(_u32(bits & _u32(0x7FFF)) << _u32(13))
    normal = _u32(body + _u32(112 << 23))
    # Subnormals: with the exponent of 2**-14 and its implicit bit taken off again, all in normal numbers.
    small = _f32(_u32(body + _u32(113 << 23)).view(_f32) - _f32(6.103515625e-05)).view(_u32)
    out = small if body < _u32(0x400 << 13) else normal
    out = _u32(body + _u32(224 << 23)) if body >= _u32(0x7C00 << 13) else out
    return _u32(out | sign).view(_f32)


def _narrow_f32(v: Any, like: Any) -> Any:
    return v


def _narrow_bf16(v: Any, like: Any) -> Any:
    bits = _f32(v).view(_u32)
    rounded = _u32(_u32(bits + _u32(0x7FFF) + _u32(_u32(bits >> _u32(16)) & _u32(1))) >> _u32(16))
    return np.uint16(_u32(0x7FC0) if v != v else rounded)


def _narrow_finite_bf16(v: Any, like: Any) -> Any:
    bits = _f32(v).view(_u32)
    return np.uint16(_u32(bits + _u32(0x7FFF) + _u32(_u32(bits >> _u32(16)) & _u32(1))) >> _u32(16))


def _narrow_f16(v: Any, like: Any) -> Any:
    bits = _f32(v).view(_u32)
    sign = _u32(_u32(bits >> _u32(16)) & _u32(0x8000))
    body = _u32(bits & _u32(0x7FFFFFFF))
    normal = _u32(_u32(body - _u32(112 << 23) + _u32(0xFFF) + _u32(_u32(body >> _u32(13)) & _u32(1))) >> _u32(13))
    # Subnormals: adding 0.5 shifts the mantissa to where it belongs, and rounds it.
    small = _u32(_f32(body.view(_f32) + _f32(0.5)).view(_u32) - _u32(0x3F000000))
    out = small if body < _u32(113 << 23) else normal
    out = _u32(0x7C00) if body >= _u32(0x47800000) else out
    out = _u32(0x7E00) if body > _u32(0x7F800000) else out
    return np.int16(np.uint16(out | sign))


_WIDEN = {numba.float32: _widen_f32, numba.uint16: _widen_bf16, numba.int16: _widen_f16}
_NARROW = {numba.float32: _narrow_f32, numba.uint16: _narrow_bf16, numba.int16: _narrow_f16}
_NARROW_FINITE = {**_NARROW, numba.uint16: _narrow_finite_bf16}


@overload(_widen)
def _choose_widen(v: Any) -> Any:
    return _WIDEN[v]


@overload(_narrow)
def _choose_narrow(v: Any, like: Any) -> Any:
    return _NARROW[like.dtype]


@overload(_narrow_finite)
def _choose_narrow_finite(v: Any, like: Any) -> Any:
    return _NARROW_FINITE[like.dtype]


@jit
def convert_in(x: Array, out: Array) -> None:
    """Widen every element."""
    for j in range(x.size):
        out[j] = _widen(x[j])


@jit
def convert_out(x: Array, out: Array) -> None:
    """Round every float32 to the element type of ``out``."""
    for j in range(x.size):
        out[j] = _narrow(x[j], out)


@inlined
def predict(base: Pointer, velocity: Pointer, terms: int, at: int, limit: int, out: Pointer, n: int) -> None:
    """What was expected, ``n`` float32 elements from ``at`` on; zero past ``limit``.

    Of ``base`` and ``velocity``, the first ``terms`` are there.
    """
    valid = max(0, min(n, limit - at)) if terms else 0
    a = _at(at)
    if terms > 1:
        for j in range(valid):
            out[_at(j)] = _widen(base[a + _at(j)]) + _widen(velocity[a + _at(j)])
    else:
        for j in range(valid):
            out[_at(j)] = _widen(base[a + _at(j)])
    for j in range(valid, n):
        out[_at(j)] = _f32(0)


@inlined
def residual(
    x: Pointer, base: Pointer, velocity: Pointer, terms: int, at: int, limit: int, out: Pointer, to: int, n: int
) -> None:
    """``x`` less what was expected, ``n`` elements from ``at`` on, into ``out`` from ``to`` on; zero past ``limit``."""
    valid = max(0, min(n, limit - at))
    a, o = _at(at), _at(to)
    if terms == 0:
        for j in range(valid):
            out[o + _at(j)] = _widen(x[a + _at(j)])
    elif terms == 1:
        for j in range(valid):
            out[o + _at(j)] = _widen(x[a + _at(j)]) - _widen(base[a + _at(j)])
    else:
        for j in range(valid):
            expected = _widen(base[a + _at(j)]) + _widen(velocity[a + _at(j)])
            out[o + _at(j)] = _widen(x[a + _at(j)]) - expected
    for j in range(valid, n):
        out[o + _at(j)] = _f32(0)


@inlined
def subtract(x: Pointer, at: int, limit: int, expected: Pointer, out: Pointer, n: int) -> None:
    """``x`` less ``expected``, ``n`` elements from ``at`` on; zero past ``limit``."""
    valid = max(0, min(n, limit - at))
    a = _at(at)
    for j in range(valid):
        out[_at(j)] = _widen(x[a + _at(j)]) - expected[_at(j)]
    for j in range(valid, n):
        out[_at(j)] = _f32(0)


@inlined
def finish(expected: Pointer, change: Pointer, limit: Any, out: Pointer, at: int, end: int, n: int) -> None:
    """``out = expected + change``, ``n`` elements from ``at`` on that lie before ``end``, kept within ``limit``."""
    valid = max(0, min(n, end - at))
    a = _at(at)
    for j in range(valid):
        y = expected[_at(j)] + change[_at(j)]
        y = limit if y > limit else y
        out[a + _at(j)] = _narrow_finite(-limit if y < -limit else y, out)


@inlined
def _clear(lanes: Pointer) -> None:
    for i in range(LANES):
        lanes[_at(i)] = _f32(0)


@inlined
def _folded(lanes: Pointer) -> Any:
    # not a loop over halves: loops of constant length are unrolled
    for i in range(32):
        lanes[_at(i)] += lanes[_at(32 + i)]
    for i in range(16):
        lanes[_at(i)] += lanes[_at(16 + i)]
    for i in range(8):
        lanes[_at(i)] += lanes[_at(8 + i)]
    for i in range(4):
        lanes[_at(i)] += lanes[_at(4 + i)]
    return (lanes[0] + lanes[2]) + (lanes[1] + lanes[3])


@inlined
def lane_sum(values: Pointer, at: int, n: int, lanes: Pointer) -> Any:
    """Sum of the magnitudes of ``n`` values, in the order of ``reference.row_sums``."""
    _clear(lanes)
    whole = n // LANES
    for k in range(whole):
        o = _at(at + k * LANES)
        for i in range(LANES):
            lanes[_at(i)] += abs(values[o + _at(i)])
    o = _at(at + whole * LANES)
    for i in range(n - whole * LANES):
        lanes[_at(i)] += abs(values[o + _at(i)])
    return _folded(lanes)


@inlined
def lane_product(one: Pointer, other: Pointer, at: int, n: int, lanes: Pointer) -> Any:
    """Sum of the products of ``n`` values, in the same order."""
    _clear(lanes)
    whole = n // LANES
    for k in range(whole):
        o = _at(at + k * LANES)
        for i in range(LANES):
            lanes[_at(i)] += one[o + _at(i)] * other[o + _at(i)]
    o = _at(at + whole * LANES)
    for i in range(n - whole * LANES):
        lanes[_at(i)] += one[o + _at(i)] * other[o + _at(i)]
    return _folded(lanes)


@inlined
def largest_of(bits: Pointer, at: int, n: int, cell: Pointer) -> Any:
    """Largest magnitude of ``n`` values; infinity and NaN, which count as larger, come through.

    Args:
        bits: the values as uint32, whose order is that of magnitudes.
        at: the first.
        n: how many.
        cell: a float32 to work with.
    """
    top = _u32(0)
    for j in range(n):
        top = max(top, _u32(bits[_at(at) + _at(j)] & _u32(0x7FFFFFFF)))
    as_u32(cell)[0] = top
    return cell[0]


@inlined
def round_3_bits(value: Any) -> Any:
    """As in the reference."""
    return _u32(_u32(_f32(value).view(_u32) + _u32(1 << 19)) & _u32(0xFFF00000)).view(_f32)


@jit
def fold(buffer: Array, length: int, width: int) -> None:
    """Fold ``length`` elements in place: upper half onto lower, until ``width`` are left.

    ``length`` is counted as filled up with zeros to ``width`` times a power of two.
    """
    while length > width:
        half = width
        while half * 2 < length:
            half *= 2
        for j in range(length - half):
            buffer[_at(j)] += buffer[_at(half) + _at(j)]
        length = half
