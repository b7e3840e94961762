"""Codes that do not fill the bytes of every chunk, packed once all are there; compiled by Numba."""

from __future__ import annotations

import numpy as np

from compactdist.kernels.cpu_elements import Array, jit, next_part

__all__ = ["pack_eights", "pack_trits", "unpack_eights", "unpack_trits"]

_u32, _at = np.uint32, np.uintp


@jit
def pack_trits(codes: Array, parts: Array, out: Array) -> None:
    """Parts of the bytes, five trits each, the first counting 1, then 3, 9, 27, 81."""
    lo, hi = next_part(parts)
    while lo < hi:
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
        lo, hi = next_part(parts)


@jit
def unpack_trits(packed: Array, parts: Array, codes: Array) -> None:
    """Undo ``pack_trits``. Bytes from 243 on hold no trits that were packed and wrap around."""
    table = np.empty(256 * 5, np.uint8)
    for byte in range(256):
        value = byte
        for k in range(5):
            table[5 * byte + k] = np.uint8(value % 3)
            value //= 3
    lo, hi = next_part(parts)
    while lo < hi:
        whole = min(hi, codes.size // 5)
        for byte in range(lo, whole):
            i, t = _at(5 * byte), _at(5) * _at(packed[_at(byte)])
            for k in range(5):
                codes[i + _at(k)] = table[t + _at(k)]
        for byte in range(max(lo, whole), hi):
            for j in range(5 * byte, codes.size):
                codes[j] = table[5 * _at(packed[byte]) + _at(j - 5 * byte)]
        lo, hi = next_part(parts)


@jit
def pack_eights(codes: Array, bits: int, parts: Array, out: Array) -> None:
    """Codes of ``bits``, 1 to 7, in runs of eight that fill ``bits`` bytes; parts of the runs."""
    lo, hi = next_part(parts)
    while lo < hi:
        for run in range(lo, hi):
            word, count = np.uint64(0), min(8, codes.size - 8 * run)
            for k in range(count):
                word |= np.uint64(codes[_at(8 * run + k)]) << np.uint64(k * bits)
            o = run * bits
            for k in range(min(bits, out.size - o)):
                out[_at(o + k)] = np.uint8((word >> np.uint64(8 * k)) & np.uint64(0xFF))
        lo, hi = next_part(parts)


@jit
def unpack_eights(packed: Array, bits: int, parts: Array, codes: Array) -> None:
    """Undo ``pack_eights``."""
    mask = np.uint64((1 << bits) - 1)
    lo, hi = next_part(parts)
    while lo < hi:
        for run in range(lo, hi):
            word, o = np.uint64(0), run * bits
            for k in range(min(bits, packed.size - o)):
                word |= np.uint64(packed[_at(o + k)]) << np.uint64(8 * k)
            for k in range(min(8, codes.size - 8 * run)):
                codes[_at(8 * run + k)] = np.uint8((word >> np.uint64(k * bits)) & mask)
        lo, hi = next_part(parts)
