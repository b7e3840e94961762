"""Eight bits for each element: a signed integer, equally spaced levels."""

from __future__ import annotations

import torch
from torch import Tensor

from compactdist.codecs.kernels import reference as kernels
from compactdist.codecs.layout import Layout
from compactdist.codecs.quantized import ScalarQuantizer, storable_scale
from compactdist.codecs.registry import register

_LARGEST_CODE = 127


@register
class Int8(ScalarQuantizer):
    """Decodes to ``q * S`` with q from -127 to 127. The scales follow the maxima, so no element is clipped.

    About 8.02 bits for each element of a ``[1088, 3072]`` tensor, NMSE 1e-4 on white Gaussian data.
    """

    codec_id = "int8"
    bits = 8
    fused = "linear"

    def _row_statistic(self, magnitude: Tensor) -> Tensor:
        return magnitude.amax(2, keepdim=True)

    def _fit(self, values: Tensor, magnitude: Tensor, t: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        one = torch.ones((), dtype=torch.float32, device=magnitude.device)
        reach = (magnitude * kernels.divide_or_zero(one, t)).amax(1, keepdim=True)
        if layout.channel_scales_per_group == 1:
            reach = reach.amax(2, keepdim=True)
        c = storable_scale(reach / _LARGEST_CODE, up=True)
        # Each element rounds to its nearest level and zero is a level, so no element's error exceeds the
        # element.
        steps = kernels.normalised(magnitude, t, c).round_().clamp_(max=_LARGEST_CODE)
        codes = torch.where(values < 0, -steps, steps).to(torch.int8)
        return codes.view(-1).view(torch.uint8), c

    def _levels(self, packed: Tensor, count: int) -> Tensor:
        return packed[:count].view(torch.int8).to(torch.float32)
