"""Find (groups, channels) of a flat buffer from its numbers.

Scales per channel pay when channels have unequal energy, and they are most unequal at the true channel count: at a
wrong count every column mixes all channels. The gain of knowing the energies e_j, in bits per element, is half the log
of arithmetic over geometric mean (reverse water-filling, Cover and Thomas, Elements of Information Theory, 10.3.3),
corrected for the spread that a finite number of rows shows by chance, less the bits that the scales cost.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from compactdist.kernels.sections import MIN_CHANNELS_FOR_ROW_SCALES, MIN_ROWS_FOR_CHANNEL_SCALES
from compactdist.state.matrix_view import MatrixView, blocks, plain

__all__ = ["find_view"]

_MIN_CHANNELS, _MAX_CHANNELS = 16, 16384
_MAX_GROUPS = 64
_SEARCH_ELEMENTS = 1 << 20
_MIN_GAIN_BITS = 0.02
"""A found matrix view must promise at least this much more than blocks (0.12 dB), or blocks stay."""


def _divisors(n: int, low: int, high: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return sorted({d for s in small for d in (s, n // s) if low <= d <= high})


def _spread_bits(energy: Tensor, samples: int) -> float:
    """Bits per element that knowing the energies (last dimension) saves, less what chance alone would show.

    E[log2 of a chi-square mean with k degrees] is about -log2(e)/k below the log of its mean.
    """
    energy = energy.double()
    # a channel 60 dB down is free already; a silent one must not promise infinite gain
    energy = energy.clamp_min(float(energy.mean()) * 1e-6 + 1e-300)
    saved = 0.5 * (energy.mean(-1).log2() - energy.log2().mean(-1)).mean().item()
    return saved - 0.5 * math.log2(math.e) / samples


def _gain_bits(square: Tensor, groups: int, channels: int) -> tuple[float, float]:
    """Saving, in bits per element, of a (groups, rows, channels) view of ``square`` (flat, squared values).

    Returns:
        The saving less the cost of the scales, and the saving alone, which measures the structure.
    """
    matrix = square.view(groups, -1, channels)
    rows = matrix.shape[1]
    per_channel = matrix.mean(1)
    gain = cost = 0.0
    if rows >= MIN_ROWS_FOR_CHANNEL_SCALES:
        gain = _spread_bits(per_channel.reshape(1, -1), rows)
        cost = 16 / rows
    if channels >= MIN_CHANNELS_FOR_ROW_SCALES:
        floor = per_channel.mean(-1, keepdim=True) * 1e-6 + torch.finfo(torch.float32).tiny
        per_row = (matrix / (per_channel + floor)[:, None]).mean(-1)
        gain += max(0.0, _spread_bits(per_row, channels))
        cost += 8 / channels
    return gain - cost, gain


def find_view(residual: Tensor) -> MatrixView:
    """The best plain matrix view of a flat buffer, or blocks where none is clearly better.

    Args:
        residual: flat ``[numel]`` float tensor, finite.

    Returns:
        A matrix view without permutation: heads that are interleaved with tokens can be separated by a hint only.
    """
    numel = residual.numel()
    default = blocks(numel)
    if numel < 4 * _MIN_CHANNELS * MIN_ROWS_FOR_CHANNEL_SCALES:
        return default
    square = residual.detach().float()
    peak = square.abs().max()
    if not bool(peak > 0):
        return default
    square = (square / peak).square()
    candidates = _divisors(numel, _MIN_CHANNELS, min(_MAX_CHANNELS, numel // MIN_ROWS_FOR_CHANNEL_SCALES))
    if not candidates:
        return default

    def first_look(channels: int) -> float:
        rows = max(MIN_ROWS_FOR_CHANNEL_SCALES, min(numel, _SEARCH_ELEMENTS) // channels)
        part = square[: min(numel, rows * channels)]
        return _gain_bits(part[: part.numel() // channels * channels], 1, channels)[0]

    base, structure_of_blocks = _block_gain(square)
    ranked = sorted(candidates, key=first_look, reverse=True)[:4]
    best, best_gain = default, base + _MIN_GAIN_BITS
    for channels in ranked:
        for groups in _divisors(
            numel // channels, 1, min(_MAX_GROUPS, numel // channels // MIN_ROWS_FOR_CHANNEL_SCALES)
        ):
            gain, structure = _gain_bits(square, groups, channels)
            if structure < structure_of_blocks + _MIN_GAIN_BITS:
                continue  # cheaper scales alone do not pay for the slower coding of narrow rows
            if gain > best_gain + (1e-3 if groups > best.groups else 0.0):
                best, best_gain = plain(numel, groups, channels), gain
    return best


def _block_gain(square: Tensor) -> tuple[float, float]:
    shape = blocks(square.numel()).shape
    missing = math.prod(shape) - square.numel()
    padded = torch.nn.functional.pad(square, (0, missing)) if missing else square
    return _gain_bits(padded, 1, shape[2])
