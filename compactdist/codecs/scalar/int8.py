"""Eight bits for each element: a signed integer, equally spaced levels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compactdist.codecs.base import About
from compactdist.codecs.options import check_choice
from compactdist.codecs.registry import register
from compactdist.codecs.scalar import affine
from compactdist.codecs.scalar.layout import Layout
from compactdist.codecs.scalar.quantized import ScalarQuantizer
from compactdist.codecs.scalar.scales import RowScales, storable_scale
from compactdist.codecs.shapes import BLOCK_ELEMENTS
from compactdist.kernels import reference as kernels

_LARGEST_CODE = 127


@register
class Int8(ScalarQuantizer):
    """Decodes to ``q * S`` with q from -127 to 127. The scales follow the maxima, so no element is clipped.

    About 8.02 bits for each element of a ``[1088, 3072]`` tensor, NMSE 1e-4 on white Gaussian data.

    Args:
        scales: ``"token_channel"`` or ``"block"``.
        block: Elements to a block, at most.
        centroids: ``"uniform"``, the integers; ``"minmax"``, 256 levels from the smallest to the largest value of a
            block (needs ``scales="block"``).

    Raises:
        CodecConfigError: An option has a value it does not take.
    """

    codec_id = "int8"
    about = About(
        sends="an integer from -127 to 127",
        use="links that are a little too slow; tensors with no history, where it is nearly exact",
        source="uniform levels up to the largest element of a row and channel: `int8.py`",
    )
    bits = 8
    fused = "linear"
    reach = float(_LARGEST_CODE)

    def __init__(self, scales: str = "token_channel", block: int = BLOCK_ELEMENTS, centroids: str = "uniform") -> None:
        super().__init__(scales, block)
        self.centroids = check_choice(self.codec_id, "centroids", centroids, ("uniform", "minmax"))
        self.offsets = affine.wanted(self.codec_id, centroids, scales)

    def get_config(self) -> dict[str, Any]:
        """Return the options that differ from their defaults."""
        config = super().get_config()
        if self.centroids != "uniform":
            config["centroids"] = self.centroids
        return config

    def _row_statistic(self, magnitude: Tensor) -> Tensor:
        return magnitude.amax(2, keepdim=True)

    def _fit(self, values: Tensor, magnitude: Tensor, rows: RowScales, layout: Layout) -> tuple[Tensor, Tensor]:
        one = torch.ones((), dtype=torch.float32, device=magnitude.device)
        reach = (magnitude * kernels.divide_or_zero(one, rows.weight)).amax(1, keepdim=True) / rows.norm
        if layout.channel_scales_per_group == 1:
            reach = reach.amax(2, keepdim=True)
        c = storable_scale(reach / _LARGEST_CODE, up=True)
        # Each element rounds to its nearest level and zero is a level, so no element's error exceeds the
        # element.
        steps = kernels.normalised(magnitude, rows.t, c).round_().clamp_(max=_LARGEST_CODE)
        codes = torch.where(values < 0, -steps, steps).to(torch.int8)
        return codes.view(-1).view(torch.uint8), c

    def _levels(self, packed: Tensor, count: int) -> Tensor:
        return packed[:count].view(torch.int8).to(torch.float32)
