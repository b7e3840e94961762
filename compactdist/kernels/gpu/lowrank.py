"""The product of two thin factors in Triton: put onto a prediction by both ends, with the bits of the torch reference;
measured against the residual by the sender, which then writes gain and factors to the payload.

Arguments that several kernels share:

* ``base``, ``second``, ``base_scales``, ``second_scales``, ``coefficient``, ``TERMS``: as ``elements.expected`` takes
  them; ``out`` may be the memory of ``base`` or ``second``;
* ``row_at``, ``column_at``, ``PLACE``: where rows and channels lie, as ``elements.in_rows`` takes them; not ``EIGHTS``;
* ``rank``, ``rows``, ``channels``, ``numel``: components; of the tensor's matrices; of its memory;
* ``u``, ``v``: the factors, ``(G, stride, R)`` and ``(G, stride, C)``, of which the first ``rank`` rows of a group
  count: float32 (``FLOATS``), or sections of the payload: bits of bfloat16, int16 (``HALVES``), or codes of four bits,
  two to a byte (``FOURS``) with ``u_scales`` and ``v_scales``, bits of bfloat16, and the levels in ``table``;
* ``ROWS``, ``WIDTH``: rows and channels of a tile.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

from compactdist.kernels.gpu.elements import (
    F32_MAX,
    INFINITY_BITS,
    add_change,
    bits_of,
    clamped,
    decode_bf16,
    divide_or_zero,
    encode_bf16,
    expected,
    from_bits,
    magnitude_bits,
    places_of,
    power_of_two_near_inverse,
    read,
    rounded_bf16,
    to_nearest_bf16,
    write_twice,
)

FLOATS = tl.constexpr(0)
HALVES = tl.constexpr(1)
FOURS = tl.constexpr(2)

_SMALLEST_SUM = tl.constexpr(2.0**-30)
_SMALLEST_GAIN = tl.constexpr(2.0**-87)


@triton.jit
def element_of(factor, scales, table, component, at, ok, length, FORM: tl.constexpr):
    """Elements ``at`` of a component of a factor, as the receiver has them; 0 where not ``ok``."""
    element = component * length + at
    if FORM == FOURS:
        pair = tl.load(factor + element // 2, mask=ok, other=0).to(tl.int32)
        level = tl.load(table + ((pair >> (4 * (element % 2))) & 15))
        scale = read(scales, component + 0 * at, ok)
        return tl.where(ok, clamped(scale * level, F32_MAX), 0.0)
    else:
        return read(factor, element, ok)


@triton.jit
def product_of(
    u, u_scales, v, v_scales, table, group, row, column, rank, stride, rows, channels,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """Rows ``(ROWS, 1)`` and channels ``(1, WIDTH)`` of the product of a group: components in ascending order, every
    product and every sum rounded; what is small counts as zero.
    """
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    for k in range(0, rank):
        left = element_of(u, u_scales, table, group * stride + k, row, row < rows, rows, FORM)
        right = element_of(v, v_scales, table, group * stride + k, column, column < channels, channels, FORM)
        total += left * right
    return tl.where(tl.abs(total) < _SMALLEST_SUM, 0.0, total)


@triton.jit
def decode_product(
    base, second, base_scales, second_scales, coefficient,
    out, accepted, copy, gains, u, u_scales, v, v_scales, table, row_at, column_at,
    rank, rows, channels, numel,
    TERMS: tl.constexpr, CHECKED: tl.constexpr, COPIES: tl.constexpr, PLACE: tl.constexpr, FORM: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """A tile of what was expected plus the product times its gain. ``CHECKED`` and ``COPIES`` as for ``add_change``.

    Args:
        gains: of the groups, bits of bfloat16.
    """
    terms = (base, second, base_scales, second_scales, coefficient)
    parts, tiles = tl.cdiv(channels, WIDTH), tl.cdiv(rows, ROWS)
    part, tile = tl.program_id(0) % parts, tl.program_id(0) // parts % tiles
    group = tl.program_id(0) // parts // tiles
    row, column = tile * ROWS + tl.arange(0, ROWS)[:, None], part * WIDTH + tl.arange(0, WIDTH)[None, :]
    change = product_of(
        u, u_scales, v, v_scales, table, group, row, column, rank, rank, rows, channels, ROWS, WIDTH, FORM
    )
    gain = read(gains, group + tl.zeros((1, 1), tl.int32), tl.full((1, 1), 1, tl.int1))
    change = clamped(change * gain, F32_MAX)
    at, inside = places_of(group, row, column, row_at, column_at, rows, channels, numel, PLACE)
    add_change(terms, out, accepted, copy, at, inside, change, TERMS, CHECKED, COPIES)


@triton.jit
def factor_of(largest, group, tiles, TILES: tl.constexpr):
    """The power of two that brings a group's largest magnitude near 1, ``(1, 1)``; 0 if it is 0 or not finite.

    Args:
        largest: of each tile of rows, float32 ``(G, tiles)``; infinite where something is not finite.
        TILES: at least ``tiles``, a power of two.
    """
    at = tl.arange(0, TILES)[None, :]
    most = tl.max(tl.load(largest + group * tiles + at, mask=at < tiles, other=0.0), axis=1)[:, None]
    usable = (most > 0) & (bits_of(most) < INFINITY_BITS)
    return tl.where(usable, power_of_two_near_inverse(most), 0.0)


@triton.jit
def compare_product(
    x, base, second, base_scales, second_scales, coefficient,
    u, v, largest, sums, row_at, column_at, rank, stride, rows, channels, numel, tiles, programs,
    TERMS: tl.constexpr, PLACE: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Sums of the scaled residual times the product, and of the product's squares, over every ``programs``-th tile.

    Args:
        u, v: float32.
        largest, tiles, TILES: as ``factor_of`` takes them.
        sums: float32 ``(G, 2, programs)``.
    """
    terms = (base, second, base_scales, second_scales, coefficient)
    group, program = tl.program_id(0) // programs, tl.program_id(0) % programs
    factor = factor_of(largest, group, tiles, TILES)
    parts = tl.cdiv(channels, WIDTH)
    agreement, energy = tl.zeros((ROWS, WIDTH), tl.float32), tl.zeros((ROWS, WIDTH), tl.float32)
    for number in range(program, tl.cdiv(rows, ROWS) * parts, programs):
        row = number // parts * ROWS + tl.arange(0, ROWS)[:, None]
        column = number % parts * WIDTH + tl.arange(0, WIDTH)[None, :]
        at, ok = places_of(group, row, column, row_at, column_at, rows, channels, numel, PLACE)
        value = (read(x, at, ok) - expected(terms, at, ok, TERMS)) * factor
        made = product_of(u, u, v, v, u, group, row, column, rank, stride, rows, channels, ROWS, WIDTH, FLOATS)
        made = tl.where(ok, made, 0.0)
        agreement += value * made
        energy += made * made
    at = group * 2 * programs + program + tl.zeros((1, 1), tl.int32)
    tl.store(sums + at, tl.sum(tl.sum(agreement, axis=1)[:, None], axis=0)[:, None])
    tl.store(sums + programs + at, tl.sum(tl.sum(energy, axis=1)[:, None], axis=0)[:, None])


@triton.jit
def _gain_bits(sums, largest, group, programs, tiles, PROGRAMS: tl.constexpr, TILES: tl.constexpr):
    """Bits of a group's bfloat16 gain of least error, ``(1, 1)``, for the residual as it is; 0 if there is none."""
    factor = factor_of(largest, group, tiles, TILES)
    at = tl.arange(0, PROGRAMS)[None, :]
    first = sums + group * 2 * programs + at
    agreement = tl.sum(tl.load(first, mask=at < programs, other=0.0), axis=1)[:, None]
    energy = tl.sum(tl.load(first + programs, mask=at < programs, other=0.0), axis=1)[:, None]
    gain = divide_or_zero(tl.where(agreement > 0, agreement, 0.0), energy)
    gain = from_bits(to_nearest_bf16(bits_of(gain)))
    gain = tl.where(factor > 0, tl.div_rn(gain, tl.where(factor > 0, factor, 1.0)), 0.0)
    gain = tl.where(gain < _SMALLEST_GAIN, 0.0, gain)
    return encode_bf16(gain)


@triton.jit
def _half_byte(value, at):
    """Byte ``at % 2`` of the upper half of float32."""
    return ((bits_of(value) >> 16) >> (8 * (at % 2))) & 0xFF


@triton.jit
def _factor_bytes(at, values, codes, scales, scales_at, groups, rank, stride, length, FORM: tl.constexpr):
    """Bytes ``at`` of the section of a factor, int32; 0 in its padding.

    Args:
        values, codes: float32 ``(G, stride, length)``: what the receiver makes of a factor, and its codes.
        scales: float32 ``(G, stride)``.
        scales_at: where scales begin.
    """
    count = groups * rank
    if FORM == FOURS:
        found = tl.zeros(at.shape, tl.int32)
        for half in tl.static_range(2):
            element = 2 * at + half
            component = element // length
            row = component // rank * stride + component % rank
            ok = (at >= 0) & (at < scales_at) & (element < count * length)
            code = tl.load(codes + row * length + element % length, mask=ok, other=0.0)
            found |= code.to(tl.int32) << (4 * half)
        number = (at - scales_at) // 2
        ok = (at >= scales_at) & (number < count)
        scale = tl.load(scales + number // rank * stride + number % rank, mask=ok, other=0.0)
        return found | _half_byte(scale, at)
    else:
        element = at // 2
        component = element // length
        row = component // rank * stride + component % rank
        ok = (at >= 0) & (element < count * length)
        return _half_byte(tl.load(values + row * length + element % length, mask=ok, other=0.0), at)


@triton.jit
def write_product(
    base, second, base_scales, second_scales, coefficient,
    out, copy, payload, u, u_codes, u_scales, v, v_codes, v_scales, largest, sums, row_at, column_at,
    groups, rank, stride, rows, channels, numel, tiles, programs, packs, u_at, u_scales_at, v_at, v_scales_at, total,
    TERMS: tl.constexpr, PLACE: tl.constexpr, FORM: tl.constexpr, TILES: tl.constexpr, PROGRAMS: tl.constexpr,
    BYTES: tl.constexpr, COPIES: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """``BYTES`` bytes of the payload, or of a later program a tile of what the receiver will make of it; to ``copy``,
    too, if ``COPIES``.

    Args:
        u, v: float32; u_codes, v_codes, u_scales, v_scales: as ``_factor_bytes`` takes them.
        largest, tiles, TILES: as ``factor_of`` takes them.
        sums, programs: as ``compare_product`` writes them; PROGRAMS: at least as many, a power of two.
        packs: programs that write the payload.
        u_at, v_at, total: where the factors' sections begin in the payload, and its length.
        u_scales_at, v_scales_at: where in them scales begin.
    """
    terms = (base, second, base_scales, second_scales, coefficient)
    if tl.program_id(0) < packs:
        byte = tl.program_id(0) * BYTES + tl.arange(0, BYTES)[None, :]
        found = _factor_bytes(
            tl.where(byte < v_at, byte - u_at, -1), u, u_codes, u_scales, u_scales_at, groups, rank, stride, rows, FORM
        )
        found |= _factor_bytes(byte - v_at, v, v_codes, v_scales, v_scales_at, groups, rank, stride, channels, FORM)
        if tl.program_id(0) * BYTES < u_at:
            found = tl.where(byte < u_at, 0, found)
            for one in range(0, groups):
                bits = _gain_bits(sums, largest, one, programs, tiles, PROGRAMS, TILES)
                found = tl.where(byte // 2 == one, (bits >> (8 * (byte % 2))) & 0xFF, found)
        tl.store(payload + byte, found.to(tl.uint8), mask=byte < total)
    else:
        number = tl.program_id(0) - packs
        parts, count = tl.cdiv(channels, WIDTH), tl.cdiv(rows, ROWS)
        part, tile, group = number % parts, number // parts % count, number // parts // count
        row, column = tile * ROWS + tl.arange(0, ROWS)[:, None], part * WIDTH + tl.arange(0, WIDTH)[None, :]
        change = product_of(u, u, v, v, u, group, row, column, rank, stride, rows, channels, ROWS, WIDTH, FLOATS)
        gain = decode_bf16(_gain_bits(sums, largest, group, programs, tiles, PROGRAMS, TILES))
        change = clamped(change * gain, F32_MAX)
        at, there = places_of(group, row, column, row_at, column_at, rows, channels, numel, PLACE)
        write_twice(out, copy, at, expected(terms, at, there, TERMS) + change, there, COPIES)


@triton.jit
def take_residual(
    x, base, second, base_scales, second_scales, coefficient,
    matrix, largest, flag, row_at, column_at, rows, channels, numel,
    TERMS: tl.constexpr, PLACE: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """``ROWS`` rows of the residual, and their largest magnitude, infinite if one is not finite; sets the flag then.

    Args:
        matrix: receives it, ``(G, R, C)``, float32 or, if ``HALF``, bits of bfloat16; 0 where it is not finite.
        largest: float32 ``(G, tiles of rows)``.
    """
    terms = (base, second, base_scales, second_scales, coefficient)
    tiles = tl.cdiv(rows, ROWS)
    group, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    row = tile * ROWS + tl.arange(0, ROWS)[:, None]
    most = tl.zeros((ROWS, WIDTH), tl.int32)
    for start in range(0, channels, WIDTH):
        column = start + tl.arange(0, WIDTH)[None, :]
        at, ok = places_of(group, row, column, row_at, column_at, rows, channels, numel, PLACE)
        value = read(x, at, ok) - expected(terms, at, ok, TERMS)
        most = tl.maximum(most, magnitude_bits(value))
        value = tl.where(magnitude_bits(value) < INFINITY_BITS, value, 0.0)
        to = (group * rows + row) * channels + column
        inside = (row < rows) & (column < channels)
        if HALF:
            tl.store(matrix.to(tl.pointer_type(tl.int16)) + to, rounded_bf16(value), mask=inside)
        else:
            tl.store(matrix + to, value, mask=inside)
    top = tl.minimum(tl.max(tl.max(most, axis=1)[:, None], axis=0)[:, None], INFINITY_BITS)
    tl.store(largest + tl.program_id(0) + tl.zeros((1, 1), tl.int32), from_bits(top))
    tl.store(flag + tl.zeros((1, 1), tl.int32), 1, mask=top >= INFINITY_BITS)
