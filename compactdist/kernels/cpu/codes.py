"""Codes that do not fill the bytes of every chunk, packed once all are there; compiled by Numba.

All are works over runs: of five trits in a byte, or of eight codes.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from compactdist.kernels.cpu import call
from compactdist.kernels.cpu.simd.memory import stack_bytes
from compactdist.kernels.cpu.simd.slots import bytes_at, next_part

__all__ = ["pack_eights", "pack_trits", "unpack_eights", "unpack_trits"]

_u32, _at = np.uint32, np.uintp
_PAYLOAD, _CODES, _ELEMENTS, _CODES_NBYTES = call.PAYLOAD, call.CODES, call.ELEMENTS, call.CODES_NBYTES
_BITS, _APART_PASS = call.BITS, call.APART_PASS


def pack_trits() -> Any:
    """Five trits to a byte, the first counting 1, then 3, 9, 27, 81."""

    def body(args: Any) -> int:
        codes, out, count = bytes_at(args, _CODES), bytes_at(args, _PAYLOAD), args[_ELEMENTS]
        lo, hi = next_part(args, _APART_PASS)
        while lo < hi:
            whole = min(hi, count // 5)
            for byte in range(lo, whole):
                i = _at(5 * byte)
                value = _u32(codes[i + _at(4)])
                for k in range(3, -1, -1):
                    value = _u32(value * _u32(3) + _u32(codes[i + _at(k)]))
                out[_at(byte)] = np.uint8(value)
            for byte in range(max(lo, whole), hi):
                value = _u32(0)
                for j in range(count - 1, 5 * byte - 1, -1):
                    value = _u32(value * _u32(3) + _u32(codes[j]))
                out[byte] = np.uint8(value)
            lo, hi = next_part(args, _APART_PASS)
        return 0

    return body


def unpack_trits() -> Any:
    """Undo ``pack_trits``. Bytes from 243 on hold no trits that were packed and wrap around."""

    def body(args: Any) -> int:
        codes, packed, count = bytes_at(args, _CODES), bytes_at(args, _PAYLOAD), args[_ELEMENTS]
        table = stack_bytes(1280)
        for byte in range(256):
            value = byte
            for k in range(5):
                table[5 * byte + k] = np.uint8(value % 3)
                value //= 3
        lo, hi = next_part(args, _APART_PASS)
        while lo < hi:
            whole = min(hi, count // 5)
            for byte in range(lo, whole):
                i, t = _at(5 * byte), _at(5) * _at(packed[_at(byte)])
                for k in range(5):
                    codes[i + _at(k)] = table[t + _at(k)]
            for byte in range(max(lo, whole), hi):
                for j in range(5 * byte, count):
                    codes[j] = table[5 * _at(packed[byte]) + _at(j - 5 * byte)]
            lo, hi = next_part(args, _APART_PASS)
        return 0

    return body


def pack_eights() -> Any:
    """Codes of 1 to 7 bits in runs of eight that fill as many bytes."""

    def body(args: Any) -> int:
        codes, out, count = bytes_at(args, _CODES), bytes_at(args, _PAYLOAD), args[_ELEMENTS]
        bits, nbytes = args[_BITS], args[_CODES_NBYTES]
        lo, hi = next_part(args, _APART_PASS)
        while lo < hi:
            for run in range(lo, hi):
                word = np.uint64(0)
                for k in range(min(8, count - 8 * run)):
                    word |= np.uint64(codes[_at(8 * run + k)]) << np.uint64(k * bits)
                o = run * bits
                for k in range(min(bits, nbytes - o)):
                    out[_at(o + k)] = np.uint8((word >> np.uint64(8 * k)) & np.uint64(0xFF))
            lo, hi = next_part(args, _APART_PASS)
        return 0

    return body


def unpack_eights() -> Any:
    """Undo ``pack_eights``."""

    def body(args: Any) -> int:
        codes, packed, count = bytes_at(args, _CODES), bytes_at(args, _PAYLOAD), args[_ELEMENTS]
        bits, nbytes = args[_BITS], args[_CODES_NBYTES]
        mask = np.uint64((1 << bits) - 1)
        lo, hi = next_part(args, _APART_PASS)
        while lo < hi:
            for run in range(lo, hi):
                word, o = np.uint64(0), run * bits
                for k in range(min(bits, nbytes - o)):
                    word |= np.uint64(packed[_at(o + k)]) << np.uint64(8 * k)
                for k in range(min(8, count - 8 * run)):
                    codes[_at(8 * run + k)] = np.uint8((word >> np.uint64(k * bits)) & mask)
            lo, hi = next_part(args, _APART_PASS)
        return 0

    return body
