"""The kernels that read x and base for their scales: a pass for the rows, then one for the channels.

All sums are in the order of ``reference.py``: 64 lanes for each row, tiles of 64 rows for each channel, both folded. No
size of a block changes a result.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

from compactdist.kernels.gpu.codes import FLOAT8, LINEAR, NEAREST, TERNARY
from compactdist.kernels.gpu.elements import (
    INFINITY_BITS,
    bits_of,
    encode_ue5m3,
    fold_lanes,
    from_bits,
    in_rows,
    inverse_or_zero,
    lowered,
    magnitude_bits,
    magnitudes,
    power_of_two_near_inverse,
    round_3_bits,
    scale_factor,
    scaled_statistic,
)


@triton.jit
def row_statistics(
    x,
    base,
    second,
    base_scales,
    second_scales,
    coefficient,
    row_at,
    column_at,
    statistic,
    low,
    largest,
    flag,
    reported,
    rows,
    channels,
    numel,
    KIND: tl.constexpr,
    PLACE: tl.constexpr,
    WHOLE: tl.constexpr,
    TERMS: tl.constexpr,
    ROWS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Of ``ROWS`` rows: the statistic, that of the lowered magnitudes, and the largest in the group of both and of the
    magnitudes. Sets both flags where something is not finite.

    Args:
        largest: int32 ``(G, 3)``, the bits; zeros before.
    """
    terms = (base, second, base_scales, second_scales, coefficient)
    parts = tl.cdiv(rows, ROWS)
    group = tl.program_id(0) // parts
    local = tl.program_id(0) % parts * ROWS + tl.arange(0, ROWS)
    row = group * rows + tl.where(local < rows, local, 0)
    row3, inside = row[:, None, None], (local < rows)[:, None, None]
    first_unit = tl.arange(0, 8)[None, :, None]
    sums, low_sums = tl.zeros((ROWS, 8, 8), tl.float32), tl.zeros((ROWS, 8, 8), tl.float32)
    most = tl.zeros((ROWS, 8, 8), tl.int32)
    for start in range(0, channels, 64 * UNROLL):
        for step in tl.static_range(UNROLL):
            unit = start // 8 + 8 * step + first_unit
            at, ok = in_rows(row3, inside, unit, row_at, column_at, channels, numel, PLACE, WHOLE)
            m = magnitudes(x, terms, at, ok, TERMS)
            most = tl.maximum(most, magnitude_bits(m))
            if not (KIND == LINEAR or KIND == FLOAT8):
                sums += m
                low_sums += lowered(m)
    most_of_row = tl.max(tl.max(most, axis=2), axis=1)
    if KIND == LINEAR or KIND == FLOAT8:
        total = from_bits(most_of_row)
        low_total = total
    else:
        total = fold_lanes(tl.reshape(sums, (ROWS, 64)), ROWS)
        low_total = fold_lanes(tl.reshape(low_sums, (ROWS, 64)), ROWS)
    tl.store(statistic + row, total, mask=local < rows)
    tl.store(low + row, low_total, mask=local < rows)
    amax = tl.max(most_of_row, axis=0)
    tl.atomic_max(largest + 3 * group, tl.max(bits_of(total), axis=0))
    tl.atomic_max(largest + 3 * group + 1, tl.max(bits_of(low_total), axis=0))
    tl.atomic_max(largest + 3 * group + 2, amax)
    bad = amax >= INFINITY_BITS
    tl.store(flag, 1, mask=bad)
    tl.store(reported, 1, mask=bad)


@triton.jit
def group_factor(largest, group):
    """What to multiply the magnitudes of a group with before sums and squares."""
    return scale_factor(from_bits(tl.load(largest + 3 * group)), from_bits(tl.load(largest + 3 * group + 2)))


@triton.jit
def row_weight(statistic, low, largest, group, factor, KIND: tl.constexpr):
    """The scale of rows before it is normalised."""
    if KIND == LINEAR or KIND == FLOAT8:
        return round_3_bits(statistic * factor)
    else:
        return round_3_bits(scaled_statistic(statistic, low, from_bits(tl.load(largest + 3 * group)), factor))


@triton.jit
def group_norm(largest, group, factor, KIND: tl.constexpr):
    """What normalises the scales of a group's rows, a power of two."""
    most, most_low = from_bits(tl.load(largest + 3 * group)), from_bits(tl.load(largest + 3 * group + 1))
    return 0.5 * power_of_two_near_inverse(row_weight(most, most_low, largest, group, factor, KIND))


@triton.jit
def settle_rows(
    local, rows, block, statistic, low, largest, flag, row_codes, row_weights, group, factor, KIND: tl.constexpr
):
    """Codes of some rows, by the programs of the first block of channels; and their weights, or the inverses."""
    row, mine = group * rows + local, local < rows
    total, low_total = tl.load(statistic + row, mask=mine, other=0), tl.load(low + row, mask=mine, other=0)
    w = row_weight(total, low_total, largest, group, factor, KIND)
    code = encode_ue5m3(w * group_norm(largest, group, factor, KIND))
    code = tl.where(tl.load(flag) != 0, 0, code)
    tl.store(row_codes + row, code.to(tl.uint8), mask=local < tl.where(block == 0, rows, 0))
    # By way of memory, for they are wanted one by one. Programs of other channels store the same values.
    tl.store(row_weights + row, inverse_or_zero(w) if KIND == LINEAR or KIND == FLOAT8 else w, mask=mine)
    tl.debug_barrier()


@triton.jit
def tile_sums(
    x,
    base,
    second,
    base_scales,
    second_scales,
    coefficient,
    row_at,
    column_at,
    statistic,
    low,
    largest,
    flag,
    payload,
    row_weights,
    first,
    energy,
    weight,
    row_scales_at,
    rows,
    channels,
    numel,
    tiles,
    KIND: tl.constexpr,
    ROW_SCALES: tl.constexpr,
    PLACE: tl.constexpr,
    WHOLE: tl.constexpr,
    TERMS: tl.constexpr,
    TILES: tl.constexpr,
    UNITS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Of ``TILES`` tiles of 64 rows and ``8 * UNITS`` channels: what ``channel_scale`` takes, by channel, with the
    weights of the rows in place of their scales; and the row codes.

    Args:
        first, energy: float32 ``(G, tiles, C)``.
        row_weights: float32 ``(G, R)``, for use in here.
        weight: float32 ``(G, tiles, blocks of channels)``: each block of channels has a copy of its own.
        row_scales_at: Where row codes go in the payload.
    """
    terms = (base, second, base_scales, second_scales, coefficient)
    blocks, parts = tl.cdiv(channels, 8 * UNITS), tl.cdiv(tiles, TILES)
    block = tl.program_id(0) % blocks
    first_tile = tl.program_id(0) // blocks % parts * TILES
    group = tl.program_id(0) // blocks // parts
    factor = group_factor(largest, group)
    if ROW_SCALES:
        settle_rows(
            first_tile * 64 + tl.arange(0, 64 * TILES), rows, block, statistic, low, largest, flag,
            payload + row_scales_at, row_weights, group, factor, KIND,
        )  # fmt: skip
    unit, lane = block * UNITS + tl.arange(0, UNITS)[None, :, None], tl.arange(0, 8)[None, None, :]
    tile = first_tile + tl.arange(0, TILES)[:, None, None]
    firsts, energies = tl.zeros((TILES, UNITS, 8), tl.float32), tl.zeros((TILES, UNITS, 8), tl.float32)
    weights = tl.zeros((TILES, 1, 1), tl.float32)
    for start in range(0, tl.minimum(64, rows - first_tile * 64), UNROLL):
        for step in tl.static_range(UNROLL):
            local3 = tile * 64 + (start + step)
            inside = local3 < rows
            row3 = group * rows + tl.where(inside, local3, 0)
            at, ok = in_rows(row3, inside, unit, row_at, column_at, channels, numel, PLACE, WHOLE)
            m = magnitudes(x, terms, at, ok, TERMS) * factor
            if ROW_SCALES:
                w = tl.load(row_weights + row3, mask=inside, other=0)
            else:
                w = tl.where(inside, 1.0, 0.0)
            if KIND == LINEAR or KIND == FLOAT8:
                firsts = tl.maximum(firsts, m * w)
            else:
                firsts += m * w
                weights += w * w
                if KIND == NEAREST or KIND == TERNARY:
                    energies += m * m
    at = (group * tiles + tile) * channels + 8 * unit + lane
    there = (tile < tiles) & (8 * unit + lane < channels)
    tl.store(first + at, firsts, mask=there)
    if KIND == NEAREST or KIND == TERNARY:
        tl.store(energy + at, energies, mask=there)
    tl.store(weight + (group * tiles + tile) * blocks + block, weights, mask=tile < tiles)
