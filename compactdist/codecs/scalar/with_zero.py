"""Four bits and a zero level: what the hybrid codecs code their values with."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from compactdist.codecs.scalar.layout import Layout
from compactdist.codecs.scalar.quantized import ScalarQuantizer
from compactdist.codecs.scalar.scales import RowScales, gaussian_scale, moments, refitted_scale
from compactdist.codecs.shapes import BLOCK_ELEMENTS
from compactdist.kernels import reference as kernels

# Lloyd-Max of 15 levels for the unit Gaussian, NMSE 0.010737: as lloyd_max.py says, with the first level held at 0.
MAGNITUDES = (
    0.0,
    0.2738568549040208,
    0.5547636946759694,
    0.8511344121244998,
    1.174879178355213,
    1.5460567537076253,
    2.0064743961505593,
    2.6808661189877245,
)


class Int4WithZero(ScalarQuantizer):
    """Codes ``sign << 3 | magnitude`` of fifteen levels, zero among them, in the layout of ``layout.py``.

    A part of other codecs: not registered. Unlike ``int4`` it returns exact zeros where it was given zeros.
    """

    codec_id = "int4_with_zero"
    bits = 4

    def __init__(self, block: int = BLOCK_ELEMENTS) -> None:
        super().__init__("block")
        self.block = block  # no upper limit here: a component of a factor is one block

    def _fit(self, values: Tensor, magnitude: Tensor, rows: RowScales, layout: Layout) -> tuple[Tensor, Tensor]:
        c = gaussian_scale(*moments(magnitude, rows, layout))
        borders = [(low + high) / 2 for low, high in pairwise(MAGNITUDES)]
        index = kernels.count_above(kernels.normalised(magnitude, rows.t, c), borders)
        codes = (values < 0).to(torch.uint8).mul_(8).add_(index).view(-1)
        packed = kernels.pack_codes(codes, 4)
        levels = kernels.unpack_levels(packed, MAGNITUDES * 2, 4, layout.elements).view_as(magnitude)
        return packed, refitted_scale(c, magnitude, levels)

    def _levels(self, packed: Tensor, count: int) -> Tensor:
        return kernels.unpack_levels(packed, MAGNITUDES + tuple(-level for level in MAGNITUDES), 4, count)
