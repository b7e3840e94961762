"""One bit for each element: the sign."""

from __future__ import annotations

import torch
from torch import Tensor

from compactdist.codecs.kernels import reference as kernels
from compactdist.codecs.layout import Layout
from compactdist.codecs.quantized import ScalarQuantizer
from compactdist.codecs.registry import register
from compactdist.codecs.scales import RowScales, mean_sums, row_weight, storable_scale


@register
class Binary(ScalarQuantizer):
    """Decodes to ``+S`` or ``-S``. Zeros decode to ``+S``, unless their row or channel is all zero.

    About 1.02 bits for each element of a ``[1088, 3072]`` tensor, NMSE 0.364 on white Gaussian data.
    """

    codec_id = "binary"
    bits = 1
    fused = "sign"

    def _fit(self, values: Tensor, magnitude: Tensor, rows: RowScales, layout: Layout) -> tuple[Tensor, Tensor]:
        # Least squares: the error energy is sum(m ** 2) - sum(m * t) ** 2 / sum(t ** 2), less than there was.
        c = kernels.divide_or_zero(mean_sums(magnitude, rows, layout), row_weight(rows, layout))
        codes = (values >= 0).view(-1).to(torch.uint8)
        return kernels.pack_codes(codes, 1), storable_scale(c)

    def _levels(self, packed: Tensor, count: int) -> Tensor:
        return kernels.unpack_levels(packed, (-1.0, 1.0), 1, count)
