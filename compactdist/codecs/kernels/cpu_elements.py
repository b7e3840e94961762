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

Array = Any
jit = numba.njit(cache=True, nogil=True, error_model="numpy")
_inlined = numba.njit(cache=True, nogil=True, error_model="numpy", forceinline=True)
_u32, _f32, _at = np.uint32, np.float32, np.uintp


def _widen(v: Any) -> Any:
    """An element as float32."""
    raise NotImplementedError


def _narrow(v: Any, like: Any) -> Any:
    """A float32 within the range of the element type of ``like``, rounded to nearest even."""
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


@overload(_widen)
def _choose_widen(v: Any) -> Any:
    return _WIDEN[v]


@overload(_narrow)
def _choose_narrow(v: Any, like: Any) -> Any:
    return _NARROW[like.dtype]


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


@_inlined
def residual(x: Array, base: Array, at: int, limit: int, out: Array, to: int, n: int) -> None:
    """``x - base``, ``n`` elements from ``at`` on, into ``out`` from ``to`` on; zero past ``limit``.

    An empty base stands for no prediction.
    """
    valid = max(0, min(n, limit - at))
    a, o = _at(at), _at(to)
    if base.size == 0:
        for j in range(valid):
            out[o + _at(j)] = _widen(x[a + _at(j)])
    else:
        for j in range(valid):
            out[o + _at(j)] = _widen(x[a + _at(j)]) - _widen(base[a + _at(j)])
    for j in range(valid, n):
        out[o + _at(j)] = _f32(0)


@_inlined
def add(base: Array, at: int, change: Array, limit: Any, out: Array, n: int) -> None:
    """``out = base + change``, ``n`` elements from ``at`` on, kept within ``limit`` and rounded.

    Overwrites ``change``. ``out`` may be ``base``, so nothing is written before all is read.
    """
    a = _at(at)
    if base.size:
        for j in range(n):
            change[_at(j)] = _widen(base[a + _at(j)]) + change[_at(j)]
    for j in range(n):
        y = change[_at(j)]
        y = limit if y > limit else y
        out[a + _at(j)] = _narrow(-limit if y < -limit else y, out)


@_inlined
def fill(out: Array, to: int, n: int, value: Any) -> None:
    """Set ``n`` elements from ``to`` on."""
    for j in range(n):
        out[_at(to) + _at(j)] = value


@_inlined
def copy(x: Array, out: Array, to: int, n: int) -> None:
    """Copy the first ``n`` elements to ``to`` and on."""
    for j in range(n):
        out[_at(to) + _at(j)] = x[_at(j)]


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


@jit
def code_views(size: int) -> Any:
    """A buffer of ``size`` codes, one in a byte, also seen two, four and eight at a time."""
    codes = np.empty(size, np.uint8)
    return codes, codes.view(np.uint16), codes.view(np.uint32), codes.view(np.uint64)


@_inlined
def pack(one: Array, two: Array, four: Array, eight: Array, bits: int, n: int, out: Array, element: int) -> None:
    """Pack the first ``n`` codes of buffers from ``code_views`` to ``bits`` each, first code lowest.

    They go to position ``element`` of ``out`` and on.
    """
    o = _at((element * bits) >> 3)
    if bits == 1:
        for k in range(n >> 3):
            v = eight[_at(k)]
            v |= v >> np.uint64(7)
            v |= v >> np.uint64(14)
            v |= v >> np.uint64(28)
            out[o + _at(k)] = np.uint8(v & np.uint64(0xFF))
    elif bits == 2:
        for k in range(n >> 2):
            w = four[_at(k)]
            out[o + _at(k)] = np.uint8(_u32(w | w >> _u32(6) | w >> _u32(12) | w >> _u32(18)) & _u32(0xFF))
    elif bits == 4:
        for k in range(n >> 1):
            h = _u32(two[_at(k)])
            out[o + _at(k)] = np.uint8(_u32(h | h >> _u32(4)) & _u32(0xFF))
    else:
        for k in range(n):
            out[o + _at(k)] = one[_at(k)]


@_inlined
def unpack(
    packed: Array,
    bits: int,
    element: int,
    n: int,
    table: Array,
    pairs: Array,
    one: Array,
    four: Array,
    eight: Array,
    levels: Array,
    level_pairs: Array,
) -> None:
    """Levels of ``n`` packed codes from ``element`` on.

    Args:
        packed: the codes.
        bits: for each code.
        element: position of the first.
        n: how many, a whole number of bytes.
        table: levels of the codes in each byte, 8 / bits of them; empty for the integers of two's complement.
        pairs: the same memory, two levels at a time.
        one: the code buffer of ``code_views``, overwritten.
        four: the same, four at a time.
        eight: the same, eight at a time.
        levels: what is asked for.
        level_pairs: the same memory, two levels at a time.
    """
    p = _at((element * bits) >> 3)
    if bits == 1:
        low, high = table[0], table[8]
        for k in range(n >> 3):
            v = np.uint64(packed[p + _at(k)]) * np.uint64(0x0101010101010101)
            eight[_at(k)] = v & np.uint64(0x8040201008040201)
        for j in range(n):
            levels[_at(j)] = high if one[_at(j)] != np.uint8(0) else low
    elif bits == 2:
        a, b, c, d = table[0], table[4], table[8], table[12]
        for k in range(n >> 2):
            w = _u32(packed[p + _at(k)])
            four[_at(k)] = _u32(w | w << _u32(6) | w << _u32(12) | w << _u32(18)) & _u32(0x03030303)
        for j in range(n):
            code = one[_at(j)]
            low, high = b if code & np.uint8(1) else a, d if code & np.uint8(1) else c
            levels[_at(j)] = high if code & np.uint8(2) else low
    elif bits == 4:
        for k in range(n >> 1):
            level_pairs[_at(k)] = pairs[_at(packed[p + _at(k)])]
    elif table.size == 0:
        for k in range(n):
            levels[_at(k)] = _f32(np.int8(packed[p + _at(k)]))
    else:
        for k in range(n):
            levels[_at(k)] = table[_at(packed[p + _at(k)])]
