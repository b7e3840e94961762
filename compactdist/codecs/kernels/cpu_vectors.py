"""What Numba lacks: bare pointers, buffers on the stack, and sixty-four signs at a time.

An array handed to a function, inlined or not, has its reference count raised and lowered, which is an atomic operation
on memory that all threads share; pointers have none. LLVM knows that buffers on the stack overlap with nothing.

Vectors of any length are legal in LLVM on every processor; where there are mask registers those of signs become a
comparison and a move.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LENGTH = 64

STACK_ELEMENTS = 1024
"""Length of the buffers on the stack."""

_Floats = ir.VectorType(ir.FloatType(), LENGTH)
_Mask = ir.VectorType(ir.IntType(1), LENGTH)
_Word = ir.IntType(64)
_Sixteen = ir.VectorType(ir.FloatType(), 16)

HAS_LOOK_UP: bool = get_host_cpu_features().get("avx512f", False)
"""Whether ``look_up_64`` exists on this processor."""


def _pointer(builder: Any, pointer: Any, at: Any, pointee: Any) -> Any:
    return builder.bitcast(builder.gep(pointer, [at]), pointee.as_pointer())


@intrinsic
def data_of(typing_context: Any, array: Any) -> Any:
    """Where an array's elements are. The array must outlive the pointer: take those of arguments only."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return context.make_array(signature.args[0])(context, builder, arguments[0]).data

    return types.CPointer(array.dtype)(array), build


def _on_the_stack(element: Any) -> Any:
    def typed(typing_context: Any) -> Any:
        def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            kind = context.get_value_type(element)
            count = ir.Constant(ir.IntType(32), STACK_ELEMENTS)
            with builder.goto_entry_block():
                memory = builder.alloca(kind, count)
            memory.align = 64
            return memory

        return types.CPointer(element)(), build

    return typed


@intrinsic
def stack_floats(typing_context: Any) -> Any:
    """``STACK_ELEMENTS`` float32, until the function returns."""
    return _on_the_stack(types.float32)(typing_context)


@intrinsic
def stack_codes(typing_context: Any) -> Any:
    """``STACK_ELEMENTS`` uint8, until the function returns."""
    return _on_the_stack(types.uint8)(typing_context)


def _recast(element: Any, pointer: Any) -> Any:
    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(element)(pointer), build


@intrinsic
def as_u16(typing_context: Any, pointer: Any) -> Any:
    """The same memory as uint16."""
    return _recast(types.uint16, pointer)


@intrinsic
def as_u32(typing_context: Any, pointer: Any) -> Any:
    """The same memory as uint32."""
    return _recast(types.uint32, pointer)


@intrinsic
def as_u64(typing_context: Any, pointer: Any) -> Any:
    """The same memory as uint64."""
    return _recast(types.uint64, pointer)


@intrinsic
def not_negative(typing_context: Any, values: Any, at: Any) -> Any:
    """Bit i of the result tells whether ``values[at + i] >= 0``; float32, uint64."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = _pointer(builder, arguments[0], arguments[1], _Floats)
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
        pointer = _pointer(builder, array, at, _Floats)
        loaded = builder.load(pointer)
        loaded.align = 4
        chosen = builder.select(builder.bitcast(mask, _Mask), loaded, builder.fneg(loaded))
        builder.store(chosen, pointer).align = 4
        return context.get_dummy_value()

    return types.void(types.uint64, values, types.uintp), build


@intrinsic
def load_word(typing_context: Any, data: Any, at: Any) -> Any:
    """Bytes ``at`` to ``at + 8`` of uint8 data, the first lowest; uint64."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        loaded = builder.load(_pointer(builder, arguments[0], arguments[1], _Word))
        loaded.align = 1
        return loaded

    return types.uint64(data, types.uintp), build


@intrinsic
def store_word(typing_context: Any, word: Any, data: Any, at: Any) -> Any:
    """Undo ``load_word``."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word, array, at = arguments
        builder.store(word, _pointer(builder, array, at, _Word)).align = 1
        return context.get_dummy_value()

    return types.void(types.uint64, data, types.uintp), build


def _permute(builder: Any, table: Any, index: Any) -> Any:
    kind = ir.FunctionType(_Sixteen, [_Sixteen, ir.VectorType(ir.IntType(32), 16)])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512.permvar.sf.512")
    return builder.call(function, [table, index])


@intrinsic
def look_up_64(typing_context: Any, codes: Any, table: Any, out: Any, at: Any) -> Any:
    """``out[at + i] = table[codes[at + i]]`` for 64 uint8 codes below 16 and 16 float32."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        codes, table, out, at = arguments
        values = builder.load(builder.bitcast(table, _Sixteen.as_pointer()))
        values.align = 4
        for part in range(0, LENGTH, 16):
            here = builder.add(at, ir.Constant(at.type, part))
            index = builder.load(_pointer(builder, codes, here, ir.VectorType(ir.IntType(8), 16)))
            index.align = 1
            wide = builder.zext(index, ir.VectorType(ir.IntType(32), 16))
            builder.store(_permute(builder, values, wide), _pointer(builder, out, here, _Sixteen)).align = 4
        return context.get_dummy_value()

    return types.void(codes, table, out, types.uintp), build
