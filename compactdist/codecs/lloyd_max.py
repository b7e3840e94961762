"""Quantizers whose magnitudes are the Lloyd-Max levels of a unit Gaussian.

Lloyd-Max levels are the mean-square optimum for a known density: each level is the mean of its cell, each
cell border the middle of two levels. For the half-Gaussian the iteration is

    border[i] = (level[i - 1] + level[i]) / 2           with border[0] = 0 and border[k] = infinity
    level[i]  = (pdf(border[i]) - pdf(border[i + 1])) / (cdf(border[i + 1]) - cdf(border[i]))

run in double precision to a fixed point (changes below 1e-14). A test repeats it and compares.
"""

from __future__ import annotations

from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from compactdist.codecs.kernels import reference as kernels
from compactdist.codecs.layout import Layout
from compactdist.codecs.quantized import (
    SIGMA_OF_MEAN_MAGNITUDE,
    ScalarQuantizer,
    least_squares_scale,
    scale_sums,
    storable_scale,
)


class LloydMaxQuantizer(ScalarQuantizer):
    """Sign and magnitude index; the sign is the highest bit of the code, set for values below zero."""

    magnitudes: ClassVar[tuple[float, ...]]

    def _fit(self, values: Tensor, magnitude: Tensor, t: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        borders = [(low + high) / 2 for low, high in pairwise(self.magnitudes)]
        # Mean square over mean magnitude: sigma for a Gaussian, and wider for heavier tails, whose large
        # values carry the energy (on Laplace data 2.2 dB better at 4 bits than the mean magnitude alone).
        energy, mean = scale_sums(magnitude * magnitude, layout), scale_sums(magnitude * t, layout)
        sigma = kernels.divide_or_zero(energy, mean * SIGMA_OF_MEAN_MAGNITUDE)
        index = kernels.count_above(kernels.normalised(magnitude, t, sigma), borders)
        codes = (values < 0).to(torch.uint8).mul_(len(self.magnitudes)).add_(index).view(-1)
        packed = kernels.pack_codes(codes, self.bits)
        # The codes are settled: fit c again to what they decode to. This is what guarantees the contraction.
        chosen = kernels.unpack_levels(packed, self.magnitudes * 2, self.bits, layout.elements)
        c = least_squares_scale(magnitude, chosen.view_as(magnitude).mul_(t), layout)
        return packed, storable_scale(c)

    def _levels(self, packed: Tensor, count: int) -> Tensor:
        signed = self.magnitudes + tuple(-level for level in self.magnitudes)
        return kernels.unpack_levels(packed, signed, self.bits, count)
