"""Scales of rows and channels: how they are fitted to sums, rounded, stored and read.

Conversions to small formats are integer arithmetic on the bits of floats. What is here is a handful of values for each
row, channel or group.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from compactdist.kernels.reference.rows import channel_sums, row_sums
from compactdist.kernels.sections import Sections

UE5M3_BIAS = (127 - 31) << 3
UE5M3_FIRST_NONZERO_BITS = 0x2F900000  # 0.5625 * 2**-31, midway between 0 and the smallest nonzero value
BF16_MAX_BITS = 0x7F7F

SMALLEST_SCALE = 2.0**-87
SIGMA_OF_MEAN_MAGNITUDE = math.sqrt(math.pi / 2)
SAFE_STATISTIC = (2.0**-50, 2.0**50)
"""Where a group's largest row statistic lies in here, sums and squares stay well inside the range of float32."""

LARGEST_OF_MEAN = 1.5
"""A scale beyond twice the mean magnitude, over the smallest level, would send more energy than there is."""

LEVEL_OF_TRITS = 1.224006361924962
"""The Lloyd-Max quantizer of three levels for the unit Gaussian (NMSE 0.190174); its border is half of it."""


def divide_or_zero(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Elementwise quotient of non-negative float32 tensors, 0 where the denominator is 0."""
    positive = denominator > 0
    quotient = numerator / torch.where(positive, denominator, torch.ones_like(denominator))
    return torch.where(positive, quotient, torch.zeros_like(quotient))


def power_of_two_near_inverse(value: Tensor) -> Tensor:
    """Return a power of two p with ``value * p < 4`` for any finite float32 value >= 0, and >= 1 unless
    subnormal.

    The exponent field is mirrored: 2**e goes to 2**-e, with the two ends cut to normal numbers.
    """
    exponent = value.contiguous().view(torch.int32) >> 23
    return ((254 - exponent).clamp(1, 254) << 23).view(torch.float32)


def round_3_bits(value: Tensor) -> Tensor:
    """Round non-negative float32 to three bits of mantissa, halfway up: the values of UE5M3 times a power of two."""
    bits = value.contiguous().view(torch.int32)
    return ((bits + (1 << 19)) & -(1 << 20)).view(torch.float32)


def encode_ue5m3(value: Tensor) -> Tensor:
    """Round non-negative float32 to the nearest UE5M3 code (uint8); halfway goes up, too large saturates."""
    bits = value.contiguous().view(torch.int32)
    code = ((bits + (1 << 19)) >> 20) - UE5M3_BIAS
    # Code 0 means 0, not 2**-31, so the lowest step is wider than the formula knows.
    smallest = (bits >= UE5M3_FIRST_NONZERO_BITS).to(torch.int32)
    return torch.maximum(code, smallest).clamp(max=255).to(torch.uint8)


def decode_ue5m3(code: Tensor) -> Tensor:
    """Expand UE5M3 codes (uint8) to float32, exactly."""
    bits = (code.to(torch.int32) + UE5M3_BIAS) << 20
    return torch.where(code == 0, torch.zeros_like(bits), bits).view(torch.float32)


def round_bf16(value: Tensor, *, up: bool = False) -> Tensor:
    """Round non-negative float32 to a bfloat16 value, to nearest even or up; the result stays float32."""
    bits = value.contiguous().view(torch.int32)
    bits = bits + (0xFFFF if up else 0x7FFF + ((bits >> 16) & 1))
    return (bits & -0x10000).view(torch.float32)


def round_signed_bf16(value: Tensor, smallest: float | Tensor) -> Tensor:
    """Round float32 to a bfloat16 value, to nearest even; what is below ``smallest`` in magnitude is zero."""
    size = value.abs()
    size = torch.where(size < smallest, torch.zeros_like(size), round_bf16(size))
    return torch.where(value < 0, -size, size)


def encode_bf16(value: Tensor) -> Tensor:
    """Store non-negative bfloat16 values held in float32 as bytes ``(2 * n,)``, low byte first; saturates."""
    bits = (value.reshape(-1).view(torch.int32) >> 16).clamp(max=BF16_MAX_BITS)
    return torch.stack([bits & 0xFF, bits >> 8], 1).reshape(-1).to(torch.uint8)


def encode_signed_bf16(value: Tensor) -> Tensor:
    """Store bfloat16 values of either sign held in float32 as bytes ``(2 * n,)``, low byte first; saturates."""
    bits = value.reshape(-1).view(torch.int32) >> 16
    bits = (bits & 0x7FFF).clamp(max=BF16_MAX_BITS) | (bits & 0x8000)
    return torch.stack([bits & 0xFF, bits >> 8], 1).reshape(-1).to(torch.uint8)


def decode_bf16(data: Tensor) -> Tensor:
    """Expand bytes ``(2 * n,)`` to float32 ``(n,)``, exactly."""
    halves = data.reshape(-1, 2).to(torch.int32)
    return ((halves[:, 0] << 16) | (halves[:, 1] << 24)).view(torch.float32)


class RowScales(NamedTuple):
    """The scales of the rows, all float32 ``(G, R, 1)`` but for the codes.

    Attributes:
        weight: The statistic rounded to three bits of mantissa: t before it is normalised, known as soon as the row is.
        norm: ``(G, 1, 1)``, a power of two: t is ``weight * norm``, at least 1/2 and less than 1 in a group's largest
            row, so that S = t c stays finite.
        codes: UE5M3 codes of t, uint8.
        t: What the decoder makes of the codes; 0 for rows too small beside the largest.
    """

    weight: Tensor
    norm: Tensor
    codes: Tensor
    t: Tensor

    @classmethod
    def of(cls, statistic: Tensor, sections: Sections) -> RowScales:
        """Settle the scales; all 1 where the sections has none."""
        if not sections.row_scale_count:
            ones = torch.ones_like(statistic)
            return cls(ones, ones[:, :1], ones.to(torch.uint8), ones)
        weight = round_3_bits(statistic)
        norm = 0.5 * power_of_two_near_inverse(weight.amax(1, keepdim=True))
        codes = encode_ue5m3(weight * norm)
        return cls(weight, norm, codes, decode_ue5m3(codes))


def scale_sums(x: Tensor, sections: Sections) -> Tensor:
    """Sum ``(G, R, C)`` over everything that shares a channel scale: ``(G, 1, C)`` or ``(G, 1, 1)``."""
    sums = channel_sums(x)
    return row_sums(sums) if sections.channel_scales_per_group == 1 else sums


def scale_factor(statistic: Tensor, amax: Tensor) -> Tensor:
    """What to multiply a group with before sums and squares: 1 where they are safe, else a power of two near 1 / amax.

    Powers of two cost no accuracy, and an input scaled by one meets the same arithmetic.

    Args:
        statistic: float32 ``(G, R, 1)``, of the rows as they are; may have overflowed.
        amax: float32 ``(G, 1, 1)``.
    """
    largest = statistic.amax(1, keepdim=True)
    safe = (largest >= SAFE_STATISTIC[0]) & (largest <= SAFE_STATISTIC[1]) | (amax == 0)
    return torch.where(safe, torch.ones_like(amax), power_of_two_near_inverse(amax))


def gaussian_scale(
    energy: Tensor, mean: Tensor, weight: Tensor, smallest_level: float = 0.0, widening: int = 1
) -> Tensor:
    """Return c such that ``t * c`` is the sigma that fits the magnitudes m, by channel or by group.

    Sigma is the mean square over the mean magnitude: right for a Gaussian, and wider for heavier tails, whose large
    values carry the energy. Without a zero among the levels it is widened further by a root of what sigma overstates
    the energy by, 1 for a Gaussian (0.3 dB at 4 bits on recorded residuals, 0.8 dB on Laplace data).

    Nearest-level coding with the decoder's c then contracts. With S = t c, a level L removes at least
    ``2 m L S - L**2 S**2`` from the energy of an element, for the nearest level removes no less. Summed up, L = L0
    leaves less than there was if ``c < 2 * sum(m * t) / (L0 * sum(t ** 2))``; c is held at three quarters of that,
    which only matters for channels of a few spikes among zeros. Where zero is a level, no error exceeds its element.

    Args:
        energy: ``sum(m ** 2)`` over everything that shares a channel scale, float32 ``(G, 1, C)`` or ``(G, 1, 1)``.
        mean: ``sum(m * t)``, the same shape.
        weight: ``sum(t ** 2)``, ``(G, 1, 1)``.
        smallest_level: L0, the smallest level in units of sigma; 0 where zero is a level.
        widening: 1 for the square root, 2 for the fourth root, which suits two magnitudes better.
    """
    sigma = divide_or_zero(energy, mean * SIGMA_OF_MEAN_MAGNITUDE)
    if smallest_level:
        overstated = divide_or_zero(sigma * sigma * weight, energy)
        limit = divide_or_zero(mean, weight) * (LARGEST_OF_MEAN / smallest_level)
        for _ in range(widening):
            overstated = overstated.double().sqrt().float()  # torch's in float32 is not always rounded to nearest
        sigma = torch.minimum(sigma * overstated, limit)
    return storable_scale(sigma)


def moments(magnitude: Tensor, rows: RowScales, sections: Sections) -> tuple[Tensor, Tensor, Tensor]:
    """``sum(m ** 2)``, ``sum(m * t)`` and ``sum(t ** 2)``, as ``gaussian_scale`` takes them.

    Args:
        magnitude: m, float32 ``(G, R, C)``, non-negative.
        rows: The scales of the rows.
        sections: Tells whether channels have scales of their own.
    """
    return scale_sums(magnitude * magnitude, sections), mean_sums(magnitude, rows, sections), row_weight(rows, sections)


def mean_sums(magnitude: Tensor, rows: RowScales, sections: Sections) -> Tensor:
    """``sum(m * t)`` over everything that shares a channel scale; summed with the weights, normalised afterwards."""
    return scale_sums(magnitude * rows.weight, sections) * rows.norm


def refitted_scale(c: Tensor, magnitude: Tensor, levels: Tensor) -> Tensor:
    """Return the c of least error for levels that are settled, where a scale covers one row.

    128 elements are few: the scale that fits these very codes is better by up to 0.9 dB than one from their moments.
    The error energy is ``sum(m ** 2) - sum(m * level) ** 2 / sum(level ** 2)``, whatever the levels.

    Args:
        c: the scale that the levels were chosen with, ``(G, 1, 1)``; returned where there is nothing to fit.
        magnitude: float32 ``(G, 1, C)``, non-negative.
        levels: float32 ``(G, 1, C)``, non-negative, in units of c.
    """
    products, squares = row_sums(magnitude * levels), row_sums(levels * levels)
    return torch.where(c > 0, storable_scale(divide_or_zero(products, squares)), c)


def row_weight(rows: RowScales, sections: Sections) -> Tensor:
    """``sum(t ** 2)`` over everything that shares a channel scale, ``(G, 1, 1)``."""
    squares = channel_sums(rows.weight * rows.weight) * rows.norm * rows.norm
    return squares * sections.channels if sections.channel_scales_per_group == 1 else squares


def storable_scale(c: Tensor, *, up: bool = False) -> Tensor:
    """Round a channel scale to bfloat16, to nearest or up; below ``SMALLEST_SCALE`` it is zero.

    Rounding to nearest moves c by 2**-9 of itself at most. A scale of least error energy may move by anything short
    of itself before that energy reaches the energy of the input, so this keeps the contraction.
    """
    rounded = round_bf16(c, up=up)
    return torch.where(rounded < SMALLEST_SCALE, torch.zeros_like(rounded), rounded)
