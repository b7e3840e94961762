"""Codes of the quantizers: choosing, packing and looking up, compiled by Numba.

Codes meet the elements one to a byte, in buffers of ``WIDTH``. Chains of selections stand for small tables: a lookup
by index does not vectorise.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba.extending import overload

from compactdist.codecs.kernels.cpu_elements import Array, inlined, jit

__all__ = ["code_views", "level_of", "nearest", "pack", "pack_any", "unpack", "unpack_any"]

_u32, _f32, _at = np.uint32, np.float32, np.uintp


def nearest(u: Any, borders: Any) -> Any:
    """How many of the 1, 3 or 7 ascending borders lie below u, in 1, 2 or 3 comparisons."""
    raise NotImplementedError


def level_of(index: Any, levels: Any) -> Any:
    """``levels[index]`` of 2, 4 or 8."""
    raise NotImplementedError


def _nearest_2(u: Any, borders: Any) -> Any:
    return _u32(1) if u > borders[0] else _u32(0)


def _nearest_4(u: Any, borders: Any) -> Any:
    high = u > borders[1]
    low = u > (borders[2] if high else borders[0])
    return _u32((_u32(2) if high else _u32(0)) | (_u32(1) if low else _u32(0)))


def _nearest_8(u: Any, borders: Any) -> Any:
    high = u > borders[3]
    middle = u > (borders[5] if high else borders[1])
    upper, lower = borders[6] if middle else borders[4], borders[2] if middle else borders[0]
    low = u > (upper if high else lower)
    index = _u32((_u32(4) if high else _u32(0)) | (_u32(2) if middle else _u32(0)))
    return _u32(index | (_u32(1) if low else _u32(0)))


def _level_of_2(index: Any, levels: Any) -> Any:
    return levels[1] if index & _u32(1) else levels[0]


def _level_of_4(index: Any, levels: Any) -> Any:
    odd = (index & _u32(1)) != _u32(0)
    low, high = levels[1] if odd else levels[0], levels[3] if odd else levels[2]
    return high if index & _u32(2) else low


def _level_of_8(index: Any, levels: Any) -> Any:
    odd = (index & _u32(1)) != _u32(0)
    a, b, c, d = (
        levels[1] if odd else levels[0],
        levels[3] if odd else levels[2],
        levels[5] if odd else levels[4],
        levels[7] if odd else levels[6],
    )
    second = (index & _u32(2)) != _u32(0)
    low, high = b if second else a, d if second else c
    return high if index & _u32(4) else low


@overload(nearest)
def _choose_nearest(u: Any, borders: Any) -> Any:
    return {1: _nearest_2, 3: _nearest_4, 7: _nearest_8}[len(borders)]


@overload(level_of)
def _choose_level_of(index: Any, levels: Any) -> Any:
    return {2: _level_of_2, 4: _level_of_4, 8: _level_of_8}[len(levels)]


@jit
def code_views(size: int) -> Any:
    """A buffer of at least ``size`` codes, one in a byte, also seen two, four and eight at a time."""
    codes = np.empty((size + 7) // 8 * 8, np.uint8)
    return codes, codes.view(np.uint16), codes.view(np.uint32), codes.view(np.uint64)


@inlined
def pack(views: Any, bits: int, n: int, out: Array, element: int) -> None:
    """Pack the first ``n`` codes of ``code_views`` to 1, 2, 4 or 8 bits each, first code lowest.

    They go to position ``element`` of ``out`` and on, which must begin a byte, as ``n`` codes must fill theirs.
    """
    one, two, four, eight = views
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
            out[o + _at(k)] = one[_at(k)]


@inlined
def unpack(packed: Array, bits: int, element: int, views: Any, n: int) -> None:
    """Undo ``pack``."""
    one, two, four, eight = views
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
            one[_at(k)] = packed[p + _at(k)]


@jit
def pack_any(codes: Array, bits: int, lo: int, hi: int, out: Array) -> None:
    """Bytes ``lo`` to ``hi`` of codes of any width up to 8 bits; 0 bits stand for trits, five to a byte."""
    if bits == 0:
        for byte in range(lo, hi):
            value = _u32(0)
            for i in range(min(5 * byte + 5, codes.size) - 1, 5 * byte - 1, -1):
                value = _u32(value * _u32(3) + _u32(codes[i]))
            out[byte] = np.uint8(value)
        return
    for byte in range(lo, hi):
        value = _u32(0)
        for i in range(8 * byte // bits, min((8 * byte + 7) // bits + 1, codes.size)):
            shift = i * bits - 8 * byte
            code = _u32(codes[i])
            value |= _u32(code << _u32(shift)) if shift >= 0 else _u32(code >> _u32(-shift))
        out[byte] = np.uint8(value & _u32(0xFF))


@jit
def unpack_any(packed: Array, bits: int, lo: int, hi: int, codes: Array) -> None:
    """Codes ``lo`` to ``hi``, one to a byte. Bytes from 243 on hold no trits that were packed and wrap around."""
    if bits == 0:
        for i in range(lo, hi):
            value = _u32(packed[i // 5])
            for _ in range(i % 5):
                value = _u32(value // _u32(3))
            codes[i] = np.uint8(value % _u32(3))
        return
    mask = _u32((1 << bits) - 1)
    for i in range(lo, hi):
        at, shift = i * bits >> 3, i * bits & 7
        value = _u32(packed[at])
        if shift + bits > 8:
            value |= _u32(_u32(packed[at + 1]) << _u32(8))
        codes[i] = np.uint8(_u32(value >> _u32(shift)) & mask)
