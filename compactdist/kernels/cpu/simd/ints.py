"""Sixty-four int32 as one value: codes, indices, and the bits of floats; compiled by Numba."""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from compactdist.kernels.cpu.simd.jit import cgutils, intrinsic, types
from compactdist.kernels.cpu.simd.vectors import (
    AVX2,
    EIGHT,
    FLOATS,
    HOST,
    INTS,
    MASK,
    by_eights,
    call,
    full,
    joined,
    part,
    spread,
    unknown,
)
from compactdist.kernels.reference import LANES

_float, _i32 = ir.FloatType(), ir.IntType(32)
_eight = ir.VectorType(_i32, 8)


def _converted(builder: Any, name: str, values: Any, rounding: int) -> Any:
    """Floats to ints by an instruction of AVX-512: 8 for to nearest even, 4 for as it always does."""
    kind, every = ir.VectorType(_i32, 16), ir.Constant(ir.IntType(16), -1)
    options = ir.Constant(kind, None), every, ir.Constant(_i32, rounding)
    parts = [part(builder, values, range(at, at + 16)) for at in range(0, LANES, 16)]
    return joined(builder, [call(builder, f"llvm.x86.avx512.mask.{name}.512", kind, one, *options) for one in parts])


@intrinsic
def no_bits(typing_context: Any) -> Any:
    """Sixty-four ints of 0."""
    return INTS(), lambda context, builder, sig, arguments: full(0, INTS)


@intrinsic
def raised(typing_context: Any, index: Any, mask: Any, by: Any) -> Any:
    """Ints, in the lanes of a mask more by other ints or a uint32."""

    def build(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        index, mask, more = arguments
        more = more if by == INTS else spread(builder, unknown(builder, more), INTS)
        return builder.select(mask, builder.add(index, more), index)

    return INTS(INTS, MASK, by), build


@intrinsic
def borders_below(typing_context: Any, x: Any, borders: Any) -> Any:
    """How many of a tuple of float32 lie below floats, as ints."""

    def build(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        x, all_borders = arguments[0], cgutils.unpack_tuple(builder, arguments[1])
        if AVX2:
            return by_eights(builder, lambda one: _borders_below_eight(builder, one, all_borders), x)
        count, one = full(0, INTS), ir.Constant(_i32, 1)
        for border in all_borders:
            above = builder.fcmp_ordered(">", x, spread(builder, border, FLOATS))
            more = builder.add(count, spread(builder, unknown(builder, one), INTS))
            count = builder.select(above, more, count)
        return count

    return INTS(FLOATS, borders), build


def _borders_below_eight(builder: Any, x: Any, borders: Any) -> Any:
    """``borders_below`` for eight lanes: masks are -1, so taking them off counts."""
    count, greater = ir.Constant(_eight, None), ir.Constant(ir.IntType(8), 30)
    for border in borders:
        above = call(builder, "llvm.x86.avx.cmp.ps.256", EIGHT.of, x, spread(builder, border, EIGHT), greater)
        count = builder.sub(count, builder.bitcast(above, _eight))
    return count


@intrinsic
def bits_of_magnitude(typing_context: Any, x: Any) -> Any:
    """The bits of absolute values, whose order is that of magnitudes, and infinity and NaN above."""

    def build(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        return builder.and_(builder.bitcast(*arguments, INTS.of), full(0x7FFFFFFF, INTS))

    return INTS(FLOATS), build


@intrinsic
def larger(typing_context: Any, x: Any, y: Any) -> Any:
    """The larger of unsigned ints, lane by lane."""

    def build(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        return builder.select(builder.icmp_unsigned(">", *arguments), *arguments)

    return INTS(INTS, INTS), build


@intrinsic
def largest(typing_context: Any, x: Any) -> Any:
    """The largest of unsigned ints, read as the bits of a float32."""

    def build(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        top = call(builder, f"llvm.vector.reduce.umax.v{LANES}i32", _i32, *arguments)
        return builder.bitcast(top, _float)

    return types.float32(INTS), build


@intrinsic
def nearest_ints(typing_context: Any, x: Any) -> Any:
    """Integers nearest to floats, half to even; far below 2 ** 31 in magnitude."""

    def build(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        if AVX2:
            return by_eights(builder, lambda one: call(builder, "llvm.x86.avx.cvt.ps2dq.256", _eight, one), *arguments)
        if not HOST.get("avx512f", False):
            return builder.fptosi(call(builder, f"llvm.rint.v{LANES}f32", FLOATS.of, *arguments), INTS.of)
        return _converted(builder, "cvtps2dq", arguments[0], 8)

    return INTS(FLOATS), build


@intrinsic
def as_whole_floats(typing_context: Any, x: Any) -> Any:
    """Signed ints as floats."""
    return FLOATS(INTS), lambda context, builder, sig, arguments: builder.sitofp(*arguments, FLOATS.of)


@intrinsic
def bins_of(typing_context: Any, x: Any) -> Any:
    """Floats not below 0 cut off to integers, at most 15, as ints; for AVX-512."""

    def build(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        # what is too large for an integer becomes 2 ** 31 here, where LLVM's own conversion promises nothing
        whole = _converted(builder, "cvttps2dq", arguments[0], 4)
        return call(builder, f"llvm.umin.v{LANES}i32", INTS.of, whole, full(15, INTS))

    return INTS(FLOATS), build


@intrinsic
def bits_of(typing_context: Any, x: Any) -> Any:
    """The bits of floats."""
    return INTS(FLOATS), lambda context, builder, sig, arguments: builder.bitcast(*arguments, INTS.of)


@intrinsic(prefer_literal=True)
def with_sign(typing_context: Any, index: Any, x: Any, weight: Any) -> Any:
    """Ints below ``weight``, a power of two, more by it where floats are below 0; -0 is not."""
    value = weight.literal_value

    def build(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        if AVX2:
            return by_eights(builder, lambda index, x: _with_sign_of_eight(builder, index, x, value), *arguments[:2])
        bits = builder.bitcast(builder.fadd(arguments[1], full(0.0)), INTS.of)
        sign = builder.lshr(bits, full(31 - value.bit_length() + 1, INTS))
        return builder.or_(arguments[0], builder.and_(sign, full(value, INTS)))

    return INTS(INTS, FLOATS, weight), build


def _with_sign_of_eight(builder: Any, index: Any, x: Any, weight: int) -> Any:
    less = ir.Constant(ir.IntType(8), 17)
    below = call(builder, "llvm.x86.avx.cmp.ps.256", EIGHT.of, x, ir.Constant(EIGHT.of, [0.0] * 8), less)
    return builder.or_(index, builder.and_(builder.bitcast(below, _eight), ir.Constant(_eight, [weight] * 8)))


@intrinsic
def signed_floats(typing_context: Any, x: Any) -> Any:
    """Ints whose lowest byte is a number in two's complement, as floats."""

    def build(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        narrow = builder.trunc(*arguments, ir.VectorType(ir.IntType(8), LANES))
        return builder.sitofp(narrow, FLOATS.of)

    return FLOATS(INTS), build
