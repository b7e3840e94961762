"""The primitives of ``reference.py`` as Triton functions, to the bit, and how elements are read and written.

No function here leaves a rounding open: division and square root are the IEEE ones, and kernels are launched with
multiply-add contraction switched off. bfloat16 is made by the hardware's instruction where there is one, else by
integer arithmetic, as in Triton's interpreter, whose own conversion truncates.
bfloat16 tensors come as their bits, int16.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import num_threads

from compactdist.kernels import reference
from compactdist.kernels.reference import scales
from compactdist.kernels.spec import ROUNDED_BLOCK

ROUNDED, TWO_ROUNDED, MOVING, MOVING_ROUNDED = 10, 20, 30, 40
"""Numbers of terms that are more than a number, plus that of a dtype in ``DTYPES``. One ``spec.Rounded`` of a tensor of
this dtype; two of them; a tensor and a ``spec.Velocity`` between it and another; the same of two ``spec.Rounded``."""
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_ROUNDED, _TWO_ROUNDED, _MOVING = tl.constexpr(ROUNDED), tl.constexpr(TWO_ROUNDED), tl.constexpr(MOVING)
_OF_BF16, _OF_F16 = tl.constexpr(DTYPES[torch.bfloat16]), tl.constexpr(DTYPES[torch.float16])
_ROUNDED_BLOCK = tl.constexpr(ROUNDED_BLOCK)

CONSECUTIVE = tl.constexpr(0)
"""Rows lie one behind the other in memory."""
EIGHTS = tl.constexpr(1)
"""Rows and channels are permuted, and eight channels in a row still lie together, from a multiple of eight on."""
SCATTERED = tl.constexpr(2)
"""Rows and channels are permuted, and every channel is looked up."""

INFINITY_BITS = tl.constexpr(0x7F800000)
_UE5M3_BIAS = tl.constexpr(reference.UE5M3_BIAS)
_UE5M3_FIRST_NONZERO_BITS = tl.constexpr(reference.UE5M3_FIRST_NONZERO_BITS)
_BF16_MAX_BITS = tl.constexpr(reference.BF16_MAX_BITS)
F32_MAX = tl.constexpr(3.4028234663852886e38)
_BF16_MAX = tl.constexpr(3.3895313892515355e38)
_F16_MAX = tl.constexpr(65504.0)
_SMALLEST_SCALE = tl.constexpr(scales.SMALLEST_SCALE)
_SAFE_LOW, _SAFE_HIGH = map(tl.constexpr, scales.SAFE_STATISTIC)
_SMALLEST = tl.constexpr(2.0**-149)
_TO_LOW = tl.constexpr(2.0**-64)
_FROM_LOW = tl.constexpr(2.0**64)
_ROUNDING = tl.constexpr(12582912.0)  # 1.5 * 2**23: adding it rounds to an integer, half to even


COMPILED_FOR_NVIDIA = tl.constexpr(not triton.knobs.runtime.interpret and torch.version.hip is None)


def _rounds() -> bool:
    """Whether all GPUs here have the instruction that rounds to bfloat16; also where there is none to compile for."""
    if not COMPILED_FOR_NVIDIA.value:
        return False
    return all(torch.cuda.get_device_capability(index) >= (8, 0) for index in range(torch.cuda.device_count()))


_HARDWARE_ROUNDS = tl.constexpr(_rounds())


@triton.jit
def bits_of(value):
    return value.to(tl.int32, bitcast=True)


@triton.jit
def from_bits(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def read(source, at, ok):
    value = tl.load(source + at, mask=ok, other=0)
    if value.dtype == tl.int16:
        return widened_bf16(value)
    else:
        return value.to(tl.float32)


@triton.jit
def widened_bf16(bits):
    """The float32 of bfloat16's bits, int16."""
    if COMPILED_FOR_NVIDIA and bits.numel >= 2 * num_threads():  # an instruction each; the compiler takes three for two
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r", [bits], dtype=tl.float32, is_pure=True, pack=2
        )
    else:
        return from_bits(bits.to(tl.int32) << 16)


@triton.jit
def clamped(value, limit):
    """Hold between ``-limit`` and ``limit``; NaN stays."""
    value = tl.where(value > limit, limit, value)
    return tl.where(value < -limit, -limit, value)


@triton.jit
def to_nearest_bf16(bits):
    """The bits of the nearest float32 that bfloat16 holds, ties to even."""
    return (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000


@triton.jit
def rounded_bf16(value):
    """The bits of the nearest finite bfloat16, ties to even, int16. NaN stays one, of whatever bits."""
    if _HARDWARE_ROUNDS and value.numel >= 2 * num_threads():  # what is too large, or rounds to it, becomes the largest
        return tl.inline_asm_elementwise(
            "cvt.rn.satfinite.bf16x2.f32 $0, $2, $1;", "=r,f,f", [value], dtype=tl.int16, is_pure=True, pack=2
        )
    else:
        rounded = to_nearest_bf16(bits_of(clamped(value, _BF16_MAX))) >> 16
        return tl.where(value != value, 0x7FC0, rounded).to(tl.int16)


@triton.jit
def write(target, at, value, ok):
    """Clamp to what the dtype holds, round once, to nearest even, and store."""
    if target.dtype.element_ty == tl.int16:
        tl.store(target + at, rounded_bf16(value), mask=ok)
    elif target.dtype.element_ty == tl.float16:
        tl.store(target + at, clamped(value, _F16_MAX).to(tl.float16), mask=ok)
    else:
        tl.store(target + at, clamped(value, F32_MAX), mask=ok)


@triton.jit
def write_twice(target, copy, at, value, ok, COPIES: tl.constexpr):
    """As ``write``, and the same to ``copy`` if ``COPIES``."""
    write(target, at, value, ok)
    if COPIES:
        write(copy, at, value, ok)


@triton.jit
def float8_level(code, MANTISSA: tl.constexpr):
    """The level of a float8, in units of its smallest subnormal."""
    size = tl.minimum(code & 0x7F, 0x7E if MANTISSA == 3 else 0x7B)
    # as a float32 its bits are a number that is 2**(126 + MANTISSA) times smaller, subnormal where it is
    rest: tl.constexpr = 2.0**65 if MANTISSA == 3 else 2.0**64
    magnitude = from_bits(size << (23 - MANTISSA)) * _FROM_LOW * rest
    return from_bits(bits_of(magnitude) | ((code & 0x80) << 24))


@triton.jit
def rounded_to(value, DTYPE: tl.constexpr):
    """``value`` kept within what a dtype holds, rounded once to it, to nearest even; as float32."""
    if DTYPE == _OF_BF16:
        return from_bits(rounded_bf16(value).to(tl.int32) << 16)
    elif DTYPE == _OF_F16:
        return clamped(value, _F16_MAX).to(tl.float16).to(tl.float32)
    else:
        return clamped(value, F32_MAX)


@triton.jit
def within(value, DTYPE: tl.constexpr):
    """``value``, not NaN, kept within what a dtype holds."""
    limit: tl.constexpr = _BF16_MAX if DTYPE == _OF_BF16 else _F16_MAX if DTYPE == _OF_F16 else F32_MAX
    return tl.minimum(tl.maximum(value, -limit), limit)


@triton.jit
def read_rounded(codes, scales, at, ok, DTYPE: tl.constexpr):
    """Elements of a ``spec.Rounded`` of a dtype, see ``DTYPES``."""
    code = tl.load(codes + at, mask=ok, other=0)
    level = code.to(tl.float32) if code.dtype == tl.int8 else float8_level(code.to(tl.int32), 3)
    value = level * decode_bf16(tl.load(scales + at // _ROUNDED_BLOCK, mask=ok, other=0).to(tl.int32))
    return rounded_to(value, DTYPE)


@triton.jit
def share_of_change(last, previous, factor, DTYPE: tl.constexpr):
    """Elements of a ``spec.Velocity`` whose coefficient the host knows."""
    return rounded_to(within(last - previous, DTYPE) * factor, DTYPE)


@triton.jit
def velocity_of(last, previous, coefficient, DTYPE: tl.constexpr):
    """Elements of a ``spec.Velocity``; ``coefficient``: where it is in memory, float32."""
    factor = tl.load(coefficient)
    return tl.where(factor == 0, -0.0, share_of_change(last, previous, factor, DTYPE))


@triton.jit
def expected(terms, at, ok, TERMS: tl.constexpr):
    """What both ends expect: the sum of no, one or two terms.

    Args:
        terms: ``(base, second, base_scales, second_scales, coefficient)``: the first term, or its codes; the second, or
            its codes, or, where that is a velocity, what it goes out from; the scales of such codes; the velocity's
            coefficient, float32. What there is not is not read.
        at: where elements lie.
        ok: whether they do.
        TERMS: how many terms there are, if they are tensors; else see ``ROUNDED``.
    """
    base, second, base_scales, second_scales, coefficient = terms
    if TERMS == 0:
        return tl.zeros(at.shape, tl.float32)
    elif TERMS == 1:
        return read(base, at, ok)
    elif TERMS == 2:
        return read(base, at, ok) + read(second, at, ok)
    else:
        DTYPE: tl.constexpr = TERMS % 10
        FORM: tl.constexpr = TERMS - TERMS % 10
        if FORM == _MOVING:
            last = read(base, at, ok)
        else:
            last = read_rounded(base, base_scales, at, ok, DTYPE)
        if FORM == _ROUNDED:
            return last
        elif FORM == _TWO_ROUNDED:
            return last + read_rounded(second, second_scales, at, ok, DTYPE)
        elif FORM == _MOVING:
            return last + velocity_of(last, read(second, at, ok), coefficient, DTYPE)
        else:
            previous = read_rounded(second, second_scales, at, ok, DTYPE)
            return last + velocity_of(last, previous, coefficient, DTYPE)


@triton.jit
def add_change(
    terms, out, accepted, copy, at, inside, change, TERMS: tl.constexpr, CHECKED: tl.constexpr, COPIES: tl.constexpr
):
    """Write what was expected plus the decoded change, where ``inside``.

    If ``CHECKED``, ``out`` is written only where the first of ``accepted`` is not 0. If ``COPIES``, ``copy`` gets the
    values too, and NaN if ``CHECKED`` and the second of ``accepted`` is 0.
    """
    there = inside
    if CHECKED:
        there = there & ~is_zero(accepted)
    value = expected(terms, at, there, TERMS) + change
    write(out, at, value, there)
    if COPIES:
        if CHECKED:
            value = tl.where(is_zero(accepted + 1), float("nan"), value)
        write(copy, at, value, inside)


@triton.jit
def magnitudes(x, terms, at, ok, TERMS: tl.constexpr):
    """Magnitudes of the residual, zero where there is no element."""
    return tl.abs(read(x, at, ok) - expected(terms, at, ok, TERMS))


@triton.jit
def change_of(scale, level):
    """The decoded change, made finite."""
    return clamped(scale * level, F32_MAX)


@triton.jit
def applied(before, scale, level):
    """What was expected plus the decoded change."""
    return before + change_of(scale, level)


@triton.jit
def divide_or_zero(numerator, denominator):
    positive = denominator > 0
    return tl.where(positive, tl.div_rn(numerator, tl.where(positive, denominator, 1.0)), 0.0)


@triton.jit
def inverse_or_zero(value):
    return divide_or_zero(tl.full(value.shape, 1.0, tl.float32), value)


@triton.jit
def power_of_two_near_inverse(value):
    exponent = 254 - (bits_of(value) >> 23)
    return from_bits(tl.minimum(tl.maximum(exponent, 1), 254) << 23)


@triton.jit
def magnitude_bits(value):
    """The bits of a float32 without its sign, which order magnitudes, infinity and NaN above all."""
    return bits_of(value) & 0x7FFFFFFF


@triton.jit
def round_half_even(value):
    """Of a magnitude up to 2**22."""
    return (value + _ROUNDING) - _ROUNDING


@triton.jit
def round_3_bits(value):
    return from_bits((bits_of(value) + (1 << 19)) & -(1 << 20))


@triton.jit
def encode_ue5m3(value):
    bits = bits_of(value)
    code = ((bits + (1 << 19)) >> 20) - _UE5M3_BIAS
    code = tl.maximum(code, tl.where(bits >= _UE5M3_FIRST_NONZERO_BITS, 1, 0))
    return tl.minimum(code, 255)


@triton.jit
def decode_ue5m3(code):
    return from_bits(tl.where(code == 0, 0, (code + _UE5M3_BIAS) << 20))


@triton.jit
def storable_scale(c, UP: tl.constexpr):
    bits = bits_of(c)
    if UP:
        bits = (bits + 0xFFFF) & -0x10000
    else:
        bits = to_nearest_bf16(bits)
    rounded = from_bits(bits)
    return tl.where(rounded < _SMALLEST_SCALE, 0.0, rounded)


@triton.jit
def encode_bf16(value):
    return tl.minimum(bits_of(value) >> 16, _BF16_MAX_BITS)


@triton.jit
def decode_bf16(code):
    return from_bits(code << 16)


@triton.jit
def scale_factor(statistic, amax):
    safe = (statistic >= _SAFE_LOW) & (statistic <= _SAFE_HIGH) | (amax == 0)
    return tl.where(safe, 1.0, power_of_two_near_inverse(amax))


@triton.jit
def is_plain(statistic):
    """Whether a block with this statistic is finite, and its ``scale_factor`` 1."""
    return (statistic <= _SAFE_HIGH) & ((statistic >= _SAFE_LOW) | (statistic == 0))


@triton.jit
def scaled_value(value, factor):
    """``value * factor``, which stays negative where ``value`` is, however small."""
    scaled = value * factor
    least = tl.full(scaled.shape, -_SMALLEST, tl.float32)  # a subnormal constant by itself is a float64 in Triton 3.6
    return tl.where(value < 0, tl.minimum(scaled, least), tl.where(value == 0, 0.0, scaled))


@triton.jit
def lowered(magnitude):
    """A second copy of a magnitude, for sums that would overflow without it."""
    return magnitude * _TO_LOW


@triton.jit
def scaled_statistic(statistic, low, largest, factor):
    """The statistic of a row as it would be of ``magnitude * factor``.

    Powers of two commute with sums except where a sum overflows: there that of the lowered magnitudes is taken.

    Args:
        statistic: Of the magnitudes as they are.
        low: Of the lowered ones.
        largest: ``statistic`` of the group's largest row.
        factor: Of the group.
    """
    return tl.where(largest > _SAFE_HIGH, low * (factor * _FROM_LOW), statistic * factor)


@triton.jit
def fold_lanes(sums, ROWS: tl.constexpr):
    """``(ROWS, 64)`` to ``(ROWS,)``, the upper half onto the lower half until one is left."""
    for step in tl.static_range(6):
        sums = tl.sum(tl.reshape(sums, (ROWS, 2, 32 >> step)), axis=1)
    return tl.reshape(sums, (ROWS,))


@triton.jit
def fold_tiles(sums, WIDTH: tl.constexpr):
    """``(64, WIDTH)`` to ``(WIDTH,)``, in the same order."""
    for step in tl.static_range(6):
        sums = tl.sum(tl.reshape(sums, (2, 32 >> step, WIDTH)), axis=0)
    return tl.reshape(sums, (WIDTH,))


@triton.jit
def is_zero(flag):
    """Of a flag in memory, ``(1, 1)``: the interpreter cannot mask blocks with a scalar."""
    return tl.load(flag + tl.zeros((1, 1), tl.int32)) == 0


@triton.jit
def places_of(group, row, column, row_at, column_at, rows, channels, numel, PLACE: tl.constexpr):
    """Where the elements of ``row`` and ``column`` of a group lie in memory, and whether they do."""
    ok = (row < rows) & (column < channels)
    row = group * rows + tl.where(row < rows, row, 0)
    if PLACE == CONSECUTIVE:
        at = row * channels + column
        return at, ok & (at < numel)
    else:
        return tl.load(row_at + row) + tl.load(column_at + tl.where(column < channels, column, 0)), ok


@triton.jit
def in_rows(row, inside, unit, row_at, column_at, channels, numel, PLACE: tl.constexpr, WHOLE: tl.constexpr):
    """Where channels ``8 * unit`` to ``8 * unit + 7`` of rows lie in memory, and whether they do: ``(rows, units, 8)``.

    Args:
        row: Number of each row, int32 ``(rows, 1, 1)``; any number there is where it is not ``inside``.
        unit: ``(1, units, 1)``.
        row_at: Offset of each row, unless rows are consecutive.
        column_at: Offset of every eighth channel (``EIGHTS``) or of every channel (``SCATTERED``).
        channels: In each row.
        numel: Elements in memory.
        WHOLE: ``channels`` and ``numel`` are multiples of 8, so that masks are of units and loads of 16 bytes.
    """
    lane = tl.arange(0, 8)[None, None, :]
    column = 8 * unit + lane
    if PLACE == CONSECUTIVE:
        if WHOLE:
            start = 8 * (row * (channels // 8) + unit)
            return start + lane, inside & (8 * unit < channels) & (start < numel)
        else:
            at = row * channels + column
            return at, inside & (column < channels) & (at < numel)
    elif PLACE == EIGHTS:
        start = tl.load(row_at + row) + tl.load(column_at + tl.where(8 * unit < channels, unit, 0))
        return tl.multiple_of(start, (8, 8, 8)) + lane, inside & (8 * unit < channels)
    else:
        at = tl.load(row_at + row) + tl.load(column_at + tl.where(column < channels, column, 0))
        return at, inside & (column < channels)
