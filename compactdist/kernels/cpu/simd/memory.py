"""Pointers, and vectors from and to memory, compiled by Numba: elements of three dtypes, packed codes, tables.

Element types are those of the bits: float32 for itself, uint16 for bfloat16, int16 for float16. Where fewer than 64
elements are left, lanes from there on read as zero and are not written.

A tensor that was rounded to eight bits (``spec.Rounded``) is three pointers: to codes, int8 or uint8 for E4M3 float8;
to scales, uint16; and one of the type of its elements, which is not read.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from compactdist.kernels.cpu.simd.elements import narrow_f16, widen_f16
from compactdist.kernels.cpu.simd.float8 import levels_of
from compactdist.kernels.cpu.simd.jit import cgutils, inlined, intrinsic, signature, types
from compactdist.kernels.cpu.simd.vectors import (
    AVX2,
    FLOATS,
    HALVES,
    HOST,
    INTS,
    SIXTEEN,
    call,
    every_nth,
    first_lanes,
    full,
    joined,
    part,
    spread,
    unknown,
)
from compactdist.kernels.reference import LANES
from compactdist.kernels.spec import FLOAT8, ROUNDED_BLOCK

CACHE_LINE = 64
"""Bytes."""

_byte, _i16, _i32, _i64 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
_E4M3 = FLOAT8["e4m3"]


@intrinsic
def data_of(typing_context: Any, array: Any) -> Any:
    """Where an array's elements are. The array must outlive the pointer: take those of arguments only."""

    def build(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        return context.make_array(sig.args[0])(context, builder, arguments[0]).data

    return types.CPointer(array.dtype)(array), build


@intrinsic
def shifted(typing_context: Any, pointer: Any, by: Any) -> Any:
    """A pointer to ``by`` elements further on."""

    def build(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        return builder.gep(arguments[0], [arguments[1]])

    return pointer(pointer, types.int64), build


@intrinsic(prefer_literal=True)
def stack_floats(typing_context: Any, count: Any) -> Any:
    """So many float32, at the beginning of a cache line, until the function returns."""
    size = count.literal_value

    def build(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        with builder.goto_entry_block():
            place = builder.alloca(ir.FloatType(), ir.Constant(ir.IntType(32), size))
            place.align = CACHE_LINE
            return place

    return types.CPointer(types.float32)(count), build


@intrinsic(prefer_literal=True)
def stack_bytes(typing_context: Any, count: Any) -> Any:
    """So many bytes, until the function returns."""
    size = count.literal_value

    def build(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        with builder.goto_entry_block():
            return builder.alloca(_byte, ir.Constant(ir.IntType(32), size))

    return types.CPointer(types.uint8)(count), build


def read(builder: Any, pointer: Any, kind: Any, count: Any = None) -> Any:
    """``kind`` from a pointer, or its first ``count`` elements and zeros."""
    pointer = builder.bitcast(pointer, kind.as_pointer())
    if count is None:
        loaded = builder.load(pointer)
        loaded.align = 1
        return loaded
    mask, zeros = first_lanes(builder, count, kind.count), ir.Constant(kind, None)
    return call(builder, f"llvm.masked.load.{_name(kind)}.p0", kind, pointer, mask, zeros)


def write(builder: Any, value: Any, pointer: Any, count: Any = None) -> None:
    """Undo ``read``."""
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
        one = context.compile_internal(builder, function, sig, [builder.extract_element(values, at)])
        out = builder.insert_element(out, one, at)
    return out


def _widened(context: Any, builder: Any, element: Any, loaded: Any) -> Any:
    if element == types.uint16 and HOST.get("avx512bw", False):
        return _widened_under_masks(builder, loaded)
    if element == types.uint16 and AVX2:
        return builder.bitcast(builder.shl(builder.zext(loaded, INTS.of), full(16, INTS)), FLOATS.of)
    if element == types.uint16:
        zeros, lanes = ir.Constant(loaded.type, None), [at for j in range(LANES) for at in (LANES + j, j)]
        lanes = ir.Constant(ir.VectorType(ir.IntType(32), 2 * LANES), lanes)
        return builder.bitcast(builder.shuffle_vector(loaded, zeros, lanes), FLOATS.of)
    if element == types.int16 and HOST.get("f16c", False):
        return builder.fpext(builder.bitcast(loaded, ir.VectorType(ir.HalfType(), LANES)), FLOATS.of)
    if element == types.int16:
        return _by_lane(context, builder, widen_f16, types.float32(types.int16), loaded, ir.FloatType())
    return loaded


def _widened_under_masks(builder: Any, loaded: Any) -> Any:
    """The same with zeros from a mask that LLVM does not see through: else they come from a register to be cleared."""
    kind = ir.VectorType(_i16, LANES // 2)
    upper = builder.bitcast(unknown(builder, ir.Constant(ir.IntType(32), 0xAAAAAAAA)), ir.VectorType(ir.IntType(1), 32))
    parts = []
    for start in range(0, LANES, 16):
        twice = part(builder, loaded, [start + j // 2 for j in range(32)])
        parts.append(builder.select(upper, twice, ir.Constant(kind, None)))
    return builder.bitcast(joined(builder, parts), FLOATS.of)


def _read_widened(builder: Any, pointer: Any) -> Any:
    """Sixty-four bfloat16 as floats, eight at a time: a load that fills both halves of a register, and one permutation.

    Widening to integers and shifting are two instructions for the same units.
    """
    bytes_, eight = ir.VectorType(_byte, 32), ir.VectorType(_i16, 8)
    # bytes 0x80 and above give zeros; unknown, or LLVM takes the two instructions
    apart = [byte for lane in range(8) for byte in (0x80, 0x80, 2 * lane, 2 * lane + 1)]
    apart = unknown(builder, ir.Constant(bytes_, apart))
    parts = []
    for start in range(0, LANES, 8):
        at = builder.gep(pointer, [ir.Constant(_i64, start)])
        twice = builder.bitcast(part(builder, read(builder, at, eight), [*range(8)] * 2), bytes_)
        wide = call(builder, "llvm.x86.avx2.pshuf.b", bytes_, twice, apart)
        parts.append(builder.bitcast(wide, ir.VectorType(ir.FloatType(), 8)))
    return joined(builder, parts)


def _rounded_by_sixteens(builder: Any, value: Any) -> Any:
    """Floats rounded to bfloat16, sixteen at a time, put in order only once they are narrow."""
    bytes_, words, longs = (ir.VectorType(ir.IntType(width), 256 // width) for width in (8, 16, 64))
    apart = [at + half for half in (0, 2) for four in range(0, 16, 4) for at in (four, four + 1)] * 2
    # unknown, or LLVM takes both permutations below for others, twice as many
    apart = unknown(builder, ir.Constant(bytes_, apart))
    rounded = []
    for start in range(0, LANES, 16):
        both = [part(builder, value, range(at, at + 8)) for at in (start, start + 8)]
        both = [call(builder, "llvm.x86.avx2.pshuf.b", bytes_, builder.bitcast(one, bytes_), apart) for one in both]
        one, two = (builder.bitcast(halves, longs) for halves in both)
        cut, kept = (builder.bitcast(part(builder, one, lanes, two), words) for lanes in ([0, 4, 2, 6], [1, 5, 3, 7]))
        cut = builder.or_(cut, builder.and_(kept, ir.Constant(words, [1] * 16)))
        up = builder.sext(builder.icmp_unsigned(">", cut, ir.Constant(words, [0x8000] * 16)), words)
        finite = _within(builder, builder.sub(kept, up), 0x7F7F)
        rounded.append(builder.bitcast(part(builder, builder.bitcast(finite, longs), [0, 2, 1, 3]), words))
    return joined(builder, rounded)


def _narrowed(context: Any, builder: Any, element: Any, value: Any) -> Any:
    if element == types.float32:
        bits = builder.bitcast(value, INTS.of)
        return builder.bitcast(_within(builder, bits, 0x7F7FFFFF), FLOATS.of)
    if element == types.uint16 and AVX2:
        return _rounded_by_sixteens(builder, value)
    if element == types.uint16:
        # half the registers of a sum in 32 bits: up if more than half is cut off, or half from an odd number
        kept, cut = every_nth(builder, value, 16, 1), every_nth(builder, value, 16, 0)
        cut = builder.or_(cut, builder.and_(kept, full(1, HALVES)))
        more = builder.add(kept, spread(builder, unknown(builder, ir.Constant(_i16, 1)), HALVES))
        return _within(
            builder, builder.select(builder.icmp_unsigned(">", cut, full(0x8000, HALVES)), more, kept), 0x7F7F
        )
    if HOST.get("f16c", False):
        half = builder.fptrunc(value, ir.VectorType(ir.HalfType(), LANES))
        half = builder.bitcast(half, ir.VectorType(_i16, LANES))
    else:
        half = _by_lane(context, builder, narrow_f16, types.int16(types.float32), value, _i16)
    return _within(builder, half, 0x7BFF)


def _within(builder: Any, bits: Any, largest: int) -> Any:
    """Bits of floats, infinities replaced by the largest numbers."""
    width, count = bits.type.element.width, bits.type.count
    name = f"v{count}i{width}"
    positive = ir.Constant(bits.type, [largest] * count)
    negative = ir.Constant(bits.type, [largest | 1 << (width - 1)] * count)
    # as signed integers negative floats are below all others, as unsigned ones above
    bits = call(builder, f"llvm.smin.{name}", bits.type, bits, positive)
    return call(builder, f"llvm.umin.{name}", bits.type, bits, negative)


def _load_rounded(pointers: Any, *count: Any) -> Any:
    codes, _, elements = pointers.types

    def build(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        codes_at, scales_at, _ = cgutils.unpack_tuple(builder, arguments[0])
        at, kind = arguments[1], ir.VectorType(_byte, LANES)
        packed = read(builder, builder.gep(codes_at, [at]), kind, *arguments[2:])
        if codes.dtype == types.int8:
            levels = builder.sitofp(packed, FLOATS.of)
        else:
            levels = levels_of(builder, builder.zext(packed, INTS.of), _E4M3.mantissa_bits, _E4M3.largest_code)
        value = builder.fmul(levels, _scales_from(builder, scales_at, at, *arguments[2:]))
        return _widened(context, builder, elements.dtype, _narrowed(context, builder, elements.dtype, value))

    return FLOATS(pointers, types.uintp, *count), build


def _scales_from(builder: Any, scales: Any, at: Any, count: Any = None) -> Any:
    """The scales of sixty-four elements, which are of one block or of two that follow one another."""
    if count is None:
        last = builder.add(at, ir.Constant(_i64, LANES - 1))
    else:  # what is not there may lie far behind the last scale
        some = builder.icmp_signed(">", count, ir.Constant(_i64, 0))
        at = builder.select(some, at, ir.Constant(_i64, 0))
        last = builder.select(some, builder.sub(builder.add(at, count), ir.Constant(_i64, 1)), at)
    first, second = (_scale(builder, scales, builder.udiv(one, ir.Constant(_i64, ROUNDED_BLOCK))) for one in (at, last))
    left = builder.sub(ir.Constant(_i64, ROUNDED_BLOCK), builder.and_(at, ir.Constant(_i64, ROUNDED_BLOCK - 1)))
    lanes = ir.Constant(INTS.of, list(range(LANES)))
    mask = builder.icmp_unsigned("<", lanes, spread(builder, builder.trunc(left, _i32), INTS))
    return builder.select(mask, spread(builder, first, FLOATS), spread(builder, second, FLOATS))


def _scale(builder: Any, scales: Any, block: Any) -> Any:
    bits = builder.zext(builder.load(builder.gep(scales, [block])), _i32)
    return builder.bitcast(builder.shl(bits, ir.Constant(_i32, 16)), ir.FloatType())


def _load(typing_context: Any, pointer: Any, at: Any, *count: Any) -> Any:
    if isinstance(pointer, types.BaseTuple):
        return _load_rounded(pointer, *count)

    def build(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        kind = ir.VectorType(context.get_value_type(pointer.dtype), LANES)
        where = builder.gep(arguments[0], [arguments[1]])
        if AVX2 and pointer.dtype == types.uint16 and not count:
            return _read_widened(builder, where)
        loaded = read(builder, where, kind, *arguments[2:])
        return _widened(context, builder, pointer.dtype, loaded)

    return signature(INTS if pointer.dtype == types.uint32 else FLOATS, pointer, types.uintp, *count), build


def _store(typing_context: Any, value: Any, pointer: Any, at: Any, *count: Any) -> Any:
    def build(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        write(builder, arguments[0], builder.gep(arguments[1], [arguments[2]]), *arguments[3:])
        return context.get_dummy_value()

    return signature(types.void, value, pointer, types.uintp, *count), build


@intrinsic
def load(typing_context: Any, pointer: Any, at: Any) -> Any:
    """Sixty-four elements from ``at`` on, widened to float32; of uint32 as they are, ints."""
    return _load(typing_context, pointer, at)


@intrinsic
def _load_first(typing_context: Any, pointer: Any, at: Any, count: Any) -> Any:
    return _load(typing_context, pointer, at, types.int64)


@intrinsic
def store(typing_context: Any, value: Any, pointer: Any, at: Any) -> Any:
    """Sixty-four values to ``at`` and on: float32, ints, or what ``rounded_for`` made for the type of the elements."""
    return _store(typing_context, value, pointer, at)


@intrinsic
def _store_first(typing_context: Any, value: Any, pointer: Any, at: Any, count: Any) -> Any:
    return _store(typing_context, value, pointer, at, types.int64)


@intrinsic
def rounded_for(typing_context: Any, pointer: Any, value: Any) -> Any:
    """Float32 values rounded to nearest even to the type of the elements; infinities become its largest numbers."""

    def build(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        return _narrowed(context, builder, pointer.dtype, arguments[1])

    return signature(FLOATS if pointer.dtype == types.float32 else HALVES, pointer, FLOATS), build


@intrinsic
def velocity_for(typing_context: Any, pointer: Any, base: Any, previous: Any, factor: Any) -> Any:
    """``spec.Velocity`` of sixty-four elements, rounded to the type of what ``pointer`` points to and widened again."""
    element = pointer.dtype
    limits = {types.float32: "0x1.fffffep127", types.uint16: "0x1.fep127", types.int16: "0x1.ffcp15"}
    largest = float.fromhex(limits[element])

    def build(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        _, base, previous, factor = arguments
        change = builder.fsub(base, previous)
        for name, bound in (("llvm.minnum", largest), ("llvm.maxnum", -largest)):
            change = call(builder, f"{name}.v{LANES}f32", FLOATS.of, change, full(bound, FLOATS))
        value = builder.fmul(change, spread(builder, factor, FLOATS))
        return _widened(context, builder, element, _narrowed(context, builder, element, value))

    return FLOATS(pointer, FLOATS, FLOATS, types.float32), build


@intrinsic
def stream(typing_context: Any, value: Any, pointer: Any, at: Any) -> Any:
    """``store`` past the caches, to the beginning of a cache line; ``settle_streams`` before another thread reads."""

    def build(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        value, pointer, at = arguments
        pointer = builder.bitcast(builder.gep(pointer, [at]), value.type.as_pointer())
        stored = builder.store(value, pointer)
        stored.align = CACHE_LINE
        stored.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)]))
        return context.get_dummy_value()

    return signature(types.void, value, pointer, types.uintp), build


@intrinsic
def settle_streams(typing_context: Any) -> Any:
    """Let what was streamed be seen by other threads."""

    def build(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), build


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


def _prefetching(locality: int) -> Any:
    @intrinsic
    def prefetch(typing_context: Any, pointer: Any, at: Any) -> Any:
        def build(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
            first, kind = arguments[0], pointer
            if isinstance(pointer, types.BaseTuple):  # codes; there are few scales
                first, kind = cgutils.unpack_tuple(builder, first)[0], pointer.types[0]
            line = 64 // context.get_abi_sizeof(context.get_value_type(kind.dtype))
            numbers = [ir.Constant(ir.IntType(32), n) for n in (0, locality, 1)]  # to read, where to, data
            for start in range(0, LANES, line):
                at = builder.add(arguments[1], ir.Constant(_i64, start))
                where = builder.bitcast(builder.gep(first, [at]), _byte.as_pointer())
                call(builder, "llvm.prefetch.p0", ir.VoidType(), where, *numbers)
            return context.get_dummy_value()

        return types.void(pointer, types.uintp), build

    return prefetch


prefetch = _prefetching(3)
"""Ask for the cache lines of sixty-four elements; they need not exist."""
prefetch_aside = _prefetching(2)
"""The same, into the second cache: the nearest one can wait for few lines at a time, and has others to hold."""


@intrinsic
def sixteen_at(typing_context: Any, pointer: Any, at: Any) -> Any:
    """Sixteen float32 from ``at`` on."""

    def build(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        return read(builder, builder.gep(arguments[0], [arguments[1]]), SIXTEEN.of)

    return SIXTEEN(types.CPointer(types.float32), types.uintp), build
