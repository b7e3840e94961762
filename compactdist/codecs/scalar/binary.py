"""One bit for each element: the sign."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from compactdist.codecs import shapes
from compactdist.codecs.base import About
from compactdist.codecs.registry import register
from compactdist.codecs.scalar import rank_scales
from compactdist.codecs.scalar.layout import Layout
from compactdist.codecs.scalar.quantized import ScalarQuantizer
from compactdist.codecs.scalar.scales import RowScales, mean_sums, row_weight, storable_scale
from compactdist.kernels import reference as kernels


@register
class Binary(ScalarQuantizer):
    """Decodes to ``+S`` or ``-S``. Zeros decode to ``+S``, unless their row or channel is all zero.

    About 1.02 bits for each element of a ``[1088, 3072]`` tensor, NMSE 0.364 on white Gaussian data.

    Args:
        scales: ``"token_channel"`` or ``"block"`` (``layout.py``), or ``"rank"``: the sum of ``rank`` products of a
            scale for each row and one for each channel (``rank_scales.py``).
        block: Elements to a block, at most; with ``scales="block"`` only.
        rank: Components, 1 to 16, of which a small tensor uses fewer; with ``scales="rank"`` only.

    Raises:
        CodecConfigError: An option has a value it does not take, or ``scales`` leaves it without effect.
    """

    codec_id = "binary"
    about = About(
        sends="the sign",
        use="the slowest links; take `order=2` with it, which halves the error for twice the state",
        source="CompactFusion, arXiv 2507.17511; least-squares scale: `binary.py`; scales of rank k: `rank_scales.py`",
    )
    bits = 1
    fused = "sign"
    scale_choices = ("token_channel", "block", "rank")

    def __init__(
        self,
        scales: str = "token_channel",
        block: int = shapes.BLOCK_ELEMENTS,
        rank: int = rank_scales.DEFAULT_RANK,
    ) -> None:
        super().__init__(scales, block)
        self.rank = rank_scales.check_rank(self.codec_id, scales, rank)

    def get_config(self) -> dict[str, Any]:
        """Return the options that differ from their defaults."""
        config = super().get_config()
        return config if self.rank == rank_scales.DEFAULT_RANK else {**config, "rank": self.rank}

    def layout_of(self, shape: Sequence[int]) -> Layout:
        """Return the layout of the payload for a tensor of this shape."""
        ranked = rank_scales.RankLayout.of_rank(shape, self.rank) if self.scales == "rank" else None
        return super().layout_of(shape) if ranked is None else ranked

    def encode_checked(self, values: Tensor, magnitude: Tensor, amax: Tensor, layout: Layout) -> Tensor:
        if isinstance(layout, rank_scales.RankLayout):
            return rank_scales.encode(values, magnitude, amax, layout)
        return super().encode_checked(values, magnitude, amax, layout)

    def _dequantized(self, payload: Tensor, layout: Layout) -> Tensor:
        if isinstance(layout, rank_scales.RankLayout):
            return rank_scales.decode(payload, layout)
        return super()._dequantized(payload, layout)

    def _fit(self, values: Tensor, magnitude: Tensor, rows: RowScales, layout: Layout) -> tuple[Tensor, Tensor]:
        # Least squares: the error energy is sum(m ** 2) - sum(m * t) ** 2 / sum(t ** 2), less than there was.
        c = kernels.divide_or_zero(mean_sums(magnitude, rows, layout), row_weight(rows, layout))
        codes = (values >= 0).view(-1).to(torch.uint8)
        return kernels.pack_codes(codes, 1), storable_scale(c)

    def _levels(self, packed: Tensor, count: int) -> Tensor:
        return kernels.unpack_levels(packed, (-1.0, 1.0), 1, count)
