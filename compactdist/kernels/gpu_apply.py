"""The kernels that write codes and reconstructions: the last pass of encoding, and decoding.

Arguments that several kernels share:

* ``rows``, ``channels``, ``elements``: of the payload's layout, in which a block of block scales is a group of one row;
* ``blocks``, ``pad``, ``matrix_channels``, ``numel``, ``row_at``, ``column_at``, ``WHOLE``, ``PADDED``, ``PLACE``: as
  ``gpu_codes.in_memory`` takes them;
* ``PER``: elements of a unit, 8 or 5;
* ``PER_GROUP``: one channel scale for a group; ``ROW_SCALES``: rows have scales;
* ``base``, ``velocity``, ``TERMS``: as ``gpu_elements.expected`` takes them; ``out`` may be the memory of ``base``.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

from compactdist.kernels.gpu_codes import code_of, in_memory, level_of, load_codes, store_codes
from compactdist.kernels.gpu_elements import (
    applied,
    decode_bf16,
    decode_ue5m3,
    expected,
    inverse_or_zero,
    is_zero,
    read,
    write,
)


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
    if ROW_SCALES:
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
    velocity,
    out,
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
    LOCKSTEP: tl.constexpr,
    BY_BLOCK: tl.constexpr,
    UNITS: tl.constexpr,
):
    """Codes of ``UNITS`` units and, if ``WRITES``, the reconstruction of their elements.

    Args:
        inverse, wire, factors: As ``settle`` or ``encode_blocks`` left them.
        section: Bytes of codes, alignment included; behind them are the row codes.
        LOCKSTEP: Write the reconstruction also if something is not finite.
        BY_BLOCK: Scales by block: what is not finite is marked by the scale of its block, not by the flag.
    """
    unit = tl.program_id(0) * UNITS + tl.arange(0, UNITS)[:, None]
    element, step, known = elements_of(unit, elements, PER, WHOLE)
    row = element // channels
    group = row // rows
    where = (channels, blocks, pad, matrix_channels, numel, row_at, column_at)
    at, there = in_memory(element, step, known, group, where, WHOLE, PADDED, PLACE)
    before = expected(base, velocity, at, there, TERMS)
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
        write(out, at, applied(before, scale, level_of(code, table, KIND, BITS, MANTISSA)), there)


@triton.jit
def decode_codes(
    base,
    velocity,
    out,
    payload,
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
    UNITS: tl.constexpr,
):
    """The reconstruction of the elements of ``UNITS`` units."""
    unit = tl.program_id(0) * UNITS + tl.arange(0, UNITS)[:, None]
    element, step, known = elements_of(unit, elements, PER, WHOLE)
    row = element // channels
    group = row // rows
    where = (channels, blocks, pad, matrix_channels, numel, row_at, column_at)
    at, there = in_memory(element, step, known, group, where, WHOLE, PADDED, PLACE)
    code = load_codes(payload, unit, section, KIND, BITS)
    scale_at = scale_number(element, step, row, group, channels, WHOLE, PER_GROUP)
    scales = (payload + channel_scales_at).to(tl.pointer_type(tl.int16))
    c = decode_bf16(tl.load(scales + scale_at, mask=known, other=0).to(tl.int32))
    scale = row_scale(payload + section, row, known, ROW_SCALES) * c
    level = level_of(code, table, KIND, BITS, MANTISSA)
    write(out, at, applied(expected(base, velocity, at, there, TERMS), scale, level), there)
