"""Small things under the compiled loops: conversions of one element, sums by folding."""

from __future__ import annotations

from typing import Any

import numpy as np

from compactdist.kernels.cpu.simd.jit import inlined

Pointer = Any
_u32, _f32, _at = np.uint32, np.float32, np.uintp

ROUNDING = np.float32(12582912.0)
"""1.5 * 2**23: adding it to what is below 2**22 rounds to an integer, half to even."""


def widen_f16(v: Any) -> Any:
    """Bits of a float16, int16, as float32."""
    bits = _u32(_u32(v) & _u32(0xFFFF))
    sign = _u32(_u32(bits & _u32(0x8000)) << _u32(16))
    body = _u32(_u32(bits & _u32(0x7FFF)) << _u32(13))
    normal = _u32(body + _u32(112 << 23))
    # Subnormals: with the exponent of 2**-14 and its implicit bit taken off again, all in normal numbers.
    small = _f32(_u32(body + _u32(113 << 23)).view(_f32) - _f32(6.103515625e-05)).view(_u32)
    out = small if body < _u32(0x400 << 13) else normal
    out = _u32(body + _u32(224 << 23)) if body >= _u32(0x7C00 << 13) else out
    return _u32(out | sign).view(_f32)


def narrow_f16(v: Any) -> Any:
    """A float32 as bits of a float16, int16, rounded to nearest even."""
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


@inlined
def round_3_bits(value: Any) -> Any:
    """As in the reference."""
    return _u32(_u32(_f32(value).view(_u32) + _u32(1 << 19)) & _u32(0xFFF00000)).view(_f32)


@inlined
def fold(buffer: Pointer, length: int, width: int) -> None:
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
