"""Codes of the quantizers: choosing, packing and looking up, compiled by Numba.

Codes meet the elements one to a byte, in buffers on the stack.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from compactdist.codecs.kernels.cpu_elements import ROUNDING, Array, Pointer, inlined, jit
from compactdist.codecs.kernels.cpu_vectors import (
    HAS_LOOK_UP,
    as_u16,
    as_u32,
    as_u64,
    look_up_64,
    not_negative,
    store_word,
)
from compactdist.codecs.kernels.reference import LANES

__all__ = [
    "look_up",
    "nearest_index",
    "nearest_step",
    "pack",
    "pack_signs",
    "pack_eights",
    "pack_trits",
    "unpack",
    "unpack_eights",
    "unpack_trits",
]

_u32, _f32, _at = np.uint32, np.float32, np.uintp


@inlined
def nearest_index(u: Any, borders: Any) -> Any:
    """How many of the borders, a tuple, lie below u; the search is unrolled."""
    index = _u32(0)
    for i in range(len(borders)):
        index = _u32(index + _u32(1)) if u > borders[i] else index
    return index


@inlined
def nearest_step(u: Any, largest: Any, value: Any) -> Any:
    """The integer nearest to u, at most ``largest``, with the sign of ``value``; still a float32."""
    steps = largest if u > largest else u
    steps = (steps + ROUNDING) - ROUNDING
    return -steps if value < _f32(0) else steps


@inlined
def look_up(codes: Pointer, table: Pointer, n: int, out: Pointer) -> None:
    """Levels of the first ``n`` codes, one to a byte, all below 16; the table is 16 float32."""
    done = 0
    if HAS_LOOK_UP:
        done = n // LANES * LANES
        for k in range(n // LANES):
            look_up_64(codes, table, out, _at(k * LANES))
    for j in range(done, n):
        out[_at(j)] = table[_at(codes[_at(j)])]


@inlined
def pack(codes: Pointer, bits: int, n: int, out: Pointer, element: int) -> None:
    """Pack the first ``n`` codes, one to a byte, to 1, 2, 4 or 8 bits each, first code lowest.

    They go to position ``element`` of ``out`` and on, which must begin a byte, as ``n`` codes must fill theirs.
    """
    two, four, eight = as_u16(codes), as_u32(codes), as_u64(codes)
    o = _at((element * bits) >> 3)
    if bits == 1:
        for k in range(n >> 3):
            v = eight[_at(k)]
            v |= v >> np.uint64(7)
            v |= v >> np.uint64(14)
            v |= v >> np.uint64(28)
            out[o + _at(k)] = np.uint8(v & np.uint64(0xFF))
    elif bits == 2:
        for k in range(n >> 2):
            w = four[_at(k)]
            out[o + _at(k)] = np.uint8(_u32(w | w >> _u32(6) | w >> _u32(12) | w >> _u32(18)) & _u32(0xFF))
    elif bits == 4:
        for k in range(n >> 1):
            h = _u32(two[_at(k)])
            out[o + _at(k)] = np.uint8(_u32(h | h >> _u32(4)) & _u32(0xFF))
    else:
        for k in range(n):
            out[o + _at(k)] = codes[_at(k)]


@inlined
def unpack(packed: Pointer, bits: int, element: int, codes: Pointer, n: int) -> None:
    """Undo ``pack``."""
    two, four, eight = as_u16(codes), as_u32(codes), as_u64(codes)
    p = _at((element * bits) >> 3)
    if bits == 1:
        for k in range(n >> 3):
            v = np.uint64(packed[p + _at(k)]) * np.uint64(0x0101010101010101) & np.uint64(0x8040201008040201)
            eight[_at(k)] = (v + np.uint64(0x7F7F7F7F7F7F7F7F)) >> np.uint64(7) & np.uint64(0x0101010101010101)
    elif bits == 2:
        for k in range(n >> 2):
            w = _u32(packed[p + _at(k)])
            four[_at(k)] = _u32(w | w << _u32(6) | w << _u32(12) | w << _u32(18)) & _u32(0x03030303)
    elif bits == 4:
        for k in range(n >> 1):
            h = _u32(packed[p + _at(k)])
            two[_at(k)] = np.uint16(_u32(h | h << _u32(4)) & _u32(0x0F0F))
    else:
        for k in range(n):
            codes[_at(k)] = packed[p + _at(k)]


@inlined
def pack_signs(values: Pointer, n: int, packed: Pointer, element: int, codes: Pointer) -> None:
    """Sign codes of ``n`` float32 values, to position ``element`` and on."""
    whole = n // LANES
    for k in range(whole):
        store_word(not_negative(values, _at(k * LANES)), packed, _at((element >> 3) + 8 * k))
    rest, o = n - whole * LANES, _at(whole * LANES)
    for j in range(rest):
        codes[_at(j)] = np.uint8(values[o + _at(j)] >= _f32(0))
    pack(codes, 1, rest, packed, element + whole * LANES)


@jit
def pack_trits(codes: Array, lo: int, hi: int, out: Array) -> None:
    """Bytes ``lo`` to ``hi``, five trits each, the first counting 1, then 3, 9, 27, 81."""
    whole = min(hi, codes.size // 5)
    for byte in range(lo, whole):
        i = _at(5 * byte)
        value = _u32(codes[i + _at(4)])
        for k in range(3, -1, -1):
            value = _u32(value * _u32(3) + _u32(codes[i + _at(k)]))
        out[_at(byte)] = np.uint8(value)
    for byte in range(max(lo, whole), hi):
        value = _u32(0)
        for j in range(codes.size - 1, 5 * byte - 1, -1):
            value = _u32(value * _u32(3) + _u32(codes[j]))
        out[byte] = np.uint8(value)


@jit
def unpack_trits(packed: Array, lo: int, hi: int, codes: Array) -> None:
    """Undo ``pack_trits``. Bytes from 243 on hold no trits that were packed and wrap around."""
    table = np.empty(256 * 5, np.uint8)
    for byte in range(256):
        value = byte
        for k in range(5):
            table[5 * byte + k] = np.uint8(value % 3)
            value //= 3
    whole = min(hi, codes.size // 5)
    for byte in range(lo, whole):
        i, t = _at(5 * byte), _at(5) * _at(packed[_at(byte)])
        for k in range(5):
            codes[i + _at(k)] = table[t + _at(k)]
    for byte in range(max(lo, whole), hi):
        for j in range(5 * byte, codes.size):
            codes[j] = table[5 * _at(packed[byte]) + _at(j - 5 * byte)]


@jit
def pack_eights(codes: Array, bits: int, lo: int, hi: int, out: Array) -> None:
    """Codes of ``bits``, 1 to 7, in runs of eight that fill ``bits`` bytes; runs ``lo`` to ``hi``."""
    for run in range(lo, hi):
        word, count = np.uint64(0), min(8, codes.size - 8 * run)
        for k in range(count):
            word |= np.uint64(codes[_at(8 * run + k)]) << np.uint64(k * bits)
        o = run * bits
        for k in range(min(bits, out.size - o)):
            out[_at(o + k)] = np.uint8((word >> np.uint64(8 * k)) & np.uint64(0xFF))


@jit
def unpack_eights(packed: Array, bits: int, lo: int, hi: int, codes: Array) -> None:
    """Undo ``pack_eights``."""
    mask = np.uint64((1 << bits) - 1)
    for run in range(lo, hi):
        word, o = np.uint64(0), run * bits
        for k in range(min(bits, packed.size - o)):
            word |= np.uint64(packed[_at(o + k)]) << np.uint64(8 * k)
        for k in range(min(8, codes.size - 8 * run)):
            codes[_at(8 * run + k)] = np.uint8((word >> np.uint64(k * bits)) & mask)
