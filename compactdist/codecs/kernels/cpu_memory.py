"""Pointers, and vectors from and to memory, compiled by Numba: elements of three dtypes, packed codes, tables.

An array handed to a function, inlined or not, has its reference count raised and lowered, which is an atomic operation
on memory that all threads share; pointers have none.

Element types are those of the bits: float32 for itself, uint16 for bfloat16, int16 for float16. Where fewer than 64
elements are left, lanes from there on read as zero and are not written.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core.typing.templates import signature
from numba.extending import intrinsic

from compactdist.codecs.kernels.cpu_elements import inlined, narrow_f16, widen_f16
from compactdist.codecs.kernels.cpu_vectors import FLOATS, HOST, INTS, MASK, TABLE, call, first_lanes, full
from compactdist.codecs.kernels.reference import LANES

_byte, _i16, _i64 = ir.IntType(8), ir.IntType(16), ir.IntType(64)


@intrinsic
def data_of(typing_context: Any, array: Any) -> Any:
    """Where an array's elements are. The array must outlive the pointer: take those of arguments only."""

    def build(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        return context.make_array(sig.args[0])(context, builder, arguments[0]).data

    return types.CPointer(array.dtype)(array), build


@inlined
def pointers_of(source: Any) -> Any:
    """The arrays of a source as pointers."""
    x, base, velocity, terms = source
    return data_of(x), data_of(base), data_of(velocity), terms


@intrinsic
def stack_floats(typing_context: Any) -> Any:
    """Sixty-four float32, until the function returns."""

    def build(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        with builder.goto_entry_block():
            return builder.alloca(ir.FloatType(), ir.Constant(ir.IntType(32), LANES))

    return types.CPointer(types.float32)(), build


def _read(builder: Any, pointer: Any, kind: Any, count: Any = None) -> Any:
    """``kind`` from a pointer, or its first ``count`` elements and zeros."""
    pointer = builder.bitcast(pointer, kind.as_pointer())
    if count is None:
        loaded = builder.load(pointer)
        loaded.align = 1
        return loaded
    mask, zeros = first_lanes(builder, count, kind.count), ir.Constant(kind, None)
    return call(builder, f"llvm.masked.load.{_name(kind)}.p0", kind, pointer, mask, zeros)


def _write(builder: Any, value: Any, pointer: Any, count: Any = None) -> None:
    pointer = builder.bitcast(pointer, value.type.as_pointer())
    if count is None:
        builder.store(value, pointer).align = 1
        return
    mask = first_lanes(builder, count, value.type.count)
    call(builder, f"llvm.masked.store.{_name(value.type)}.p0", ir.VoidType(), value, pointer, mask)


def _name(kind: Any) -> str:
    return f"v{kind.count}" + ("f32" if isinstance(kind.element, ir.FloatType) else f"i{kind.element.width}")


def _by_lane(context: Any, builder: Any, function: Any, sig: Any, values: Any, result: Any) -> Any:
    """What a compiled function of a scalar gives for every lane: slow, and the same everywhere."""
    out = ir.Constant(ir.VectorType(result, LANES), ir.Undefined)
    for lane in range(LANES):
        at = ir.Constant(ir.IntType(32), lane)
        one = context.compile_internal(builder, function, sig, [builder.extract_element(values, at)] * len(sig.args))
        out = builder.insert_element(out, one, at)
    return out


def _widened(context: Any, builder: Any, element: Any, loaded: Any) -> Any:
    if element == types.uint16:
        wide = builder.zext(loaded, INTS.of)
        return builder.bitcast(builder.shl(wide, full(16, INTS)), FLOATS.of)
    if element == types.int16 and HOST.get("f16c", False):
        return builder.fpext(builder.bitcast(loaded, ir.VectorType(ir.HalfType(), LANES)), FLOATS.of)
    if element == types.int16:
        return _by_lane(context, builder, widen_f16, types.float32(types.int16), loaded, ir.FloatType())
    return loaded


def _narrowed(context: Any, builder: Any, element: Any, value: Any) -> Any:
    if element == types.uint16:
        bits = builder.bitcast(value, INTS.of)
        odd = builder.and_(builder.lshr(bits, full(16, INTS)), full(1, INTS))
        rounded = builder.add(builder.add(bits, odd), full(0x7FFF, INTS))
        return builder.trunc(builder.lshr(rounded, full(16, INTS)), ir.VectorType(_i16, LANES))
    if element == types.int16 and HOST.get("f16c", False):
        half = builder.fptrunc(value, ir.VectorType(ir.HalfType(), LANES))
        return builder.bitcast(half, ir.VectorType(_i16, LANES))
    if element == types.int16:
        return _by_lane(context, builder, narrow_f16, types.int16(types.float32, types.float32), value, _i16)
    return value


def _load(typing_context: Any, pointer: Any, at: Any, *count: Any) -> Any:
    def build(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        kind = ir.VectorType(context.get_value_type(pointer.dtype), LANES)
        loaded = _read(builder, builder.gep(arguments[0], [arguments[1]]), kind, *arguments[2:])
        return _widened(context, builder, pointer.dtype, loaded)

    return signature(FLOATS, pointer, types.uintp, *count), build


def _store(typing_context: Any, value: Any, pointer: Any, at: Any, *count: Any) -> Any:
    def build(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        narrow = _narrowed(context, builder, pointer.dtype, arguments[0])
        _write(builder, narrow, builder.gep(arguments[1], [arguments[2]]), *arguments[3:])
        return context.get_dummy_value()

    return signature(types.void, FLOATS, pointer, types.uintp, *count), build


@intrinsic
def load(typing_context: Any, pointer: Any, at: Any) -> Any:
    """Sixty-four elements from ``at`` on, widened to float32."""
    return _load(typing_context, pointer, at)


@intrinsic
def _load_first(typing_context: Any, pointer: Any, at: Any, count: Any) -> Any:
    return _load(typing_context, pointer, at, types.int64)


@intrinsic
def store(typing_context: Any, value: Any, pointer: Any, at: Any) -> Any:
    """Sixty-four float32 to ``at`` and on, rounded to nearest even; finite in the type of the elements."""
    return _store(typing_context, value, pointer, at)


@intrinsic
def _store_first(typing_context: Any, value: Any, pointer: Any, at: Any, count: Any) -> Any:
    return _store(typing_context, value, pointer, at, types.int64)


@inlined
def load_first(pointer: Any, at: Any, count: int) -> Any:
    """The first ``count`` of the elements that ``load`` would read; zeros in other lanes."""
    return load(pointer, at) if count >= LANES else _load_first(pointer, at, count)


@inlined
def store_first(value: Any, pointer: Any, at: Any, count: int) -> None:
    """Undo ``load_first``."""
    if count >= LANES:
        store(value, pointer, at)
    else:
        _store_first(value, pointer, at, count)


@intrinsic
def table_at(typing_context: Any, pointer: Any, at: Any) -> Any:
    """Sixteen float32 from ``at`` on."""

    def build(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        return _read(builder, builder.gep(arguments[0], [arguments[1]]), TABLE.of)

    return TABLE(types.CPointer(types.float32), types.uintp), build


def _packed(builder: Any, bits: int, codes: Any) -> Any:
    """Ints below ``2 ** bits``, or a mask, as bytes."""
    if bits == 1:
        return builder.bitcast(codes, ir.VectorType(_byte, LANES // 8))
    count = LANES * bits // 8
    narrow = builder.trunc(codes, ir.VectorType(_byte, LANES))
    if bits == 8:
        return narrow
    groups = ir.VectorType(ir.IntType(64 // bits), count)
    group = builder.bitcast(narrow, groups)
    together = group
    for k in range(1, 8 // bits):
        shift = ir.Constant(groups, [k * (8 - bits)] * count)
        together = builder.or_(together, builder.lshr(group, shift))
    return builder.trunc(together, ir.VectorType(_byte, count))


def _unpacked(builder: Any, bits: int, data: Any) -> Any:
    if bits == 1:
        return builder.bitcast(data, MASK.of)
    if bits < 8:
        count, width = LANES * bits // 8, 64 // bits
        groups = ir.VectorType(ir.IntType(width), count)
        group = builder.zext(data, groups)
        apart = group
        for k in range(1, 8 // bits):
            shift = ir.Constant(groups, [k * (8 - bits)] * count)
            apart = builder.or_(apart, builder.shl(group, shift))
        kept = sum(((1 << bits) - 1) << at for at in range(0, width, 8))
        data = builder.bitcast(builder.and_(apart, ir.Constant(groups, [kept] * count)), ir.VectorType(_byte, LANES))
    return builder.zext(data, INTS.of)


@intrinsic(prefer_literal=True)
def _pack(typing_context: Any, codes: Any, bits: Any, pointer: Any, at: Any, count: Any) -> Any:
    width = bits.literal_value

    def build(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        codes, _, pointer, at, count = arguments
        data, where = _packed(builder, width, codes), builder.gep(pointer, [at])
        whole = builder.icmp_signed(">=", count, ir.Constant(_i64, LANES))
        with builder.if_else(whole, likely=True) as (all_lanes, some):
            with all_lanes:
                _write(builder, data, where)
            with some:
                _write(builder, data, where, builder.ashr(builder.mul(count, ir.Constant(_i64, width)), ir.Constant(_i64, 3)))
        return context.get_dummy_value()

    return signature(types.void, codes, bits, pointer, types.uintp, types.int64), build


@intrinsic(prefer_literal=True)
def _unpack(typing_context: Any, bits: Any, pointer: Any, at: Any, count: Any) -> Any:
    width = bits.literal_value
    kind = ir.VectorType(_byte, LANES * width // 8)

    def build(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        _, pointer, at, count = arguments
        where = builder.gep(pointer, [at])
        whole = builder.icmp_signed(">=", count, ir.Constant(_i64, LANES))
        with builder.if_else(whole, likely=True) as (all_lanes, some):
            with all_lanes:
                one, after_one = _read(builder, where, kind), builder.block
            with some:
                size = builder.ashr(builder.mul(count, ir.Constant(_i64, width)), ir.Constant(_i64, 3))
                other, after_other = _read(builder, where, kind, size), builder.block
        data = builder.phi(kind)
        data.add_incoming(one, after_one)
        data.add_incoming(other, after_other)
        return _unpacked(builder, width, data)

    return signature(MASK if width == 1 else INTS, bits, pointer, types.uintp, types.int64), build


@inlined
def store_mask(mask: Any, out: Any, element: int, count: int) -> None:
    """A bit for each of the first ``count`` lanes, to position ``element`` and on; both must fill their bytes."""
    _pack(mask, 1, out, element >> 3, count)


@inlined
def mask_at(packed: Any, element: int, count: int) -> Any:
    """Undo ``store_mask``."""
    return _unpack(1, packed, element >> 3, count)


@inlined
def store_codes(codes: Any, bits: int, out: Any, element: int, count: int) -> None:
    """Pack ints to 2, 4 or 8 bits each, the first lowest, as ``store_mask`` does."""
    if bits == 2:
        _pack(codes, 2, out, element >> 2, count)
    elif bits == 4:
        _pack(codes, 4, out, element >> 1, count)
    else:
        _pack(codes, 8, out, element, count)


@inlined
def codes_at(packed: Any, bits: int, element: int, count: int) -> Any:
    """Undo ``store_codes``."""
    if bits == 2:
        return _unpack(2, packed, element >> 2, count)
    if bits == 4:
        return _unpack(4, packed, element >> 1, count)
    return _unpack(8, packed, element, count)
