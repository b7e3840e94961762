"""One bit for each element: the sign."""

from __future__ import annotations

import torch
from torch import Tensor

from compactdist.codecs.kernels import reference as kernels
from compactdist.codecs.layout import Layout
from compactdist.codecs.quantized import ScalarQuantizer, least_squares_scale, storable_scale
from compactdist.codecs.registry import register


@register
class Binary(ScalarQuantizer):
    """Decodes to ``+S`` or ``-S``. Zeros decode to ``+S``, unless their row or channel is all zero.

    About 1.02 bits for each element of a ``[1088, 3072]`` tensor, NMSE 0.364 on white Gaussian data.
    """

    codec_id = "binary"
    bits = 1
    fused = "sign"

    def _fit(self, values: Tensor, magnitude: Tensor, t: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        # The codes do not depend on c, so its least-squares value is final at once.
        c = least_squares_scale(magnitude, t.expand_as(magnitude), layout)
        codes = (values >= 0).view(-1).to(torch.uint8)
        return kernels.pack_codes(codes, 1), storable_scale(c)

    def _levels(self, packed: Tensor, count: int) -> Tensor:
        return kernels.unpack_levels(packed, (-1.0, 1.0), 1, count)
