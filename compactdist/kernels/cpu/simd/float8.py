"""Float8 codes of sixty-four values at a time and back, as ``reference.float8_codes`` and ``float8_levels`` have them.

A format is given by its bits of mantissa and its largest finite code. Values are in units of its smallest subnormal, so
what lies below ``2 ** mantissa`` is an integer, and above that the bits of a float32 are those of the code but for more
mantissa and another bias.
"""

from __future__ import annotations

from typing import Any

from compactdist.kernels.cpu.simd.elements import ROUNDING
from compactdist.kernels.cpu.simd.jit import intrinsic
from compactdist.kernels.cpu.simd.vectors import FLOATS, INTS, full

_MANTISSA_BITS, _BIAS, _SIGN = 23, 127, 0x80


def levels_of(builder: Any, codes: Any, bits_kept: int, top: int) -> Any:
    """The values of codes, ints below 256; those of infinity and NaN are as large as the largest."""
    size = builder.and_(codes, full(_SIGN - 1, INTS))
    size = builder.select(builder.icmp_unsigned("<", size, full(top, INTS)), size, full(top, INTS))
    shifted = builder.shl(size, full(_MANTISSA_BITS - bits_kept, INTS))
    normal = builder.add(shifted, full((_BIAS + bits_kept - 1) << _MANTISSA_BITS, INTS))
    subnormal = builder.bitcast(builder.sitofp(size, FLOATS.of), INTS.of)
    small = builder.icmp_unsigned("<", size, full(1 << bits_kept, INTS))
    bits = builder.select(small, subnormal, normal)
    sign = builder.shl(builder.and_(codes, full(_SIGN, INTS)), full(24, INTS))
    return builder.bitcast(builder.or_(bits, sign), FLOATS.of)


@intrinsic(prefer_literal=True)
def float8_codes(typing_context: Any, values: Any, mantissa: Any, largest: Any) -> Any:
    """Codes, ints, of values not below 0: to nearest even, at most the largest one."""
    bits_kept, top = mantissa.literal_value, largest.literal_value

    def build(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        value, drop = arguments[0], full(_MANTISSA_BITS - bits_kept, INTS)
        bits = builder.bitcast(value, INTS.of)
        odd = builder.and_(builder.lshr(bits, drop), full(1, INTS))
        half = full((1 << (_MANTISSA_BITS - bits_kept - 1)) - 1, INTS)
        rounded = builder.lshr(builder.add(builder.add(bits, half), odd), drop)
        normal = builder.sub(rounded, full((_BIAS + bits_kept - 1) << bits_kept, INTS))
        whole = builder.bitcast(builder.fadd(value, full(float(ROUNDING))), INTS.of)
        subnormal = builder.and_(whole, full(0xFF, INTS))
        small = builder.fcmp_ordered("<", value, full(float(1 << bits_kept)))
        code = builder.select(small, subnormal, normal)
        return builder.select(builder.icmp_unsigned("<", code, full(top, INTS)), code, full(top, INTS))

    return INTS(values, mantissa, largest), build


@intrinsic(prefer_literal=True)
def float8_levels(typing_context: Any, codes: Any, mantissa: Any, largest: Any) -> Any:
    """Values of codes, see ``levels_of``."""
    bits_kept, top = mantissa.literal_value, largest.literal_value

    def build(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        return levels_of(builder, arguments[0], bits_kept, top)

    return FLOATS(codes, mantissa, largest), build
