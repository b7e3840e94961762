"""Quantizers whose magnitudes are made for a unit Gaussian: its Lloyd-Max levels, or the best equally spaced ones.

Lloyd-Max levels are the mean-square optimum for a known density: each level is the mean of its cell, each
cell border the middle of two levels. For the half-Gaussian the iteration is

    border[i] = (level[i - 1] + level[i]) / 2           with border[0] = 0 and border[k] = infinity
    level[i]  = (pdf(border[i]) - pdf(border[i + 1])) / (cdf(border[i + 1]) - cdf(border[i]))

run in double precision to a fixed point (changes below 1e-14). The best equally spaced levels ``(i + 1/2) * step``
have the borders ``i * step`` and the step at which the derivative of the mean square error vanishes:

    sum over i of (i + 1/2) * ((i + 1/2) * step * P[i] - M[i]) = 0

with P and M the probability and the first moment of cell i; found by bisection. Tests repeat both and compare.
"""

from __future__ import annotations

from typing import Any, ClassVar

from compactdist.codecs.options import check_choice
from compactdist.codecs.scalar import affine
from compactdist.codecs.scalar.quantized import ScalarQuantizer
from compactdist.codecs.shapes import BLOCK_ELEMENTS


class LloydMaxQuantizer(ScalarQuantizer):
    """Sign and magnitude index; the sign is the highest bit of the code, set for values below zero.

    Args:
        scales: ``"token_channel"``, ``"token_history"`` or ``"block"``.
        block: Elements to a block, at most.
        centroids: ``"lloyd_max"``, the best levels for Gaussian data; ``"uniform"``, the best equally spaced ones;
            ``"minmax"``, equally spaced from the smallest to the largest value of a block, without a sign (needs
            ``scales="block"``).

    Raises:
        CodecConfigError: An option has a value it does not take.
    """

    kind = "nearest"
    uniform_step: ClassVar[float]

    def __init__(
        self, scales: str = "token_channel", block: int = BLOCK_ELEMENTS, centroids: str = "lloyd_max"
    ) -> None:
        super().__init__(scales, block)
        self.centroids = check_choice(self.codec_id, "centroids", centroids, ("lloyd_max", "uniform", "minmax"))
        self.offsets = affine.wanted(self.codec_id, centroids, scales)
        if centroids == "uniform":
            self.magnitudes = tuple((i + 0.5) * self.uniform_step for i in range(len(self.magnitudes)))

    def get_config(self) -> dict[str, Any]:
        """Return the options that differ from their defaults."""
        config = super().get_config()
        if self.centroids != "lloyd_max":
            config["centroids"] = self.centroids
        return config
