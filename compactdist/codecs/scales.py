"""Channel scales: how they are fitted to sums over rows, and what may be stored.

Sums are those of ``reference.py``. What is here is a handful of values for each channel or group and is computed in
torch whichever kernels made the sums.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from compactdist.codecs.kernels import reference as kernels
from compactdist.codecs.layout import Layout

SMALLEST_SCALE = 2.0**-87
SIGMA_OF_MEAN_MAGNITUDE = math.sqrt(math.pi / 2)
SAFE_STATISTIC = (2.0**-50, 2.0**50)
"""Where a group's largest row statistic lies in here, sums and squares stay well inside the range of float32."""


def scale_sums(x: Tensor, layout: Layout) -> Tensor:
    """Sum ``(G, R, C)`` over everything that shares a channel scale: ``(G, 1, C)`` or ``(G, 1, 1)``."""
    sums = kernels.channel_sums(x)
    return kernels.row_sums(sums) if layout.channel_scales_per_group == 1 else sums


def scale_factor(statistic: Tensor, amax: Tensor) -> Tensor:
    """What to multiply a group with before sums and squares: 1 where they are safe, else a power of two near 1 / amax.

    Powers of two cost no accuracy, and an input scaled by one meets the same arithmetic.

    Args:
        statistic: float32 ``(G, R, 1)``, of the rows as they are; may have overflowed.
        amax: float32 ``(G, 1, 1)``.
    """
    largest = statistic.amax(1, keepdim=True)
    safe = (largest >= SAFE_STATISTIC[0]) & (largest <= SAFE_STATISTIC[1]) | (amax == 0)
    return torch.where(safe, torch.ones_like(amax), kernels.power_of_two_near_inverse(amax))


def gaussian_scale(energy: Tensor, mean: Tensor, weight: Tensor, smallest_level: float = 0.0) -> Tensor:
    """Return c such that ``t * c`` is the sigma that fits the magnitudes m, by channel or by group.

    Sigma is the mean square over the mean magnitude: right for a Gaussian, and wider for heavier tails, whose large
    values carry the energy. Without a zero among the levels it is widened further by the root of what sigma overstates
    the energy by, 1 for a Gaussian (measured: 0.3 dB at 4 bits on recorded residuals, 0.8 dB on Laplace data).

    Nearest-level coding with the decoder's c then contracts. With S = t c, a level L removes at least
    ``2 m L S - L**2 S**2`` from the energy of an element, for the nearest level removes no less. Summed up, L = L0
    leaves less than there was if ``c < 2 * sum(m * t) / (L0 * sum(t ** 2))``; c is held at three quarters of that,
    which only matters for channels of a few spikes among zeros. Where zero is a level, no error exceeds its element.

    Args:
        energy: ``sum(m ** 2)`` over everything that shares a channel scale, float32 ``(G, 1, C)`` or ``(G, 1, 1)``.
        mean: ``sum(m * t)``, the same shape.
        weight: ``sum(t ** 2)``, ``(G, 1, 1)``.
        smallest_level: L0, the smallest level in units of sigma; 0 where zero is a level.
    """
    sigma = kernels.divide_or_zero(energy, mean * SIGMA_OF_MEAN_MAGNITUDE)
    if smallest_level:
        overstated = kernels.divide_or_zero(sigma * sigma * weight, energy)
        limit = kernels.divide_or_zero(mean, weight) * (1.5 / smallest_level)
        sigma = torch.minimum(sigma * overstated.sqrt(), limit)
    return storable_scale(sigma)


def moments(magnitude: Tensor, t: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """``sum(m ** 2)``, ``sum(m * t)`` and ``sum(t ** 2)``, as ``gaussian_scale`` takes them.

    Args:
        magnitude: m, float32 ``(G, R, C)``, non-negative.
        t: Decoded row scales, ``(G, R, 1)``.
        layout: Tells whether channels have scales of their own.
    """
    energy, mean = scale_sums(magnitude * magnitude, layout), scale_sums(magnitude * t, layout)
    return energy, mean, row_weight(t, layout)


def row_weight(t: Tensor, layout: Layout) -> Tensor:
    """Sum of ``t ** 2`` over everything that shares a channel scale, ``(G, 1, 1)``."""
    squares = kernels.channel_sums(t * t)
    return squares * layout.channels if layout.channel_scales_per_group == 1 else squares


def storable_scale(c: Tensor, *, up: bool = False) -> Tensor:
    """Round a channel scale to bfloat16, to nearest or up; below ``SMALLEST_SCALE`` it is zero.

    Rounding to nearest moves c by 2**-9 of itself at most. A scale of least error energy may move by anything short
    of itself before that energy reaches the energy of the input, so this keeps the contraction.
    """
    rounded = kernels.round_bf16(c, up=up)
    return torch.where(rounded < SMALLEST_SCALE, torch.zeros_like(rounded), rounded)
