"""The kernel of block scales: everything that encoding does, each element read from memory once."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

from compactdist.kernels.gpu.codes import (
    FLOAT8,
    LINEAR,
    NEAREST,
    TERNARY,
    channel_scale,
    code_of,
    in_memory,
    level_of,
    store_codes,
)
from compactdist.kernels.gpu.elements import (
    INFINITY_BITS,
    applied,
    decode_bf16,
    divide_or_zero,
    encode_bf16,
    expected,
    fold_lanes,
    from_bits,
    inverse_or_zero,
    is_zero,
    lowered,
    magnitude_bits,
    magnitudes,
    read,
    scale_factor,
    scaled_statistic,
    storable_scale,
    write,
)
from compactdist.kernels.gpu.scales import fill


@triton.jit
def chunk_of_blocks(
    start, groups, where, WHOLE: tl.constexpr, PADDED: tl.constexpr, PLACE: tl.constexpr, BLOCKS: tl.constexpr
):
    """Elements ``start`` to ``start + 64`` of ``BLOCKS`` blocks, as units ``(8 * BLOCKS, 8)``.

    Returns:
        ``(unit, ok, at, there)``: number of the unit in the payload and whether it is one, ``(8 * BLOCKS, 1)``, both of
        use if ``WHOLE`` only; then as ``in_memory`` returns it.
    """
    channels = where[0]
    order, lane = tl.arange(0, 8 * BLOCKS)[:, None], tl.arange(0, 8)[None, :]
    block = tl.program_id(0) * BLOCKS + order // 8
    offset = start + order % 8 * 8
    ok = (block < groups) & (offset < channels)
    element = block * channels + offset
    if WHOLE:
        at, there = in_memory(element, lane, ok, block, where, WHOLE, PADDED, PLACE)
    else:
        known = (block < groups) & (offset + lane < channels)
        at, there = in_memory(element + lane, lane * 0, known, block, where, WHOLE, PADDED, PLACE)
    return element // 8, ok, at, there


@triton.jit
def inside_block(start, groups, channels, BLOCKS: tl.constexpr):
    """Which of the codes of ``chunk_of_blocks`` there are, ``(8 * BLOCKS, 8)``."""
    order, lane = tl.arange(0, 8 * BLOCKS)[:, None], tl.arange(0, 8)[None, :]
    return (tl.program_id(0) * BLOCKS + order // 8 < groups) & (start + order % 8 * 8 + lane < channels)


@triton.jit
def encode_blocks(
    x,
    base,
    velocity,
    out,
    payload,
    inverse,
    wire,
    factors,
    flag,
    reported,
    table,
    row_at,
    column_at,
    groups,
    channels,
    codes_end,
    section,
    scales_end,
    total,
    blocks,
    pad,
    matrix_channels,
    numel,
    constant,
    KIND: tl.constexpr,
    BITS: tl.constexpr,
    MANTISSA: tl.constexpr,
    WIDENING: tl.constexpr,
    WHOLE: tl.constexpr,
    PADDED: tl.constexpr,
    PLACE: tl.constexpr,
    TERMS: tl.constexpr,
    CODES: tl.constexpr,
    WRITES: tl.constexpr,
    LOCKSTEP: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Scales of ``BLOCKS`` blocks and, if ``CODES``, their codes and reconstruction.

    Blocks are read three times, but only the first time from memory. One that is not finite gets the scale zero, and
    both flags are set. Arguments that are not here are in ``codes.py``.

    Args:
        inverse, wire, factors: For ``encode_codes``; written unless ``CODES``.
        groups, channels: Blocks, and elements of each.
        codes_end, section, scales_end, total: Where codes and scales of the payload end, without and with alignment;
            there are no row scales between them.
        LOCKSTEP: Write the reconstruction also if something is not finite. Otherwise the flag is right beforehand.
    """
    where = (channels, blocks, pad, matrix_channels, numel, row_at, column_at)
    unset = is_zero(flag)
    sums, low_sums = tl.zeros((BLOCKS, 64), tl.float32), tl.zeros((BLOCKS, 64), tl.float32)
    most = tl.zeros((BLOCKS, 64), tl.int32)
    for start in range(0, channels, 64):
        _, _, at, there = chunk_of_blocks(start, groups, where, WHOLE, PADDED, PLACE, BLOCKS)
        m = tl.reshape(magnitudes(x, base, velocity, at, there, TERMS), (BLOCKS, 64))
        most = tl.maximum(most, magnitude_bits(m))
        sums += m
        low_sums += lowered(m)
    amax = tl.max(most, axis=1)
    statistic, low = fold_lanes(sums, BLOCKS), fold_lanes(low_sums, BLOCKS)
    if KIND == LINEAR or KIND == FLOAT8:
        statistic, low = from_bits(amax), from_bits(amax)
    factor = scale_factor(statistic, from_bits(amax))
    factor_of = tl.reshape(tl.broadcast_to(factor[:, None], (BLOCKS, 8)), (8 * BLOCKS, 1))

    energies = tl.zeros((BLOCKS, 64), tl.float32)
    if KIND == NEAREST or KIND == TERNARY:
        for start in range(0, channels, 64):
            _, _, at, there = chunk_of_blocks(start, groups, where, WHOLE, PADDED, PLACE, BLOCKS)
            m = tl.reshape(magnitudes(x, base, velocity, at, there, TERMS) * factor_of, (BLOCKS, 64))
            energies += m * m
    if KIND == LINEAR or KIND == FLOAT8:
        first = statistic * factor
    else:
        first = scaled_statistic(statistic, low, statistic, factor)
    c = channel_scale(first, fold_lanes(energies, BLOCKS), tl.cast(channels, tl.float32), constant, KIND, WIDENING)
    inverse_c = inverse_or_zero(c)
    inverse_of = tl.reshape(tl.broadcast_to(inverse_c[:, None], (BLOCKS, 8)), (8 * BLOCKS, 1))
    one = tl.full((8 * BLOCKS, 1), 1.0, tl.float32)

    if KIND == NEAREST or KIND == TERNARY:  # the scale that fits these very codes, as ``scales.refitted_scale``
        products, squares = tl.zeros((BLOCKS, 64), tl.float32), tl.zeros((BLOCKS, 64), tl.float32)
        for start in range(0, channels, 64):
            _, _, at, there = chunk_of_blocks(start, groups, where, WHOLE, PADDED, PLACE, BLOCKS)
            m = magnitudes(x, base, velocity, at, there, TERMS) * factor_of
            level = level_of(code_of(m, m, inverse_of, one, table, KIND, BITS, MANTISSA), table, KIND, BITS, MANTISSA)
            level = tl.where(inside_block(start, groups, channels, BLOCKS), level, 0.0)
            products += tl.reshape(m * level, (BLOCKS, 64))
            squares += tl.reshape(level * level, (BLOCKS, 64))
        fitted = divide_or_zero(fold_lanes(products, BLOCKS), fold_lanes(squares, BLOCKS))
        c = tl.where(c > 0, storable_scale(fitted, False), c)
    code_of_scale = encode_bf16(storable_scale(tl.div_rn(c, factor), False))
    code_of_scale = tl.where(amax >= INFINITY_BITS, 0, code_of_scale)
    scale = decode_bf16(code_of_scale)

    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    scales = (payload + section).to(tl.pointer_type(tl.int16))
    tl.store(scales + block, code_of_scale.to(tl.int16), mask=block < groups)
    tl.store(flag, 1, mask=tl.max(amax, axis=0) >= INFINITY_BITS)
    tl.store(reported, 1, mask=tl.max(amax, axis=0) >= INFINITY_BITS)
    if tl.program_id(0) == 0:
        fill(payload, codes_end, section)
        fill(payload, scales_end, total)
    if not CODES:
        tl.store(inverse + block, inverse_c, mask=block < groups)
        tl.store(wire + block, scale, mask=block < groups)
        tl.store(factors + block, factor, mask=block < groups)
    else:
        scale_of = tl.reshape(tl.broadcast_to(scale[:, None], (BLOCKS, 8)), (8 * BLOCKS, 1))
        for start in range(0, channels, 64):
            unit, ok, at, there = chunk_of_blocks(start, groups, where, WHOLE, PADDED, PLACE, BLOCKS)
            before = expected(base, velocity, at, there, TERMS)
            value = read(x, at, there) - before
            code = code_of(value, tl.abs(value) * factor_of, inverse_of, one, table, KIND, BITS, MANTISSA)
            store_codes(payload, unit, code, ok, section, KIND, BITS)
            if WRITES:
                if not LOCKSTEP:
                    there = there & unset
                write(out, at, applied(before, scale_of, level_of(code, table, KIND, BITS, MANTISSA)), there)
