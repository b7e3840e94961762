"""Channel scales from the frame before, in Triton: what ``reference/history.py`` says, to the bit.

Row scales follow from a row and the scales that both ends hold, so a pass over x and base settles them; codes and
reconstruction are those of ``codes.py``. Of some rows a third look makes the sums of squares that the next frame's
scales come from. Groups whose sums might leave float32 set the flag: the reference encodes these.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

from compactdist.kernels.gpu.codes import FLOAT8, LINEAR, NEAREST, TERNARY, channel_scale
from compactdist.kernels.gpu.elements import (
    bits_of,
    decode_bf16,
    encode_bf16,
    fold_lanes,
    fold_tiles,
    from_bits,
    in_rows,
    inverse_or_zero,
    is_plain,
    magnitude_bits,
    magnitudes,
    power_of_two_near_inverse,
    storable_scale,
)
from compactdist.kernels.gpu.scales import fill
from compactdist.kernels.reference import history

_SMALLEST = tl.constexpr(history.SMALLEST)
_SMALLEST_BITS = tl.constexpr(history.SMALLEST_BITS)
_LARGEST_BITS = tl.constexpr(history.LARGEST_BITS)
_LARGEST = tl.constexpr(2.0**100)


@triton.jit
def take_scales(c, inverse, weights, factors, channels):
    """Of a group: 1 / c, the sum of ``c * c``, and 1 as the factor that ``encode_codes`` wants.

    Args:
        c: float32 ``(G, C)``.
        inverse: likewise.
        weights, factors: float32 ``(G,)``.
    """
    group, lane = tl.program_id(0), tl.arange(0, 64)
    sums = tl.zeros((64,), tl.float32)
    for start in range(0, channels, 64):
        at, here = group * channels + start + lane, start + lane < channels
        one = tl.load(c + at, mask=here, other=0)
        sums += one * one
        tl.store(inverse + at, inverse_or_zero(one), mask=here)
    at = group + tl.arange(0, 1)
    tl.store(weights + at, fold_lanes(tl.reshape(sums, (1, 64)), 1))
    tl.store(factors + at, tl.full((1,), 1.0, tl.float32))


@triton.jit
def settle_rows(
    x,
    base,
    second,
    base_scales,
    second_scales,
    coefficient,
    row_at,
    column_at,
    c,
    inverse,
    weights,
    largest,
    payload,
    row_scales_at,
    rows,
    channels,
    numel,
    constant,
    KIND: tl.constexpr,
    WIDENING: tl.constexpr,
    PLACE: tl.constexpr,
    WHOLE: tl.constexpr,
    TERMS: tl.constexpr,
    ROWS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Of ``ROWS`` rows: their scales, to the payload, and the largest statistic of the group.

    Args:
        largest: int32 ``(G,)``, the bits; zeros before.
    """
    terms = (base, second, base_scales, second_scales, coefficient)
    parts = tl.cdiv(rows, ROWS)
    group = tl.program_id(0) // parts
    local = tl.program_id(0) % parts * ROWS + tl.arange(0, ROWS)
    row = group * rows + tl.where(local < rows, local, 0)
    row3, inside = row[:, None, None], (local < rows)[:, None, None]
    first_unit, lane = tl.arange(0, 8)[None, :, None], tl.arange(0, 8)[None, None, :]
    sums, energies = tl.zeros((ROWS, 8, 8), tl.float32), tl.zeros((ROWS, 8, 8), tl.float32)
    most = tl.zeros((ROWS, 8, 8), tl.int32)
    for start in range(0, channels, 64 * UNROLL):
        for step in tl.static_range(UNROLL):
            unit = start // 8 + 8 * step + first_unit
            at, ok = in_rows(row3, inside, unit, row_at, column_at, channels, numel, PLACE, WHOLE)
            m = magnitudes(x, terms, at, ok, TERMS)
            column = 8 * unit + lane
            if KIND == LINEAR or KIND == FLOAT8:
                over = tl.load(inverse + group * channels + column, mask=column < channels, other=0)
                most = tl.maximum(most, magnitude_bits(m * over))
            else:
                product = m * tl.load(c + group * channels + column, mask=column < channels, other=0)
                sums += product
                if KIND == NEAREST or KIND == TERNARY:
                    over = tl.load(inverse + group * channels + column, mask=column < channels, other=0)
                    energies += product * (m * over)
    if KIND == LINEAR or KIND == FLOAT8:
        total = from_bits(tl.max(tl.max(most, axis=2), axis=1))
    else:
        total = fold_lanes(tl.reshape(sums, (ROWS, 64)), ROWS)
    energy = fold_lanes(tl.reshape(energies, (ROWS, 64)), ROWS)
    weight = tl.load(weights + group + tl.zeros((ROWS,), tl.int32))
    t = encode_bf16(channel_scale(total, energy, weight, constant, KIND, WIDENING))
    tl.store((payload + row_scales_at).to(tl.pointer_type(tl.int16)) + row, t.to(tl.int16), mask=local < rows)
    tl.atomic_max(largest + group, tl.max(magnitude_bits(total), axis=0))


@triton.jit
def sum_squares(
    x,
    base,
    second,
    base_scales,
    second_scales,
    coefficient,
    row_at,
    column_at,
    first,
    rows,
    channels,
    numel,
    tiles,
    PLACE: tl.constexpr,
    WHOLE: tl.constexpr,
    TERMS: tl.constexpr,
    TILES: tl.constexpr,
    UNITS: tl.constexpr,
    APART: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Of ``TILES`` tiles of 64 rows and ``8 * UNITS`` channels: the squares of every ``APART``-th row, by channel.

    Args:
        first: float32 ``(G, tiles, C)``.
    """
    terms = (base, second, base_scales, second_scales, coefficient)
    blocks, parts = tl.cdiv(channels, 8 * UNITS), tl.cdiv(tiles, TILES)
    block = tl.program_id(0) % blocks
    first_tile = tl.program_id(0) // blocks % parts * TILES
    group = tl.program_id(0) // blocks // parts
    unit, lane = block * UNITS + tl.arange(0, UNITS)[None, :, None], tl.arange(0, 8)[None, None, :]
    tile = first_tile + tl.arange(0, TILES)[:, None, None]
    sums = tl.zeros((TILES, UNITS, 8), tl.float32)
    for start in range(0, 64, APART * UNROLL):
        for step in tl.static_range(UNROLL):
            local3 = tile * 64 + (start + step * APART)
            inside = local3 < rows
            row3 = group * rows + tl.where(inside, local3, 0)
            at, ok = in_rows(row3, inside, unit, row_at, column_at, channels, numel, PLACE, WHOLE)
            m = magnitudes(x, terms, at, ok, TERMS)
            sums += m * m
    at = (group * tiles + tile) * channels + 8 * unit + lane
    tl.store(first + at, sums, mask=(tile < tiles) & (8 * unit + lane < channels))


@triton.jit
def settle_roots(
    first,
    largest,
    flag,
    reported,
    payload,
    channels,
    tiles,
    row_scales_end,
    channel_scales_at,
    channel_scales_end,
    total,
    WIDTH: tl.constexpr,
):
    """The roots of ``WIDTH`` channels, to the payload, from the sums of at most 64 tiles; zeros behind both sections.

    Sets both flags where a group's statistics are not safe, or not finite.
    """
    parts = tl.cdiv(channels, WIDTH)
    group = tl.program_id(0) // parts
    column = tl.program_id(0) % parts * WIDTH + tl.arange(0, WIDTH)
    tile, here = tl.arange(0, 64), column < channels
    from_at = (group * tiles + tile)[:, None] * channels + column[None, :]
    squares = fold_tiles(tl.load(first + from_at, mask=(tile < tiles)[:, None] & here[None, :], other=0), WIDTH)
    code = encode_bf16(storable_scale(tl.minimum(tl.sqrt_rn(squares), _LARGEST), False))
    at = group * channels + column
    tl.store((payload + channel_scales_at).to(tl.pointer_type(tl.int16)) + at, code.to(tl.int16), mask=here)
    unsafe = tl.where(is_plain(from_bits(tl.load(largest + group))), 0, 1) == 1
    tl.store(flag, 1, mask=unsafe)
    tl.store(reported, 1, mask=unsafe)
    if tl.program_id(0) == 0:
        fill(payload, row_scales_end, channel_scales_at)
        fill(payload, channel_scales_end, total)


@triton.jit
def stored_roots(stored, at, here):
    """What a payload says of some channels; numbers that no encoder stores count as zero."""
    code = tl.load(stored + at, mask=here, other=0).to(tl.int32) & 0xFFFF
    return decode_bf16(tl.where((code < _SMALLEST_BITS) | (code > _LARGEST_BITS), 0, code))


@triton.jit
def next_scales(payload, c, after, channel_scales_at, channels, floor_per_sum):
    """Channel scales of a group after a frame, as ``reference.history.scales_after``.

    Args:
        c, after: float32 ``(G, C)``: the scales that this frame was coded with, and those of the next.
        floor_per_sum: the floor over the sum of a group's scales.
    """
    group, lane = tl.program_id(0), tl.arange(0, 64)
    stored = (payload + channel_scales_at).to(tl.pointer_type(tl.int16)) + group * channels
    c += group * channels
    after += group * channels
    most = tl.zeros((64,), tl.int32)
    for start in range(0, channels, 64):
        most = tl.maximum(most, bits_of(stored_roots(stored, start + lane, start + lane < channels)))
    top = from_bits(tl.max(most, axis=0) + tl.zeros((64,), tl.int32))
    norm = 0.5 * power_of_two_near_inverse(top)
    sums = tl.zeros((64,), tl.float32)
    for start in range(0, channels, 64):
        one = stored_roots(stored, start + lane, start + lane < channels) * norm
        sums += tl.where(one < _SMALLEST, 0.0, one)
    floor = fold_lanes(tl.reshape(sums, (1, 64)), 1) * floor_per_sum
    for start in range(0, channels, 64):
        here = start + lane < channels
        one = stored_roots(stored, start + lane, here) * norm
        one = tl.where(one < _SMALLEST, 0.0, one)
        before = tl.load(c + start + lane, mask=here, other=0)
        raised = tl.where((one > 0) | (before > 0), tl.maximum(one, floor), one)
        tl.store(after + start + lane, tl.where(top > 0, raised, before), mask=here)
