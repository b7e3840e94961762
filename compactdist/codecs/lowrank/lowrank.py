"""A product of two thin matrices for each group, both in bfloat16."""

from __future__ import annotations

import torch
from torch import Tensor

from compactdist.codecs.base import About
from compactdist.codecs.lowrank.factors import SMALLEST_FACTOR, Fitted
from compactdist.codecs.lowrank.thin_factors import LowRankCodec
from compactdist.codecs.registry import register
from compactdist.codecs.shapes import padded_nbytes
from compactdist.kernels import reference as kernels
from compactdist.kernels.spec import FactorSpec


@register
class LowRank(LowRankCodec):
    """Sends the best product of a ``(R, rank)`` and a ``(rank, C)`` matrix it finds, both in bfloat16.

    A tensor is seen as ``(G, R, C)`` (``shapes.matrix_shape``); r is ``min(rank, R, C)``. The payload is three
    sections, each filled up with zeros to a multiple of 16 bytes:

    1. **gains**, G bfloat16, low byte first, not negative;
    2. **U transposed**, ``(G, r, R)`` bfloat16;
    3. **V**, ``(G, r, C)`` bfloat16.

    The decoder computes ``((U[n,0] V[0,j] + U[n,1] V[1,j]) + ...) * gain`` in float32, components in ascending order,
    every product and every sum rounded; a sum below ``2**-30`` in magnitude counts as zero. The result is clamped to
    the largest finite value of the wanted dtype.

    ``16 r (R + C) / (R C)`` bits for each element: 0.16 for the default at ``[1088, 3072]``. White noise has no low
    rank and is barely reduced; structure is.

    Args:
        rank: Number of components, 1 to 1024.

    Raises:
        CodecConfigError: The rank is out of range.
    """

    codec_id = "lowrank"
    about = About(
        sends="two thin factors in bfloat16",
        use="a hundredth of the bytes, where tokens and channels change together; evaluate a trace first",
        source="Halko, Martinsson and Tropp, Finding structure with randomness, SIAM Review, 2011",
    )
    _default_rank = 8

    def __init__(self, rank: int = 8) -> None:
        super().__init__(rank)

    @property
    def factor_spec(self) -> FactorSpec:
        return FactorSpec(self.rank)

    def _factor_nbytes(self, components: int, length: int) -> int:
        return padded_nbytes(2 * components * length)

    def _round(self, factor: Tensor) -> Fitted:
        value = kernels.round_signed_bf16(factor, SMALLEST_FACTOR)
        return Fitted(value, value, value)

    def _pack(self, parts: list[Fitted], length: int) -> Tensor:
        return kernels.encode_signed_bf16(torch.cat([part.value for part in parts]))

    def _decode_factor(self, data: Tensor, components: int, length: int) -> Tensor:
        return kernels.decode_bf16(data[: 2 * components * length])
