"""Codes of one unit, in Triton: chosen, packed, unpacked, expanded to levels, and where their elements lie.

A *unit* is eight consecutive codes, or the five trits of one byte. Tensors of codes are ``(units, 8)``, the first code
of a unit in column 0.

A *table* is float32, as ``plan.table_of`` makes it: the level of every code, then the borders between the magnitudes,
and for eight of these what finds a border without a search.

Below them are the kernels that write codes and reconstructions: the last pass of encoding, and decoding.
Arguments that several kernels share:

* ``rows``, ``channels``, ``elements``: of the payload's layout, in which a block of block scales is a group of one row;
* ``blocks``, ``pad``, ``matrix_channels``, ``numel``, ``row_at``, ``column_at``, ``WHOLE``, ``PADDED``, ``PLACE``: as
  ``in_memory`` takes them;
* ``PER``: elements of a unit, 8 or 5;
* ``PER_GROUP``: one channel scale for a group; ``ROW_SCALES``: rows have scales, of a byte or, if ``WIDE``, of two;
* ``base``, ``second``, ``base_scales``, ``second_scales``, ``coefficient``, ``TERMS``: as ``elements.expected`` takes
  them; ``out`` may be the memory of ``base`` or ``second``.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

from compactdist.kernels.gpu.elements import (
    COMPILED_FOR_NVIDIA,
    CONSECUTIVE,
    EIGHTS,
    add_change,
    applied,
    bits_of,
    change_of,
    decode_bf16,
    decode_ue5m3,
    divide_or_zero,
    expected,
    float8_level,
    from_bits,
    inverse_or_zero,
    is_zero,
    read,
    round_half_even,
    storable_scale,
    write_twice,
)
from compactdist.kernels.reference.scales import SIGMA_OF_MEAN_MAGNITUDE

SIGN = tl.constexpr(0)
NEAREST = tl.constexpr(1)
TERNARY = tl.constexpr(2)
LINEAR = tl.constexpr(3)
FLOAT8 = tl.constexpr(4)

WIDE = tl.constexpr(2)
"""In place of ``ROW_SCALES``: they are bfloat16."""

_SIGMA_OF_MEAN_MAGNITUDE = tl.constexpr(SIGMA_OF_MEAN_MAGNITUDE)
_LARGEST_STEP = tl.constexpr(127)


@triton.jit
def channel_scale(first, energy, weight, constant, KIND: tl.constexpr, WIDENING: tl.constexpr):
    """The channel scale of each kind, as ``scales.py`` and the codecs say.

    Args:
        first: The largest of ``m / t`` for ``LINEAR`` and ``FLOAT8``, else the sum of ``m * t``.
        energy: The sum of ``m ** 2``, for ``NEAREST`` and ``TERNARY``.
        weight: The sum of ``t ** 2``.
        constant: Value of the largest code (``LINEAR``, ``FLOAT8``); level in units of sigma (``TERNARY``); the limit
            on the mean magnitude over the smallest level (``NEAREST``).
        WIDENING: Of the codec; 0 where zero is a level.
    """
    if KIND == SIGN:
        return storable_scale(divide_or_zero(first, weight), False)
    elif KIND == LINEAR or KIND == FLOAT8:
        return storable_scale(tl.div_rn(first, constant), True)
    else:
        sigma = divide_or_zero(energy, first * _SIGMA_OF_MEAN_MAGNITUDE)
        if KIND == TERNARY:
            return storable_scale(storable_scale(sigma, False) * constant, False)
        elif WIDENING == 0:
            return storable_scale(sigma, False)
        else:
            overstated = divide_or_zero(sigma * sigma * weight, energy)
            limit = divide_or_zero(first, weight) * constant
            for _ in tl.static_range(WIDENING):
                overstated = tl.sqrt_rn(overstated)
            return storable_scale(tl.minimum(sigma * overstated, limit), False)


@triton.jit
def nearest_of(value, inverse, table, BITS: tl.constexpr):
    """The magnitude that is nearest to ``value * inverse``, neither negative, and its number, int32.

    Of two and four by halves of the borders, by signs of differences and by bits: a comparison for each element would
    want more predicates than a GPU has. Of eight by the one border that a value may lie on either side of.
    """
    size, borders = value * inverse, table + (1 << BITS)
    if BITS == 2:
        low = below(tl.load(borders), size)
        return from_bits(chosen(low >> 31, _loaded(table + 1), _loaded(table))), sign_bit(low)
    elif BITS == 3:
        high = below(tl.load(borders + 1), size)
        low = below(from_bits(chosen(high >> 31, _loaded(borders + 2), _loaded(borders))), size)
        index = appended(sign_bit(high), low)
        return found_in(table, index), index
    else:
        size = product_up_to_1(value, inverse * tl.load(borders + 7))
        rounding = tl.load(borders + 8)  # adding it rounds to the number of a bucket, which then are its last bits
        first = 10 - 2 * bits_of(rounding).to(tl.int64)
        border, under = pair_in(borders + first, bits_of(size + rounding))
        index = under + sign_bit(below(border, size))
        return found_in(table, index), index


@triton.jit
def below(border, size):
    """An int32 that is negative where ``border < size``. A difference has the right sign, as subnormals are kept."""
    return bits_of(border - size)


@triton.jit
def chosen(mask, yes, no):
    """``yes`` where ``mask`` is -1, ``no`` where it is 0; all int32."""
    return no ^ (mask & (yes ^ no))


@triton.jit
def _loaded(at):
    return bits_of(tl.load(at))


@triton.jit
def found_in(table, index):
    """The float32 with this number, int32, of a table."""
    if COMPILED_FOR_NVIDIA:  # its address in one instruction; the compiler takes two
        return tl.inline_asm_elementwise(
            "{ .reg .b64 at; mad.wide.u32 at, $1, 4, $2; ld.global.nc.b32 $0, [at]; }",
            "=r,r,l", [index, table], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        return tl.load(table + index)


@triton.jit
def pair_in(table, number):
    """The pair with this number, of a float32 and an int32, in a table of them from an even place on."""
    if COMPILED_FOR_NVIDIA:
        return tl.inline_asm_elementwise(
            "{ .reg .b64 at; mad.wide.u32 at, $2, 8, $3; ld.global.nc.v2.b32 {$0, $1}, [at]; }",
            "=r,=r,r,l", [number, table], dtype=(tl.float32, tl.int32), is_pure=True, pack=1,
        )  # fmt: skip
    else:
        at = table + 2 * number.to(tl.int64)
        return tl.load(at), _loaded(at + 1)


@triton.jit
def product_up_to_1(value, factor):
    """``value * factor``, rounded once, held to 1; both not negative; 0 of NaN."""
    if COMPILED_FOR_NVIDIA:
        return tl.inline_asm_elementwise(
            "mul.rn.sat.f32 $0, $1, $2;", "=f,f,f", [value, factor], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        product = value * factor
        return tl.where(product < 1, product, tl.where(product == product, 1.0, 0.0))


@triton.jit
def sign_bit(value):
    """1 where an int32 is negative, else 0."""
    return (value.to(tl.uint32, bitcast=True) >> 31).to(tl.int32, bitcast=True)


@triton.jit
def appended(word, value):
    """An int32 with one more bit at its end: 1 where ``value``, int32, is negative."""
    if COMPILED_FOR_NVIDIA:  # in one instruction; the compiler takes two or three
        return tl.inline_asm_elementwise(
            "shf.l.wrap.b32 $0, $1, $2, 1;", "=r,r,r", [value, word], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        return word << 1 | sign_bit(value)


@triton.jit
def packed_codes(negative, index, BITS: tl.constexpr):
    """Codes of eight signs and numbers of magnitudes in the low bits of an int32, ``(units,)``.

    Args:
        negative: int32 ``(units, 8)``, of which the sign counts.
        index: int32 ``(units, 8)``.
    """
    packed = tl.zeros((negative.shape[0],), tl.int32)
    signs, numbers = lanes_of(negative), lanes_of(index)
    for lane in tl.static_range(8):  # the last first, so that each bit costs one shift of two words
        packed = appended(packed, signs[7 - lane])
        packed = (packed << (BITS - 1)) + numbers[7 - lane]
    return packed


@triton.jit
def lanes_of(values):
    """The eight columns of ``(units, 8)``."""
    UNITS: tl.constexpr = values.shape[0]
    even, odd = tl.split(tl.reshape(values, (UNITS, 4, 2)))
    even_0, even_1 = tl.split(tl.reshape(even, (UNITS, 2, 2)))
    odd_0, odd_1 = tl.split(tl.reshape(odd, (UNITS, 2, 2)))
    lane_0, lane_4 = tl.split(even_0)
    lane_2, lane_6 = tl.split(even_1)
    lane_1, lane_5 = tl.split(odd_0)
    lane_3, lane_7 = tl.split(odd_1)
    return lane_0, lane_1, lane_2, lane_3, lane_4, lane_5, lane_6, lane_7


@triton.jit
def code_of(
    value, magnitude, inverse_c, inverse_t, table, KIND: tl.constexpr, BITS: tl.constexpr, MANTISSA: tl.constexpr
):
    """The code of an element, int32.

    Args:
        value: The residual, for its sign.
        magnitude: Its magnitude times the group's factor.
        inverse_c: Of the channel scale, 0 for 0.
        inverse_t: Of the row scale, likewise.
        table: Of the codec.
        MANTISSA: Bits of mantissa of a float8.
    """
    if KIND == SIGN:
        return tl.where(value >= 0, 1, 0)
    else:
        negative = tl.where(value < 0, 1, 0)
        size = magnitude * inverse_c * inverse_t
        if KIND == NEAREST:
            _, index = nearest_of(magnitude * inverse_c, inverse_t, table, BITS)
            return index | negative << (BITS - 1)
        elif KIND == TERNARY:
            return tl.where(size > 0.5, 1 + negative, 0)
        elif KIND == LINEAR:
            steps = round_half_even(tl.minimum(size, 128.0)).to(tl.int32)
            steps = tl.minimum(steps, _LARGEST_STEP)
            return tl.where(negative == 1, -steps, steps) & 0xFF
        else:
            return (negative << 7) | _float8_of(size, MANTISSA)


@triton.jit
def _float8_of(size, MANTISSA: tl.constexpr):
    """As ``reference.float8_codes``."""
    DROP: tl.constexpr = 23 - MANTISSA
    bits = bits_of(size)
    normal = ((bits + ((1 << (DROP - 1)) - 1) + ((bits >> DROP) & 1)) >> DROP) - ((126 + MANTISSA) << MANTISSA)
    subnormal = round_half_even(tl.minimum(size, 8.0)).to(tl.int32)
    code = tl.where(size < (1 << MANTISSA), subnormal, normal)
    return tl.maximum(tl.minimum(code, 0x7E if MANTISSA == 3 else 0x7B), 0)


@triton.jit
def level_of(code, table, KIND: tl.constexpr, BITS: tl.constexpr, MANTISSA: tl.constexpr):
    """The level of a code, float32."""
    if KIND == SIGN:
        return tl.where(code == 1, 1.0, -1.0)
    elif KIND == LINEAR:
        return ((code << 24) >> 24).to(tl.float32)
    elif KIND == TERNARY:
        return tl.where(code == 1, 1.0, tl.where(code == 2, -1.0, 0.0))
    elif KIND == NEAREST and BITS == 2:  # two numbers are chosen faster than loaded
        magnitude = chosen((code << 31) >> 31, _loaded(table + 1), _loaded(table))
        return from_bits(magnitude | (code << 30 & -0x80000000))
    elif KIND == NEAREST:
        return found_in(table, code)
    else:
        return float8_level(code, MANTISSA)


@triton.jit
def store_codes(payload, unit, codes, ok, nbytes, KIND: tl.constexpr, BITS: tl.constexpr):
    """Pack ``(units, 8)`` codes and store them.

    Args:
        payload: Where the codes start, aligned to 16 bytes.
        unit: Number of each unit, ``(units, 1)``.
        codes: int32; zero where there is no element.
        ok: Which units to store, ``(units, 1)``.
        nbytes: Of the section; what lies behind is not written.
    """
    lane = tl.arange(0, 8)[None, :]
    number = tl.reshape(unit, (unit.shape[0],))
    whole = tl.reshape(ok, (unit.shape[0],))
    if KIND == TERNARY:
        worth = _power_of_three(lane)
        packed = tl.sum(tl.where(lane < 5, codes * worth, 0), axis=1)
        tl.store(payload + number, packed.to(tl.uint8), mask=whole & (number < nbytes))
    elif BITS == 8:
        at = 8 * unit + lane
        tl.store(payload + at, codes.to(tl.uint8), mask=ok & (at < nbytes))
    else:
        store_packed(payload, unit, tl.sum(codes << (BITS * lane), axis=1), ok, nbytes, BITS)


@triton.jit
def store_packed(payload, unit, packed, ok, nbytes, BITS: tl.constexpr):
    """Store units of eight codes, int32 ``(units,)``; the rest is as in ``store_codes``."""
    number = tl.reshape(unit, (unit.shape[0],))
    whole = tl.reshape(ok, (unit.shape[0],))
    if BITS == 4:
        tl.store(payload.to(tl.pointer_type(tl.int32)) + number, packed, mask=whole & (4 * number < nbytes))
    elif BITS == 2:
        at = payload.to(tl.pointer_type(tl.int16)) + number
        tl.store(at, packed.to(tl.int16), mask=whole & (2 * number < nbytes))
    else:
        for i in tl.static_range(BITS):
            at = BITS * number + i
            tl.store(payload + at, (packed >> (8 * i)).to(tl.uint8), mask=whole & (at < nbytes))


@triton.jit
def load_codes(payload, unit, nbytes, KIND: tl.constexpr, BITS: tl.constexpr):
    """Undo ``store_codes``: ``(units, 8)``, int32; zero where there is no byte."""
    lane = tl.arange(0, 8)[None, :]
    if KIND == TERNARY:
        packed = tl.load(payload + unit, mask=unit < nbytes, other=0).to(tl.int32)
        return packed // _power_of_three(lane) % 3
    elif BITS == 8:
        at = 8 * unit + lane
        return tl.load(payload + at, mask=at < nbytes, other=0).to(tl.int32)
    else:
        if BITS == 4:
            packed = tl.load(payload.to(tl.pointer_type(tl.int32)) + unit, mask=4 * unit < nbytes, other=0)
        elif BITS == 2:
            packed = tl.load(payload.to(tl.pointer_type(tl.int16)) + unit, mask=2 * unit < nbytes, other=0).to(tl.int32)
        else:
            packed = tl.zeros(unit.shape, tl.int32)
            for i in tl.static_range(BITS):
                at = BITS * unit + i
                packed |= tl.load(payload + at, mask=at < nbytes, other=0).to(tl.int32) << (8 * i)
        return (packed >> (BITS * lane)) & ((1 << BITS) - 1)


@triton.jit
def _power_of_three(lane):
    return tl.where(lane == 0, 1, tl.where(lane == 1, 3, tl.where(lane == 2, 9, tl.where(lane == 3, 27, 81))))


@triton.jit
def in_memory(element, step, known, group, where, WHOLE: tl.constexpr, PADDED: tl.constexpr, PLACE: tl.constexpr):
    """Where coded element ``element + step`` lies in memory, and whether it does.

    Args:
        element: int32, in the order of the codes; a multiple of 8 if ``WHOLE``.
        step: Number of the code within its unit if ``WHOLE``, else 0.
        known: Of the shape of ``element``: there is such a code.
        group: Of the layout: a group of the matrix, or a block.
        where: ``(channels, blocks, pad, matrix_channels, numel, row_at, column_at)``: channels of the layout; if
            ``PADDED``, the blocks of a group of the matrix, the last of which ends in ``pad`` codes that stand for no
            element; channels of the matrix; elements in memory; the last two as ``in_rows`` takes them.
        WHOLE: The codes of a unit share row, group and block, and are all of them in memory or none.
    """
    channels, blocks, pad, matrix_channels, numel, row_at, column_at = where
    if PADDED:
        matrix = group // blocks
        known = known & (element - matrix * (blocks * channels) < blocks * channels - pad)
        element = element - matrix * pad
        if WHOLE:
            element = tl.multiple_of(element, (8, 8))
    if PLACE == CONSECUTIVE:
        at = element + step
        return at, known & (element < numel if WHOLE else at < numel)
    else:
        element = tl.where(known, element, 0)
        row = element // matrix_channels
        column = element - row * matrix_channels
        if PLACE == EIGHTS:
            start = tl.load(row_at + row) + tl.load(column_at + column // 8)
            return tl.multiple_of(start, (8, 8)) + step, known
        else:
            return tl.load(row_at + row) + tl.load(column_at + column + step), known


@triton.jit
def elements_of(unit, elements, PER: tl.constexpr, WHOLE: tl.constexpr):
    """Elements of units ``(n, 1)``: ``(element, step, known)`` as ``in_memory`` takes them."""
    lane = tl.arange(0, 8)[None, :]
    if WHOLE:
        return PER * unit, lane, PER * unit < elements
    else:
        element = PER * unit + lane
        return element, lane * 0, (element < elements) & (lane < PER)


@triton.jit
def row_scale(row_codes, row, known, ROW_SCALES: tl.constexpr):
    if ROW_SCALES == WIDE:
        wide = row_codes.to(tl.pointer_type(tl.int16))
        return decode_bf16(tl.load(wide + row, mask=known, other=0).to(tl.int32))
    elif ROW_SCALES:
        return decode_ue5m3(tl.load(row_codes + row, mask=known, other=0).to(tl.int32))
    else:
        return tl.full(row.shape, 1.0, tl.float32)


@triton.jit
def scale_number(element, step, row, group, channels, WHOLE: tl.constexpr, PER_GROUP: tl.constexpr):
    """Number of the channel scale of each code."""
    if PER_GROUP:
        return group
    else:
        first = group * channels + (element - row * channels)
        return tl.multiple_of(first, (8, 8)) + step if WHOLE else first


@triton.jit
def encode_codes(
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
    table,
    row_at,
    column_at,
    rows,
    channels,
    elements,
    section,
    blocks,
    pad,
    matrix_channels,
    numel,
    KIND: tl.constexpr,
    BITS: tl.constexpr,
    MANTISSA: tl.constexpr,
    PER: tl.constexpr,
    WHOLE: tl.constexpr,
    PADDED: tl.constexpr,
    PLACE: tl.constexpr,
    ROW_SCALES: tl.constexpr,
    PER_GROUP: tl.constexpr,
    TERMS: tl.constexpr,
    WRITES: tl.constexpr,
    COPIES: tl.constexpr,
    LOCKSTEP: tl.constexpr,
    BY_BLOCK: tl.constexpr,
    UNITS: tl.constexpr,
):
    """Codes of ``UNITS`` units and, if ``WRITES``, the reconstruction of their elements; if ``COPIES``, twice.

    Args:
        inverse, wire, factors: As ``settle`` or ``encode_blocks`` left them.
        section: Bytes of codes, alignment included; behind them are the row codes.
        LOCKSTEP: Write the reconstruction also if something is not finite.
        BY_BLOCK: Scales by block: what is not finite is marked by the scale of its block, not by the flag.
    """
    terms = (base, second, base_scales, second_scales, coefficient)
    unit = tl.program_id(0) * UNITS + tl.arange(0, UNITS)[:, None]
    element, step, known = elements_of(unit, elements, PER, WHOLE)
    row = element // channels
    group = row // rows
    where = (channels, blocks, pad, matrix_channels, numel, row_at, column_at)
    at, there = in_memory(element, step, known, group, where, WHOLE, PADDED, PLACE)
    before = expected(terms, at, there, TERMS)
    value = read(x, at, there) - before
    scale_at = scale_number(element, step, row, group, channels, WHOLE, PER_GROUP)
    t = row_scale(payload + section, row, known, ROW_SCALES)
    size = tl.abs(value) * tl.load(factors + group, mask=known, other=0)
    inverse_c = tl.load(inverse + scale_at, mask=known, other=0)
    code = code_of(value, size, inverse_c, inverse_or_zero(t), table, KIND, BITS, MANTISSA)
    whole = is_zero(flag)
    code = tl.where(known if BY_BLOCK else known & whole, code, 0)
    store_codes(payload, unit, code, unit >= 0, section, KIND, BITS)
    if WRITES:
        scale = t * tl.load(wire + scale_at, mask=known, other=0)
        if not LOCKSTEP:
            there = there & whole
        value = applied(before, scale, level_of(code, table, KIND, BITS, MANTISSA))
        write_twice(out, copy, at, value, there, COPIES)


@triton.jit
def decode_codes(
    base,
    second,
    base_scales,
    second_scales,
    coefficient,
    out,
    payload,
    accepted,
    copy,
    held,
    table,
    row_at,
    column_at,
    rows,
    channels,
    elements,
    section,
    channel_scales_at,
    blocks,
    pad,
    matrix_channels,
    numel,
    KIND: tl.constexpr,
    BITS: tl.constexpr,
    MANTISSA: tl.constexpr,
    PER: tl.constexpr,
    WHOLE: tl.constexpr,
    PADDED: tl.constexpr,
    PLACE: tl.constexpr,
    ROW_SCALES: tl.constexpr,
    PER_GROUP: tl.constexpr,
    TERMS: tl.constexpr,
    CHECKED: tl.constexpr,
    COPIES: tl.constexpr,
    HELD: tl.constexpr,
    UNITS: tl.constexpr,
):
    """The reconstruction of the elements of ``UNITS`` units.

    ``CHECKED`` and ``COPIES`` as for ``elements.add_change``. Channel scales are those of the payload, or, if ``HELD``,
    those at ``held``, float32.
    """
    terms = (base, second, base_scales, second_scales, coefficient)
    unit = tl.program_id(0) * UNITS + tl.arange(0, UNITS)[:, None]
    element, step, known = elements_of(unit, elements, PER, WHOLE)
    row = element // channels
    group = row // rows
    where = (channels, blocks, pad, matrix_channels, numel, row_at, column_at)
    at, there = in_memory(element, step, known, group, where, WHOLE, PADDED, PLACE)
    code = load_codes(payload, unit, section, KIND, BITS)
    scale_at = scale_number(element, step, row, group, channels, WHOLE, PER_GROUP)
    if HELD:
        c = tl.load(held + scale_at, mask=known, other=0)
    else:
        scales = (payload + channel_scales_at).to(tl.pointer_type(tl.int16))
        c = decode_bf16(tl.load(scales + scale_at, mask=known, other=0).to(tl.int32))
    scale = row_scale(payload + section, row, known, ROW_SCALES) * c
    level = level_of(code, table, KIND, BITS, MANTISSA)
    change = change_of(scale, level)
    add_change(terms, out, accepted, copy, at, there, change, TERMS, CHECKED, COPIES)
