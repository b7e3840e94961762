"""One bit for each element: the sign."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from torch import Tensor

from compactdist.codecs import shapes
from compactdist.codecs.base import About
from compactdist.codecs.registry import register
from compactdist.codecs.scalar import rank_scales
from compactdist.codecs.scalar.quantized import ScalarQuantizer
from compactdist.kernels.reference import steps as reference
from compactdist.kernels.sections import Sections
from compactdist.kernels.spec import QuantizerSpec


@register
class Binary(ScalarQuantizer):
    """Decodes to ``+S`` or ``-S``. Zeros decode to ``+S``, unless their row or channel is all zero.

    About 1.02 bits for each element of a ``[1088, 3072]`` tensor, NMSE 0.364 on white Gaussian data.

    Args:
        scales: ``"token_channel"``, ``"token_history"`` or ``"block"`` (``quantized.py``), or ``"rank"``: the sum of
            ``rank`` products of a scale for each row and one for each channel (``rank_scales.py``).
        block: Elements to a block, at most; with ``scales="block"`` only.
        rank: Components, 1 to 16, of which a small tensor uses fewer; with ``scales="rank"`` only.

    Raises:
        CodecConfigError: An option has a value it does not take, or ``scales`` leaves it without effect.
    """

    codec_id = "binary"
    about = About(
        sends="the sign",
        use="the slowest links; take `order=2` with it, which halves the error for twice the state",
        source="CompactFusion, arXiv 2507.17511; scale: least squares, `reference/steps.py`; rank k: `rank_scales.py`",
    )
    kind = "sign"
    bits = 1
    scale_choices = (*ScalarQuantizer.scale_choices, "rank")

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

    @cached_property
    def spec(self) -> QuantizerSpec | None:
        return None if self.scales == "rank" else super().spec

    def sections_of(self, shape: Sequence[int]) -> Sections:
        """Return the sections of the payload for a tensor of this shape."""
        if self.scales != "rank":
            return super().sections_of(shape)
        ranked = rank_scales.RankSections.of_rank(shape, self.rank)
        return _BY_ROW_AND_CHANNEL.sections_of(shape) if ranked is None else ranked

    def _encode_matrices(self, values: Tensor, magnitude: Tensor, amax: Tensor, sections: Sections) -> Tensor:
        if isinstance(sections, rank_scales.RankSections):
            return rank_scales.encode(values, magnitude, amax, sections)
        return reference.encode(self.spec or _BY_ROW_AND_CHANNEL, values, magnitude, amax, sections)

    def _decode_matrices(self, payload: Tensor, sections: Sections) -> Tensor:
        if isinstance(sections, rank_scales.RankSections):
            return rank_scales.decode(payload, sections)
        return reference.decode(self.spec or _BY_ROW_AND_CHANNEL, payload, sections)


_BY_ROW_AND_CHANNEL = QuantizerSpec("sign", 1)
"""Codes a tensor that is too thin for scales of rank 1."""
