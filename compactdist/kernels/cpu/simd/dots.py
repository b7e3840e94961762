"""Products of bytes added up in 32 bits, four to a lane, where a processor has an instruction for it (VNNI).

One factor of the instruction is not signed: 128 is added to it. Compiled by Numba.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from compactdist.kernels.cpu.simd.jit import intrinsic, types
from compactdist.kernels.cpu.simd.vectors import INTS, call, full, joined, part
from compactdist.kernels.reference import LANES

_i32 = ir.IntType(32)
_REGISTER = ir.VectorType(_i32, 16)


@intrinsic
def words_of(typing_context: Any, pointer: Any) -> Any:
    """The same memory as uint32."""

    def build(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], _i32.as_pointer())

    return types.CPointer(types.uint32)(types.CPointer(types.float32)), build


@intrinsic
def quads_of(typing_context: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    """Ints whose bytes are the lowest ones of four ints."""

    def build(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        together = full(0, INTS)
        for at, one in enumerate(arguments):
            lowest = builder.and_(one, full(255, INTS))
            together = builder.or_(together, builder.shl(lowest, full(8 * at, INTS)))
        return together

    return INTS(INTS, INTS, INTS, INTS), build


@intrinsic
def above_128(typing_context: Any, x: Any) -> Any:
    """Ints of signed bytes, each with 128 added: not signed."""
    return INTS(INTS), lambda context, builder, sig, arguments: builder.xor(*arguments, full(0x80808080, INTS))


@intrinsic
def dotted(typing_context: Any, total: Any, bytes_: Any, signed: Any) -> Any:
    """Ints, more by the products of four bytes, a uint32 of numbers from 0 to 255, with four signed bytes of a lane."""

    def build(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        total, word, signed = arguments
        one = builder.insert_element(ir.Constant(_REGISTER, ir.Undefined), word, ir.Constant(_i32, 0))
        everywhere = builder.shuffle_vector(one, ir.Constant(_REGISTER, ir.Undefined), ir.Constant(_REGISTER, [0] * 16))
        parts = []
        for at in range(0, LANES, 16):
            lanes = range(at, at + 16)
            given = part(builder, total, lanes), everywhere, part(builder, signed, lanes)
            parts.append(call(builder, "llvm.x86.avx512.vpdpbusd.512", _REGISTER, *given))
        return joined(builder, parts)

    return INTS(INTS, types.uint32, INTS), build
