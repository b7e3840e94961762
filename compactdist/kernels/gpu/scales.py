"""The kernels that make channel scales of the sums that ``rows.tile_sums`` left: small work, no x, no base."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

from compactdist.kernels.gpu.codes import FLOAT8, LINEAR, NEAREST, TERNARY, channel_scale
from compactdist.kernels.gpu.elements import (
    decode_bf16,
    encode_bf16,
    fold_lanes,
    fold_tiles,
    inverse_or_zero,
    storable_scale,
)
from compactdist.kernels.gpu.rows import group_factor, group_norm


# Both are more than 32 in use. Triton 3.6 fails where it takes them for the constant 1.
@triton.jit(do_not_specialize=["tiles", "half_of_all"])
def fold_many_tiles(
    first,
    energy,
    weight,
    channels,
    tiles,
    half_of_all,
    KIND: tl.constexpr,
    UNITS: tl.constexpr,
):
    """Fold the sums of more than 64 tiles onto the first 64, in place; one of those for each program.

    Args:
        half_of_all: Half of the power of two that ``tiles`` is filled up to.
    """
    blocks = tl.cdiv(channels, 8 * UNITS)
    target = tl.program_id(0) % 64
    block = tl.program_id(0) // 64 % blocks
    group = tl.program_id(0) // 64 // blocks
    column = block * 8 * UNITS + tl.arange(0, 8 * UNITS)
    here = column < channels
    first += group * tiles * channels + column
    energy += group * tiles * channels + column
    weight += group * tiles * blocks + block
    half = half_of_all
    while half >= 64:
        for tile in range(target, tl.minimum(half, tiles - half), 64):
            upper = tile + half
            mine, other = first + tile * channels, first + upper * channels
            a, b = tl.load(mine, mask=here, other=0), tl.load(other, mask=here, other=0)
            if KIND == LINEAR or KIND == FLOAT8:
                tl.store(mine, tl.maximum(a, b), mask=here)
            else:
                tl.store(mine, a + b, mask=here)
                tl.store(weight + tile * blocks, tl.load(weight + tile * blocks) + tl.load(weight + upper * blocks))
                if KIND == NEAREST or KIND == TERNARY:
                    mine, other = energy + tile * channels, energy + upper * channels
                    tl.store(mine, tl.load(mine, mask=here, other=0) + tl.load(other, mask=here, other=0), mask=here)
        # What one thread has stored the next round loads, maybe on another.
        tl.debug_barrier()
        half = half // 2


@triton.jit
def settle(
    first,
    energy,
    weight,
    largest,
    flag,
    payload,
    inverse,
    wire,
    factors,
    channels,
    tiles,
    blocks,
    block_channels,
    row_scales_end,
    channel_scales_at,
    channel_scales_end,
    total,
    constant,
    KIND: tl.constexpr,
    WIDENING: tl.constexpr,
    ROW_SCALES: tl.constexpr,
    PER_GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Channel scales of ``WIDTH`` channels, or of a group, from the sums of at most 64 tiles.

    Writes them to the payload, what decoding them gives to ``wire``, the group's factor to ``factors``, and the inverse
    of the scale that goes with it, which the codes are made with, to ``inverse``. Fills up the
    sections of both scales with zeros.

    Args:
        blocks: Copies of each weight, one for ``block_channels`` channels.
    """
    if PER_GROUP:
        group = tl.program_id(0)
        lane = tl.arange(0, 64)
        sums, energies = tl.zeros((64,), tl.float32), tl.zeros((64,), tl.float32)
        for start in range(0, channels, 64):
            at, here = group * channels + start + lane, start + lane < channels
            one = tl.load(first + at, mask=here, other=0)
            if KIND == LINEAR or KIND == FLOAT8:
                sums = tl.maximum(sums, one)
            else:
                sums += one
                if KIND == NEAREST or KIND == TERNARY:
                    energies += tl.load(energy + at, mask=here, other=0)
        if KIND == LINEAR or KIND == FLOAT8:
            all_firsts = tl.max(tl.reshape(sums, (1, 64)), axis=1)
        else:
            all_firsts = fold_lanes(tl.reshape(sums, (1, 64)), 1)
        all_energies = fold_lanes(tl.reshape(energies, (1, 64)), 1)
        all_weights = tl.load(weight + group * blocks)
        at, here = group + tl.arange(0, 1), tl.arange(0, 1) == 0
    else:
        parts = tl.cdiv(channels, WIDTH)
        group = tl.program_id(0) // parts
        column = tl.program_id(0) % parts * WIDTH + tl.arange(0, WIDTH)
        tile = tl.arange(0, 64)
        here = column < channels
        from_at = (group * tiles + tile)[:, None] * channels + column[None, :]
        ok = (tile < tiles)[:, None] & here[None, :]
        firsts = tl.load(first + from_at, mask=ok, other=0)
        all_energies = tl.zeros((WIDTH,), tl.float32)
        if KIND == LINEAR or KIND == FLOAT8:
            all_firsts = tl.max(firsts, axis=0)
        else:
            all_firsts = fold_tiles(firsts, WIDTH)
            if KIND == NEAREST or KIND == TERNARY:
                all_energies = fold_tiles(tl.load(energy + from_at, mask=ok, other=0), WIDTH)
        block = tl.program_id(0) % parts * WIDTH // block_channels
        weights = tl.load(weight + (group * tiles + tile) * blocks + block, mask=tile < tiles, other=0)
        all_weights = fold_lanes(tl.reshape(weights, (1, 64)), 1)
        at = group * channels + column
    factor = group_factor(largest, group)
    tl.store(factors + group, factor)
    if ROW_SCALES:
        norm = group_norm(largest, group, factor, KIND)
        if KIND == LINEAR or KIND == FLOAT8:
            all_firsts = tl.div_rn(all_firsts, norm)
        else:
            all_firsts *= norm
        all_weights = all_weights * norm * norm
    if PER_GROUP:
        all_weights *= tl.cast(channels, tl.float32)
    c = channel_scale(all_firsts, all_energies, all_weights, constant, KIND, WIDENING)
    code = encode_bf16(storable_scale(tl.div_rn(c, factor), False))
    code = tl.where(tl.load(flag) != 0, 0, code)
    tl.store((payload + channel_scales_at).to(tl.pointer_type(tl.int16)) + at, code.to(tl.int16), mask=here)
    tl.store(wire + at, decode_bf16(code), mask=here)
    tl.store(inverse + at, inverse_or_zero(c), mask=here)
    if tl.program_id(0) == 0:
        fill(payload, row_scales_end, channel_scales_at)
        fill(payload, channel_scales_end, total)


@triton.jit
def fill(payload, start, end):
    """Zeros from ``start`` to ``end``, at most 16."""
    at = start + tl.arange(0, 16)
    tl.store(payload + at, tl.zeros((16,), tl.uint8), mask=at < end)
