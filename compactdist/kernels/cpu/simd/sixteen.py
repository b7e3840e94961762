"""Arithmetic on scales, sixteen float32 at a time or one, in the same words: compiled by Numba.

What is one value for a block is a chain of slow operations, each waiting for the one before. Sixteen blocks wait once.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from compactdist.kernels.cpu.simd.jit import intrinsic, signature, types
from compactdist.kernels.cpu.simd.memory import read, write
from compactdist.kernels.cpu.simd.vectors import SIXTEEN, SIXTEEN_BITS, call, part
from compactdist.kernels.reference import BF16_MAX_BITS, LANES

COUNT = 16

_i1, _i16, _i32, _i64 = (ir.IntType(width) for width in (1, 16, 32, 64))
_floats = types.CPointer(types.float32)


def _kind_of(*given: Any) -> Any:
    """The type of numbers of which one may be a scalar."""
    return SIXTEEN if SIXTEEN in given else types.float32


def _ints(value: Any) -> Any:
    """The type of the bits of a number or of sixteen."""
    return ir.VectorType(_i32, COUNT) if isinstance(value.type, ir.VectorType) else _i32


def _all(kind: Any, value: int) -> Any:
    """An integer constant, in every lane of a vector."""
    return ir.Constant(kind, [value] * COUNT if isinstance(kind, ir.VectorType) else value)


@intrinsic
def choose(typing_context: Any, condition: Any, x: Any, y: Any) -> Any:
    """``x`` where the condition holds, else ``y``."""
    kind = _kind_of(x, y) if condition == types.boolean else SIXTEEN
    return kind(condition, kind, kind), lambda context, builder, sig, arguments: builder.select(*arguments)


@intrinsic
def both(typing_context: Any, x: Any, y: Any) -> Any:
    """Where two conditions hold."""
    return x(x, x), lambda context, builder, sig, arguments: builder.and_(*arguments)


@intrinsic
def either(typing_context: Any, x: Any, y: Any) -> Any:
    """Where one of two conditions holds."""
    return x(x, x), lambda context, builder, sig, arguments: builder.or_(*arguments)


@intrinsic
def everywhere(typing_context: Any, condition: Any) -> Any:
    """Whether a condition holds for all sixteen."""

    def build(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        return call(builder, f"llvm.vector.reduce.and.v{COUNT}i1", _i1, *arguments)

    return types.boolean(SIXTEEN_BITS), build


@intrinsic
def root(typing_context: Any, x: Any) -> Any:
    """Square roots, rounded to nearest."""
    name = f"llvm.sqrt.v{COUNT}f32" if x == SIXTEEN else "llvm.sqrt.f32"
    return x(x), lambda context, builder, sig, arguments: call(builder, name, arguments[0].type, *arguments)


@intrinsic(prefer_literal=True)
def as_bf16(typing_context: Any, x: Any, up: Any) -> Any:
    """Numbers not below 0 rounded to those of bfloat16: ``up``, or to nearest even."""
    upwards, kind = up.literal_value, _kind_of(x)

    def build(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        ints = _ints(arguments[0])
        bits = builder.bitcast(arguments[0], ints)
        odd = builder.and_(builder.lshr(bits, _all(ints, 16)), _all(ints, 1))
        more = _all(ints, 0xFFFF) if upwards else builder.add(_all(ints, 0x7FFF), odd)
        return builder.bitcast(builder.and_(builder.add(bits, more), _all(ints, 0xFFFF0000)), arguments[0].type)

    return kind(kind, up), build


@intrinsic
def store_bf16(typing_context: Any, x: Any, pointer: Any, at: Any, count: Any) -> Any:
    """The upper halves of the first ``count`` numbers, at most the largest finite one, to ``at`` and on."""

    def build(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        value, pointer, at, count = arguments
        kind = ir.VectorType(_i32, COUNT)
        bits = builder.lshr(builder.bitcast(value, kind), _all(kind, 16))
        bits = call(builder, f"llvm.umin.v{COUNT}i32", kind, bits, _all(kind, BF16_MAX_BITS))
        write(builder, builder.trunc(bits, ir.VectorType(_i16, COUNT)), builder.gep(pointer, [at]), count)
        return context.get_dummy_value()

    return signature(types.void, SIXTEEN, types.CPointer(types.uint16), types.int64, types.int64), build


@intrinsic
def store_sixteen(typing_context: Any, x: Any, pointer: Any) -> Any:
    """Sixteen numbers to memory."""

    def build(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        write(builder, *arguments)
        return context.get_dummy_value()

    return signature(types.void, SIXTEEN, _floats), build


def _combined(builder: Any, x: Any, y: Any) -> Any:
    if isinstance(x.type.element, ir.FloatType):
        return builder.fadd(x, y)
    return builder.select(builder.icmp_unsigned(">", x, y), x, y)


@intrinsic
def fold_in(typing_context: Any, lanes: Any, room: Any, row: Any) -> Any:
    """The first steps of folding sixty-four lanes, upper half onto lower: sixteen are left, as a row of ``room``.

    Floats are added, of unsigned ints the larger is kept.
    """

    def build(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        lanes, room, row = arguments
        half = LANES // 2
        while half >= COUNT:
            lanes = _combined(builder, part(builder, lanes, range(half)), part(builder, lanes, range(half, 2 * half)))
            half //= 2
        at = builder.mul(row, ir.Constant(_i64, COUNT))
        write(builder, builder.bitcast(lanes, SIXTEEN.of), builder.gep(room, [at]))
        return context.get_dummy_value()

    return signature(types.void, lanes, _floats, types.int64), build


@intrinsic(prefer_literal=True)
def folded_rows(typing_context: Any, room: Any, ints: Any) -> Any:
    """The other steps, for sixteen rows of ``room``, of ``ints`` or floats, at a time: one number for each row.

    A vector folded by itself is a chain of permutations of which most lanes mean nothing.
    """
    kind = ir.VectorType(_i32, COUNT) if ints.literal_value else SIXTEEN.of

    def build(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        rows = [
            read(builder, builder.gep(arguments[0], [ir.Constant(_i64, COUNT * row)]), kind) for row in range(COUNT)
        ]
        half = COUNT // 2
        while half:
            # two vectors hold runs of 2 * half lanes: their lower halves side by side, and their upper ones
            lower = [at + j for at in range(0, 2 * COUNT, 2 * half) for j in range(half)]
            upper = [lane + half for lane in lower]
            rows = [
                _combined(builder, part(builder, one, lower, two), part(builder, one, upper, two))
                for one, two in zip(rows[::2], rows[1::2], strict=True)
            ]
            half //= 2
        return builder.bitcast(rows[0], SIXTEEN.of)

    return SIXTEEN(_floats, ints), build
