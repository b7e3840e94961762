"""The kernels of block scales: everything that encoding does, each element read from memory once."""
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
    nearest_of,
    packed_codes,
    store_codes,
    store_packed,
)
from compactdist.kernels.gpu.elements import (
    F32_MAX,
    INFINITY_BITS,
    applied,
    bits_of,
    clamped,
    decode_bf16,
    divide_or_zero,
    encode_bf16,
    expected,
    fold_lanes,
    from_bits,
    inverse_or_zero,
    is_plain,
    is_zero,
    lowered,
    magnitude_bits,
    magnitudes,
    read,
    scale_factor,
    scaled_statistic,
    scaled_value,
    storable_scale,
    write_twice,
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
    second,
    base_scales,
    second_scales,
    coefficient,
    out,
    copy,
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
    COPIES: tl.constexpr,
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
    terms = (base, second, base_scales, second_scales, coefficient)
    where = (channels, blocks, pad, matrix_channels, numel, row_at, column_at)
    unset = is_zero(flag)
    sums, low_sums = tl.zeros((BLOCKS, 64), tl.float32), tl.zeros((BLOCKS, 64), tl.float32)
    most = tl.zeros((BLOCKS, 64), tl.int32)
    for start in range(0, channels, 64):
        _, _, at, there = chunk_of_blocks(start, groups, where, WHOLE, PADDED, PLACE, BLOCKS)
        m = tl.reshape(magnitudes(x, terms, at, there, TERMS), (BLOCKS, 64))
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
            m = tl.reshape(magnitudes(x, terms, at, there, TERMS) * factor_of, (BLOCKS, 64))
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
            m = magnitudes(x, terms, at, there, TERMS) * factor_of
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
            before = expected(terms, at, there, TERMS)
            value = read(x, at, there) - before
            code = code_of(value, tl.abs(value) * factor_of, inverse_of, one, table, KIND, BITS, MANTISSA)
            store_codes(payload, unit, code, ok, section, KIND, BITS)
            if WRITES:
                if not LOCKSTEP:
                    there = there & unset
                value = applied(before, scale_of, level_of(code, table, KIND, BITS, MANTISSA))
                write_twice(out, copy, at, value, there, COPIES)


@triton.jit
def units_of_blocks(
    groups, where, PADDED: tl.constexpr, PLACE: tl.constexpr, BLOCKS: tl.constexpr, CHUNKS: tl.constexpr
):
    """Units of ``BLOCKS`` blocks of ``64 * CHUNKS`` elements, ``(8 * CHUNKS * BLOCKS, 8)``.

    Four threads share a block, and each has what sums meet first: units are in the order (half of 64 lanes, chunk of 64
    elements, block, a quarter of the half).

    Returns:
        As ``chunk_of_blocks``.
    """
    order, lane = tl.arange(0, 8 * CHUNKS * BLOCKS)[:, None], tl.arange(0, 8)[None, :]
    chunk = order // (4 * BLOCKS) % CHUNKS
    eighth = order // (4 * BLOCKS * CHUNKS) * 4 + order % 4
    block = tl.program_id(0) * BLOCKS + order // 4 % BLOCKS
    unit = block * (8 * CHUNKS) + chunk * 8 + eighth
    ok = block < groups
    at, there = in_memory(8 * unit, lane, ok, block, where, True, PADDED, PLACE)
    return unit, ok, at, there


@triton.jit
def fold_blocks(values, BLOCKS: tl.constexpr, CHUNKS: tl.constexpr):
    """Sums of blocks, ``(BLOCKS,)``, in the order of ``fold_lanes``, of values in the order of ``units_of_blocks``."""
    if CHUNKS == 2:
        values = tl.sum(tl.reshape(values, (2, 2, 32 * BLOCKS)), axis=1)
    values = tl.sum(tl.reshape(values, (2, 32 * BLOCKS)), axis=0)
    for step in tl.static_range(5):
        values = tl.sum(tl.reshape(values, (BLOCKS, 2, 16 >> step)), axis=1)
    return tl.reshape(values, (BLOCKS,))


@triton.jit
def of_blocks(values, BLOCKS: tl.constexpr, CHUNKS: tl.constexpr):
    """``(BLOCKS,)`` to one for each unit, ``(8 * CHUNKS * BLOCKS, 1)``."""
    spread = tl.broadcast_to(values[None, :, None], (2 * CHUNKS, BLOCKS, 4))
    return tl.reshape(spread, (8 * CHUNKS * BLOCKS, 1))


@triton.jit
def largest_of_blocks(value, BLOCKS: tl.constexpr, CHUNKS: tl.constexpr):
    """The bits of the largest magnitude of each block."""
    most = tl.reshape(magnitude_bits(value), (2 * CHUNKS, BLOCKS, 32))
    return tl.max(tl.max(most, axis=0), axis=1)


@triton.jit
def encode_held_blocks(
    x, base, second, base_scales, second_scales, coefficient,
    out, copy, payload, flag, reported, table, row_at, column_at,
    groups, codes_end, section, scales_end, total, blocks, pad, matrix_channels, numel, constant,
    KIND: tl.constexpr, BITS: tl.constexpr, MANTISSA: tl.constexpr, WIDENING: tl.constexpr,
    PADDED: tl.constexpr, PLACE: tl.constexpr, TERMS: tl.constexpr, WRITES: tl.constexpr, COPIES: tl.constexpr,
    LOCKSTEP: tl.constexpr, CHUNKS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """``encode_blocks`` with ``WHOLE`` and ``CODES`` where a block has ``64 * CHUNKS`` elements, ``CHUNKS`` 1 or 2.

    Blocks are held in registers. What only extreme values need (factors, sums of lowered magnitudes, a look for what is
    not finite) is done if one of the program's blocks has such values.
    """
    terms = (base, second, base_scales, second_scales, coefficient)
    where = (64 * CHUNKS, blocks, pad, matrix_channels, numel, row_at, column_at)
    unset = is_zero(flag)
    unit, ok, at, there = units_of_blocks(groups, where, PADDED, PLACE, BLOCKS, CHUNKS)
    before = expected(terms, at, there, TERMS)
    value = (read(x, at, there) - before) + 0.0  # not -0.0, so that its sign is a bit
    if KIND == LINEAR or KIND == FLOAT8:
        statistic = from_bits(largest_of_blocks(value, BLOCKS, CHUNKS))
    else:
        statistic = fold_blocks(tl.abs(value), BLOCKS, CHUNKS)
    factor, first = tl.full((BLOCKS,), 1.0, tl.float32), statistic
    finite = tl.full((BLOCKS,), 1, tl.int32)
    plain = tl.min(is_plain(statistic).to(tl.int32), axis=0)
    if plain == 0:
        amax = largest_of_blocks(value, BLOCKS, CHUNKS)
        factor = scale_factor(statistic, from_bits(amax))
        if KIND == LINEAR or KIND == FLOAT8:
            first = statistic * factor
        else:
            low = fold_blocks(lowered(tl.abs(value)), BLOCKS, CHUNKS)
            first = scaled_statistic(statistic, low, statistic, factor)
        value = scaled_value(value, of_blocks(factor, BLOCKS, CHUNKS))
        finite = tl.where(amax < INFINITY_BITS, 1, 0)
        tl.store(flag, 1, mask=tl.min(finite, axis=0) == 0)
        tl.store(reported, 1, mask=tl.min(finite, axis=0) == 0)
    magnitude, energy = tl.abs(value), first
    if KIND == NEAREST or KIND == TERNARY:
        energy = fold_blocks(magnitude * magnitude, BLOCKS, CHUNKS)
    c = channel_scale(first, energy, 64.0 * CHUNKS, constant, KIND, WIDENING)

    inverse_of = of_blocks(inverse_or_zero(c), BLOCKS, CHUNKS)
    if KIND == NEAREST:
        size, index = nearest_of(magnitude, inverse_of, table, BITS)
        level = from_bits(bits_of(size) | bits_of(value) & -0x80000000)
        store_packed(payload, unit, packed_codes(bits_of(value), index, BITS), ok, section, BITS)
    else:
        code = code_of(value, magnitude, inverse_of, 1.0, table, KIND, BITS, MANTISSA)
        level = level_of(code, table, KIND, BITS, MANTISSA)
        store_codes(payload, unit, code, ok, section, KIND, BITS)
    if KIND == NEAREST or KIND == TERNARY:  # the scale that fits these very codes, as ``scales.refitted_scale``
        products = fold_blocks(magnitude * tl.abs(level), BLOCKS, CHUNKS)
        fitted = divide_or_zero(products, fold_blocks(level * level, BLOCKS, CHUNKS))
        c = tl.where(c > 0, storable_scale(fitted, False), c)
    code_of_scale = encode_bf16(storable_scale(tl.div_rn(c, factor), False))
    code_of_scale = tl.where(finite == 0, 0, code_of_scale)

    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    scales = (payload + section).to(tl.pointer_type(tl.int16))
    tl.store(scales + block, code_of_scale.to(tl.int16), mask=block < groups)
    if tl.program_id(0) == 0:
        fill(payload, codes_end, section)
        fill(payload, scales_end, total)
    if WRITES:
        if not LOCKSTEP:
            there = there & unset
        change = of_blocks(decode_bf16(code_of_scale), BLOCKS, CHUNKS) * level
        if plain == 0:  # changes of plain blocks are far below what float32 holds
            tl.debug_barrier()  # what may stand in for the branch, a choice for each element, takes three instructions
            change = clamped(change, F32_MAX)
        write_twice(out, copy, at, before + change, there, COPIES)
