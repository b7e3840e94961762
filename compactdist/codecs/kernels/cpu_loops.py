"""The loops of the fused CPU steps, compiled by Numba. ``cpu.py`` calls them and says what they are for.

What both ends compute is in the order of ``reference.py`` to the bit, so ``fastmath`` is out of the question. Tensors
come as bits: float32 as float32, bfloat16 as uint16, float16 as int16; the type chooses the conversion. Every loop
over elements runs over slices of one run of memory and meets no index it might have to wrap: that is what lets LLVM
vectorise it. Loops read into a small buffer before they write, for input and output may be the same memory.

A *place* is what tells where matrix elements lie: ``(row_at, chunk_at, chunk_from, chunk_len, rows, channels,
numel)``, see ``cpu.py``. A *tile* is 32 rows of one group.

All of it is in one file because Numba looks at one file's date to tell whether its cache on disk still holds.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba.extending import overload

TILE = 32
"""Rows summed together, as in the reference."""

WIDTH = 128
"""Longest chunk of channels: a tile of it fits in the first-level cache."""

Array = Any
_jit = numba.njit(cache=True, nogil=True, error_model="numpy")
_u32, _f32 = np.uint32, np.float32


def _widen(v: Any) -> Any:
    """An element as float32."""
    raise NotImplementedError


def _narrow(v: Any, like: Any) -> Any:
    """A float32 within the range of the element type of ``like``, rounded to nearest even."""
    raise NotImplementedError


def _widen_f32(v: Any) -> Any:
    return v


def _widen_bf16(v: Any) -> Any:
    return _u32(_u32(v) << _u32(16)).view(_f32)


def _widen_f16(v: Any) -> Any:
    bits = _u32(_u32(v) & _u32(0xFFFF))
    sign = _u32(_u32(bits & _u32(0x8000)) << _u32(16))
    body = _u32(_u32(bits & _u32(0x7FFF)) << _u32(13))
    normal = _u32(body + _u32(112 << 23))
    # Subnormals: with the exponent of 2**-14 and its implicit bit taken off again, all in normal numbers.
    small = _f32(_u32(body + _u32(113 << 23)).view(_f32) - _f32(6.103515625e-05)).view(_u32)
    out = small if body < _u32(0x400 << 13) else normal
    out = _u32(body + _u32(224 << 23)) if body >= _u32(0x7C00 << 13) else out
    return _u32(out | sign).view(_f32)


def _narrow_f32(v: Any, like: Any) -> Any:
    return v


def _narrow_bf16(v: Any, like: Any) -> Any:
    bits = _f32(v).view(_u32)
    rounded = _u32(_u32(bits + _u32(0x7FFF) + _u32(_u32(bits >> _u32(16)) & _u32(1))) >> _u32(16))
    return np.uint16(_u32(0x7FC0) if v != v else rounded)


def _narrow_f16(v: Any, like: Any) -> Any:
    bits = _f32(v).view(_u32)
    sign = _u32(_u32(bits >> _u32(16)) & _u32(0x8000))
    body = _u32(bits & _u32(0x7FFFFFFF))
    normal = _u32(_u32(body - _u32(112 << 23) + _u32(0xFFF) + _u32(_u32(body >> _u32(13)) & _u32(1))) >> _u32(13))
    # Subnormals: adding 0.5 shifts the mantissa to where it belongs, and rounds it.
    small = _u32(_f32(body.view(_f32) + _f32(0.5)).view(_u32) - _u32(0x3F000000))
    out = small if body < _u32(113 << 23) else normal
    out = _u32(0x7C00) if body >= _u32(0x47800000) else out
    out = _u32(0x7E00) if body > _u32(0x7F800000) else out
    return np.int16(np.uint16(out | sign))


_WIDEN = {numba.float32: _widen_f32, numba.uint16: _widen_bf16, numba.int16: _widen_f16}
_NARROW = {numba.float32: _narrow_f32, numba.uint16: _narrow_bf16, numba.int16: _narrow_f16}


@overload(_widen)
def _choose_widen(v: Any) -> Any:
    return _WIDEN[v]


@overload(_narrow)
def _choose_narrow(v: Any, like: Any) -> Any:
    return _NARROW[like.dtype]


@_jit
def convert_in(x: Array, out: Array) -> None:
    """Widen every element."""
    for j in range(x.size):
        out[j] = _widen(x[j])


@_jit
def convert_out(x: Array, out: Array) -> None:
    """Round every float32 to the element type of ``out``."""
    for j in range(x.size):
        out[j] = _narrow(x[j], out)


@_jit
def _residual(x: Array, base: Array, at: int, limit: int, out: Array) -> None:
    """``x - base`` from element ``at`` on; zero past ``limit``. An empty base stands for no prediction."""
    valid = max(0, min(out.size, limit - at))
    xs, to = x[at : at + valid], out[:valid]
    if base.size == 0:
        for j in range(valid):
            to[j] = _widen(xs[j])
    else:
        bs = base[at : at + valid]
        for j in range(valid):
            to[j] = _widen(xs[j]) - _widen(bs[j])
    for j in range(valid, out.size):
        out[j] = _f32(0)


@_jit
def _fold(buffer: Array, length: int, width: int) -> None:
    """Fold ``length`` elements in place: upper half onto lower, until ``width`` are left."""
    while length > width:
        half = width
        while half * 2 < length:
            half *= 2
        upper = length - half
        lo, hi = buffer[:upper], buffer[half : half + upper]
        for j in range(upper):
            lo[j] += hi[j]
        length = half


@_jit
def _magnitudes(values: Array, factor: Any) -> None:
    for j in range(values.size):
        values[j] = abs(values[j]) * factor


@_jit
def _pack(codes: Array, bits: int, out: Array) -> None:
    """Codes, one in a byte, to ``bits`` each, first code lowest."""
    if bits == 1:
        eight = codes.view(np.uint64)
        for k in range(out.size):
            v = eight[k]
            v |= v >> np.uint64(7)
            v |= v >> np.uint64(14)
            v |= v >> np.uint64(28)
            out[k] = np.uint8(v & np.uint64(0xFF))
    elif bits == 2:
        four = codes.view(np.uint32)
        for k in range(out.size):
            w = four[k]
            out[k] = np.uint8(_u32(w | w >> _u32(6) | w >> _u32(12) | w >> _u32(18)) & _u32(0xFF))
    elif bits == 4:
        two = codes.view(np.uint16)
        for k in range(out.size):
            h = _u32(two[k])
            out[k] = np.uint8(_u32(h | h >> _u32(4)) & _u32(0xFF))
    else:
        for k in range(out.size):
            out[k] = codes[k]


@_jit
def _unpack(packed: Array, table: Array, out: Array) -> None:
    """Levels of packed codes; ``table[byte]`` holds the levels of one byte's codes."""
    per_byte = table.shape[1]
    if per_byte == 8:
        for k in range(packed.size):
            to, levels = out[8 * k : 8 * k + 8], table[packed[k]]
            for b in range(8):
                to[b] = levels[b]
    elif per_byte == 4:
        for k in range(packed.size):
            to, levels = out[4 * k : 4 * k + 4], table[packed[k]]
            for b in range(4):
                to[b] = levels[b]
    elif per_byte == 2:
        for k in range(packed.size):
            to, levels = out[2 * k : 2 * k + 2], table[packed[k]]
            for b in range(2):
                to[b] = levels[b]
    else:
        flat = table[:, 0]
        for k in range(packed.size):
            out[k] = flat[packed[k]]


@_jit
def row_statistics(
    x: Array, base: Array, place: Any, factors: Array, lo: int, hi: int, sums: bool, stat: Array, most: Array, least: Array
) -> None:
    """For rows ``lo`` to ``hi``: the folded sum of scaled magnitudes (if ``sums``), and the bits of the largest and of
    the smallest nonzero magnitude, the latter less one."""
    row_at, chunk_at, chunk_from, chunk_len, rows, channels, numel = place
    buffer = np.empty(channels, np.float32)
    bits = buffer.view(np.uint32)
    for row in range(lo, hi):
        for k in range(chunk_at.size):
            part = buffer[chunk_at[k] : chunk_at[k] + chunk_len[k]]
            _residual(x, base, row_at[row] + chunk_from[k], numel, part)
        large, small = _u32(0), _u32(0xFFFFFFFF)
        for j in range(channels):
            v = _u32(bits[j] & _u32(0x7FFFFFFF))
            large = max(large, v)
            small = min(small, _u32(v - _u32(1)))
        most[row], least[row] = large, small
        if sums:
            _magnitudes(buffer, factors[row // rows])
            _fold(buffer, channels, 1)
            stat[row] = buffer[0]


@_jit
def sign_codes(
    x: Array, base: Array, place: Any, factors: Array, t: Array, lo: int, hi: int, packed: Array, sums: Array
) -> None:
    """For tiles ``lo`` to ``hi``: sign codes, and by channel the sums of ``m * t``."""
    row_at, chunk_at, chunk_from, chunk_len, rows, channels, numel = place
    tiles = (rows + TILE - 1) // TILE
    whole, codes = np.empty(TILE * WIDTH, np.float32), np.empty(WIDTH, np.uint8)
    for tile in range(lo, hi):
        group, first = tile // tiles, tile % tiles * TILE
        factor = factors[group]
        for k in range(chunk_at.size):
            n = chunk_len[k]
            code = codes[:n]
            for r in range(TILE):
                m = whole[r * n : r * n + n]
                if first + r >= rows:
                    m[:] = _f32(0)
                    continue
                row = group * rows + first + r
                _residual(x, base, row_at[row] + chunk_from[k], numel, m)
                for j in range(n):
                    code[j] = np.uint8(m[j] >= _f32(0))
                weight = t[row]
                for j in range(n):
                    m[j] = abs(m[j]) * factor * weight
                at = (row * channels + chunk_at[k]) >> 3
                _pack(code, 1, packed[at : at + (n >> 3)])
            _fold(whole, TILE * n, n)
            sums[tile, chunk_at[k] : chunk_at[k] + n] = whole[:n]


@_jit
def energies(
    x: Array, base: Array, place: Any, factors: Array, t: Array, lo: int, hi: int, squares: Array, sums: Array
) -> None:
    """For tiles ``lo`` to ``hi``, by channel: the sums of ``m * m`` and of ``m * t``."""
    row_at, chunk_at, chunk_from, chunk_len, rows, channels, numel = place
    tiles = (rows + TILE - 1) // TILE
    one, two = np.empty(TILE * WIDTH, np.float32), np.empty(TILE * WIDTH, np.float32)
    for tile in range(lo, hi):
        group, first = tile // tiles, tile % tiles * TILE
        factor = factors[group]
        for k in range(chunk_at.size):
            n = chunk_len[k]
            for r in range(TILE):
                a, b = one[r * n : r * n + n], two[r * n : r * n + n]
                if first + r >= rows:
                    a[:] = _f32(0)
                    b[:] = _f32(0)
                    continue
                row = group * rows + first + r
                _residual(x, base, row_at[row] + chunk_from[k], numel, a)
                weight = t[row]
                for j in range(n):
                    m = abs(a[j]) * factor
                    a[j] = m * m
                    b[j] = m * weight
            _fold(one, TILE * n, n)
            _fold(two, TILE * n, n)
            squares[tile, chunk_at[k] : chunk_at[k] + n] = one[:n]
            sums[tile, chunk_at[k] : chunk_at[k] + n] = two[:n]


@_jit
def nearest_codes(
    x: Array,
    base: Array,
    place: Any,
    factors: Array,
    t: Array,
    inverse_t: Array,
    inverse_c: Array,
    borders: Array,
    magnitudes: Array,
    lo: int,
    hi: int,
    packed: Array,
    products: Array,
    squares: Array,
) -> None:
    """For tiles ``lo`` to ``hi``: sign and index of the nearest magnitude, and by channel, with w the chosen
    magnitude times t, the sums of ``m * w`` and of ``w * w``."""
    row_at, chunk_at, chunk_from, chunk_len, rows, channels, numel = place
    tiles = (rows + TILE - 1) // TILE
    bits = 1
    while 1 << bits < 2 * magnitudes.size:
        bits += 1
    one, two = np.empty(TILE * WIDTH, np.float32), np.empty(TILE * WIDTH, np.float32)
    codes, scaled = np.empty(WIDTH, np.uint8), np.empty(WIDTH, np.float32)
    sign_code = np.uint8(magnitudes.size)
    for tile in range(lo, hi):
        group, first = tile // tiles, tile % tiles * TILE
        factor = factors[group]
        for k in range(chunk_at.size):
            n = chunk_len[k]
            code, v = codes[:n], scaled[:n]
            inverse = inverse_c[group, chunk_at[k] : chunk_at[k] + n]
            for r in range(TILE):
                a, b = one[r * n : r * n + n], two[r * n : r * n + n]
                if first + r >= rows:
                    a[:] = _f32(0)
                    b[:] = _f32(0)
                    continue
                row = group * rows + first + r
                _residual(x, base, row_at[row] + chunk_from[k], numel, a)
                weight, inverse_weight = t[row], inverse_t[row]
                for j in range(n):
                    code[j] = sign_code if a[j] < _f32(0) else np.uint8(0)
                for j in range(n):
                    m = abs(a[j]) * factor
                    a[j] = m
                    v[j] = m * inverse[j] * inverse_weight
                    b[j] = magnitudes[0]
                for i in range(borders.size):
                    border, level = borders[i], magnitudes[i + 1]
                    for j in range(n):
                        above = v[j] > border
                        code[j] += np.uint8(above)
                        b[j] = level if above else b[j]
                for j in range(n):
                    w = b[j] * weight
                    a[j] = a[j] * w
                    b[j] = w * w
                at = ((row * channels + chunk_at[k]) * bits) >> 3
                _pack(code, bits, packed[at : at + ((n * bits) >> 3)])
            _fold(one, TILE * n, n)
            _fold(two, TILE * n, n)
            products[tile, chunk_at[k] : chunk_at[k] + n] = one[:n]
            squares[tile, chunk_at[k] : chunk_at[k] + n] = two[:n]


@_jit
def reaches(x: Array, base: Array, place: Any, factors: Array, inverse_t: Array, lo: int, hi: int, out: Array) -> None:
    """For tiles ``lo`` to ``hi``, by channel: the largest ``m / t``."""
    row_at, chunk_at, chunk_from, chunk_len, rows, channels, numel = place
    tiles = (rows + TILE - 1) // TILE
    values = np.empty(WIDTH, np.float32)
    for tile in range(lo, hi):
        group, first = tile // tiles, tile % tiles * TILE
        factor = factors[group]
        for k in range(chunk_at.size):
            n = chunk_len[k]
            v, top = values[:n], out[tile, chunk_at[k] : chunk_at[k] + n]
            top[:] = _f32(0)
            for row in range(group * rows + first, group * rows + min(first + TILE, rows)):
                _residual(x, base, row_at[row] + chunk_from[k], numel, v)
                inverse = inverse_t[row]
                for j in range(n):
                    reach = abs(v[j]) * factor * inverse
                    top[j] = reach if reach > top[j] else top[j]


@_jit
def linear_codes(
    x: Array,
    base: Array,
    place: Any,
    factors: Array,
    inverse_t: Array,
    inverse_c: Array,
    largest: Any,
    lo: int,
    hi: int,
    packed: Array,
) -> None:
    """For rows ``lo`` to ``hi``: the nearest integer of ``m / (t * c)`` with the sign of the element, in a byte."""
    row_at, chunk_at, chunk_from, chunk_len, rows, channels, numel = place
    values = np.empty(WIDTH, np.float32)
    shift = _f32(12582912.0)  # 1.5 * 2**23: adding it rounds to an integer, half to even
    for row in range(lo, hi):
        group = row // rows
        factor, inverse_weight = factors[group], inverse_t[row]
        for k in range(chunk_at.size):
            n = chunk_len[k]
            v, inverse = values[:n], inverse_c[group, chunk_at[k] : chunk_at[k] + n]
            _residual(x, base, row_at[row] + chunk_from[k], numel, v)
            at = row * channels + chunk_at[k]
            code = packed[at : at + n]
            for j in range(n):
                steps = abs(v[j]) * factor * inverse[j] * inverse_weight
                steps = largest if steps > largest else steps
                steps = (steps + shift) - shift
                steps = -steps if v[j] < _f32(0) else steps
                code[j] = np.uint8(np.int32(steps))


@_jit
def apply_codes(
    packed: Array,
    table: Array,
    t: Array,
    c: Array,
    base: Array,
    place: Any,
    limit: Any,
    lo: int,
    hi: int,
    out: Array,
) -> None:
    """For rows ``lo`` to ``hi``: ``out = base + (t * c) * level``, kept within ``limit`` and rounded."""
    row_at, chunk_at, chunk_from, chunk_len, rows, channels, numel = place
    per_byte = table.shape[1]
    levels, values = np.empty(WIDTH, np.float32), np.empty(WIDTH, np.float32)
    largest = _f32(3.4028234663852886e38)
    for row in range(lo, hi):
        group, weight = row // rows, t[row]
        for k in range(chunk_at.size):
            n = chunk_len[k]
            first = (row * channels + chunk_at[k]) // per_byte
            level = levels[:n]
            _unpack(packed[first : first + n // per_byte], table, level)
            at = row_at[row] + chunk_from[k]
            valid = max(0, min(n, numel - at))
            scale, v = c[group, chunk_at[k] : chunk_at[k] + valid], values[:valid]
            for j in range(valid):
                d = (weight * scale[j]) * level[j]
                d = largest if d > largest else d
                level[j] = -largest if d < -largest else d
            if base.size == 0:
                for j in range(valid):
                    v[j] = level[j]
            else:
                bs = base[at : at + valid]
                for j in range(valid):
                    v[j] = _widen(bs[j]) + level[j]
            to = out[at : at + valid]
            for j in range(valid):
                y = limit if v[j] > limit else v[j]
                to[j] = _narrow(-limit if y < -limit else y, to)
