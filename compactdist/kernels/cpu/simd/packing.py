"""Packed codes of 1, 2, 4 and 8 bits, sixty-four at a time, compiled by Numba; the first code lies lowest in its byte.

Of the codes the first ``count`` are there, which with the position of the first must fill their bytes.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from compactdist.kernels.cpu.simd.jit import inlined, intrinsic, signature, types
from compactdist.kernels.cpu.simd.memory import read, write
from compactdist.kernels.cpu.simd.vectors import (
    AVX2,
    EIGHT,
    EIGHT_INTS,
    FLOATS,
    HOST,
    INTS,
    MASK,
    call,
    every_nth,
    full,
    joined,
    part,
    spread,
)
from compactdist.kernels.reference import LANES

_byte, _i64 = ir.IntType(8), ir.IntType(64)

_X86 = {512: ("avx512", ".512", "pmaddubs.w", "pmaddw.d"), 256: ("avx2", "", "pmadd.ub.sw", "pmadd.wd")}
"""How LLVM names instructions for registers of so many bits: family, suffix, and the two that add up neighbours."""


def _packed(builder: Any, bits: int, codes: Any) -> Any:
    """Ints below ``2 ** bits``, or for -8 numbers in two's complement, as bytes; for 1 a mask, or which floats are not
    below 0.
    """
    if bits == 1 and codes.type == FLOATS.of and AVX2:
        halves = [_signs_of_half(builder, part(builder, codes, range(at, at + 32))) for at in (0, 32)]
        return builder.bitcast(joined(builder, halves), ir.VectorType(_byte, LANES // 8))
    if bits == 1 and codes.type == FLOATS.of:
        codes = builder.fcmp_ordered(">=", codes, full(0.0))
    if bits == 1:
        return builder.bitcast(codes, ir.VectorType(_byte, LANES // 8))
    if HOST.get("avx512bw", False):
        return _packed_in_registers(builder, bits, codes)
    if AVX2:
        parts = [part(builder, codes, range(at, at + 32)) for at in range(0, LANES, 32)]
        return joined(builder, [_packed_by_eights(builder, bits, one) for one in parts])
    narrow = every_nth(builder, every_nth(builder, codes, 16, 0), 8, 0)
    if abs(bits) == 8:
        return narrow
    count = LANES * bits // 8
    groups = ir.VectorType(ir.IntType(64 // bits), count)
    group = builder.bitcast(narrow, groups)
    together = group
    for k in range(1, 8 // bits):
        shift = ir.Constant(groups, [k * (8 - bits)] * count)
        together = builder.or_(together, builder.lshr(group, shift))
    return builder.trunc(together, ir.VectorType(_byte, count))


def _narrowed(builder: Any, bits: int, codes: Any, register: int) -> Any:
    """Codes in four registers of ``register`` bits, narrowed in pairs and neighbours added, as they come out of that.

    Codes of 8 bits lie in bytes then, of 4 bits in each 16 bits' lowest byte, of 2 bits in each 32 bits' lowest byte.
    """
    family, suffix, adds_bytes, adds_words = _X86[register]

    def x86(name: str, width: int, a: Any, b: Any) -> Any:
        return call(
            builder, f"llvm.x86.{family}.{name}{suffix}", ir.VectorType(ir.IntType(width), register // width), a, b
        )

    def weights(width: int, high: int) -> Any:
        kind = ir.VectorType(ir.IntType(width), register // width)
        return ir.Constant(kind, [1, high] * (kind.count // 2))

    lanes = register // 32
    to_words, to_bytes = ("packssdw", "packsswb") if bits < 0 else ("packusdw", "packuswb")
    parts = [part(builder, codes, range(at, at + lanes)) for at in range(0, 4 * lanes, lanes)]
    words = [x86(to_words, 16, parts[at], parts[at + 1]) for at in (0, 2)]
    group = x86(to_bytes, 8, *words)
    if bits in (2, 4):
        group = x86(adds_bytes, 16, group, weights(8, 1 << bits))
    return x86(adds_words, 32, group, weights(16, 16)) if bits == 2 else group


def _signs_of_half(builder: Any, x: Any) -> Any:
    """Which of thirty-two floats are not below 0, as an int in a vector: four registers narrowed in pairs.

    Their order is restored once, at the end; LLVM by itself restores it whenever a mask is narrowed.
    """
    eight, not_below = EIGHT_INTS.of, ir.Constant(ir.IntType(8), 29)
    parts = [part(builder, x, range(at, at + 8)) for at in range(0, 32, 8)]
    parts = [
        call(builder, "llvm.x86.avx.cmp.ps.256", EIGHT.of, one, ir.Constant(EIGHT.of, [0.0] * 8), not_below)
        for one in parts
    ]
    parts = [builder.bitcast(one, eight) for one in parts]
    half = ir.VectorType(ir.IntType(16), 16)
    words = [call(builder, "llvm.x86.avx2.packssdw", half, parts[at], parts[at + 1]) for at in (0, 2)]
    group = call(builder, "llvm.x86.avx2.packsswb", ir.VectorType(_byte, 32), *words)
    order = ir.Constant(eight, [register + half for register in range(4) for half in (0, 4)])
    group = call(builder, "llvm.x86.avx2.permd", eight, builder.bitcast(group, eight), order)
    signs = call(builder, "llvm.x86.avx2.pmovmskb", ir.IntType(32), builder.bitcast(group, ir.VectorType(_byte, 32)))
    one = ir.VectorType(ir.IntType(32), 1)
    return builder.insert_element(ir.Constant(one, ir.Undefined), signs, ir.Constant(ir.IntType(32), 0))


def _packed_in_registers(builder: Any, bits: int, codes: Any) -> Any:
    """``_packed`` for all but masks and sixty-four lanes: four registers of AVX-512, order restored at the end."""
    # of each four codes in a row one byte, or two bytes of 16 bits; packing took them from four registers in turn
    group = builder.bitcast(_narrowed(builder, bits, codes, 512), ir.VectorType(_byte, 64))
    fours = [4 * (4 * quarter + register) for register in range(4) for quarter in range(4)]
    kept = {2: 1, 4: 2}.get(bits, 4)
    step = 2 if bits == 4 else 1
    return part(builder, group, [at + j * step for at in fours for j in range(kept)])


def _packed_by_eights(builder: Any, bits: int, codes: Any) -> Any:
    """The same for thirty-two lanes: four registers of AVX2."""
    group = _narrowed(builder, bits, codes, 256)
    if bits == 4:
        halves = part(builder, group, range(8)), part(builder, group, range(8, 16))
        group = call(builder, "llvm.x86.sse2.packuswb.128", ir.VectorType(_byte, 16), *halves)
    # of each four codes in a row one element; the lower halves of all registers came first, then the upper ones
    each = {4: 16, 2: 32}.get(bits, 32)
    group = builder.bitcast(group, ir.VectorType(ir.IntType(each), 8))
    group = part(builder, group, [register + half for register in range(4) for half in (0, 4)])
    group = builder.trunc(group, ir.VectorType(_byte, 8)) if bits == 2 else group
    return builder.bitcast(group, ir.VectorType(_byte, 32 * abs(bits) // 8))


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


def _size(builder: Any, width: int, count: Any) -> Any:
    return builder.ashr(builder.mul(count, ir.Constant(_i64, abs(width))), ir.Constant(_i64, 3))


@intrinsic(prefer_literal=True)
def _pack(typing_context: Any, codes: Any, bits: Any, pointer: Any, at: Any, count: Any) -> Any:
    width = bits.literal_value

    def build(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        codes, _, pointer, at, count = arguments
        data, where = _packed(builder, width, codes), builder.gep(pointer, [at])
        whole = builder.icmp_signed(">=", count, ir.Constant(_i64, LANES))
        with builder.if_else(whole, likely=True) as (all_lanes, some):
            with all_lanes:
                write(builder, data, where)
            with some:
                write(builder, data, where, _size(builder, width, count))
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
                one, after_one = read(builder, where, kind), builder.block
            with some:
                other, after_other = read(builder, where, kind, _size(builder, width, count)), builder.block
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
def store_signs(x: Any, out: Any, element: int, count: int) -> None:
    """As ``store_mask``, a bit where a float is not below 0."""
    _pack(x, 1, out, element >> 3, count)


@intrinsic
def _signed(typing_context: Any, mask: Any, x: Any) -> Any:
    """Floats, with the other sign where a mask is not set."""

    def build(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        mask, x = arguments
        if not AVX2:
            return builder.select(mask, x, builder.fneg(x))
        # a shift by lanes brings each bit to where signs are: one instruction in place of a comparison and a choice
        eight, bits, parts = ir.VectorType(ir.IntType(32), 8), builder.bitcast(mask, ir.IntType(64)), []
        for at in range(0, LANES, 8):
            if at % 32 == 0:
                word = builder.trunc(builder.lshr(bits, ir.Constant(_i64, at)), ir.IntType(32))
                words = builder.xor(spread(builder, word, EIGHT_INTS), ir.Constant(eight, [-1] * 8))
            signs = builder.shl(words, ir.Constant(eight, [31 - at % 32 - lane for lane in range(8)]))
            signs = builder.and_(signs, ir.Constant(eight, [1 << 31] * 8))
            some = builder.bitcast(part(builder, x, range(at, at + 8)), eight)
            parts.append(builder.bitcast(builder.xor(some, signs), EIGHT.of))
        return joined(builder, parts)

    return FLOATS(MASK, FLOATS), build


@inlined
def signed_by(x: Any, packed: Any, element: int, count: int) -> Any:
    """Floats, with the other sign where the bit that ``store_mask`` stored is not set."""
    return _signed(mask_at(packed, element, count), x)


@inlined
def mask_at(packed: Any, element: int, count: int) -> Any:
    """Undo ``store_mask``."""
    return _unpack(1, packed, element >> 3, count)


@inlined
def store_codes(codes: Any, bits: int, out: Any, element: int, count: int) -> None:
    """Pack ints to 2, 4 or 8 bits each, the first lowest, as ``store_mask`` does; -8 bits for two's complement."""
    if bits == 2:
        _pack(codes, 2, out, element >> 2, count)
    elif bits == 4:
        _pack(codes, 4, out, element >> 1, count)
    elif bits < 0:
        _pack(codes, -8, out, element, count)
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
