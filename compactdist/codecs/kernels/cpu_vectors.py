"""Sixty-four signs at a time: what LLVM's vectoriser does not find by itself, as vector instructions of LLVM.

Vectors of any length are legal in LLVM on every processor; where there are mask registers these become a comparison and
a move.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

LENGTH = 64

_Floats = ir.VectorType(ir.FloatType(), LENGTH)
_Mask = ir.VectorType(ir.IntType(1), LENGTH)
_Word = ir.IntType(64)


def _pointer(context: Any, builder: Any, kind: Any, pointee: Any, array: Any, at: Any) -> Any:
    data = context.make_array(kind)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [at]), pointee.as_pointer())


@intrinsic
def not_negative(typing_context: Any, values: Any, at: Any) -> Any:
    """Bit i of the result tells whether ``values[at + i] >= 0``; float32 array, uint64."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = _pointer(context, builder, signature.args[0], _Floats, *arguments)
        loaded = builder.load(pointer)
        loaded.align = 4
        zero = ir.Constant(_Floats, [0.0] * LENGTH)
        return builder.bitcast(builder.fcmp_ordered(">=", loaded, zero), _Word)

    return types.uint64(values, types.uintp), build


@intrinsic
def negate_where_clear(typing_context: Any, mask: Any, values: Any, at: Any) -> Any:
    """Negate ``values[at + i]``, float32, where bit i of the uint64 is clear."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        mask, array, at = arguments
        pointer = _pointer(context, builder, signature.args[1], _Floats, array, at)
        loaded = builder.load(pointer)
        loaded.align = 4
        chosen = builder.select(builder.bitcast(mask, _Mask), loaded, builder.fneg(loaded))
        builder.store(chosen, pointer).align = 4
        return context.get_dummy_value()

    return types.void(types.uint64, values, types.uintp), build


@intrinsic
def load_word(typing_context: Any, data: Any, at: Any) -> Any:
    """Bytes ``at`` to ``at + 8`` of a uint8 array, the first lowest; uint64."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        loaded = builder.load(_pointer(context, builder, signature.args[0], _Word, *arguments))
        loaded.align = 1
        return loaded

    return types.uint64(data, types.uintp), build


@intrinsic
def store_word(typing_context: Any, word: Any, data: Any, at: Any) -> Any:
    """Undo ``load_word``."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word, array, at = arguments
        builder.store(word, _pointer(context, builder, signature.args[1], _Word, array, at)).align = 1
        return context.get_dummy_value()

    return types.void(types.uint64, data, types.uintp), build
