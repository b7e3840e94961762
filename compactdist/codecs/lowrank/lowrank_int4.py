"""A product of two thin matrices for each group, in four bits, or in as many as a component is worth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from compactdist.codecs.base import About
from compactdist.codecs.lowrank import allocation as by_energy
from compactdist.codecs.lowrank.factors import Fitted, fit
from compactdist.codecs.lowrank.products import Products
from compactdist.codecs.lowrank.thin_factors import LowRankCodec
from compactdist.codecs.options import check_choice
from compactdist.codecs.registry import register
from compactdist.codecs.scalar.with_zero import MAGNITUDES, Int4WithZero
from compactdist.codecs.shapes import matrix_shape
from compactdist.kernels import reference as kernels
from compactdist.kernels.spec import FactorSpec


@register
class LowRankInt4(LowRankCodec):
    """As ``lowrank``, with the factors in four bits and a scale for each component of each factor.

    The first section is that of ``lowrank``. The second is the payload (``sections.py``) of U transposed, a tensor
    ``(G * r, 1, R)`` with one scale for each of its ``G * r`` rows, in codes ``sign << 3 | magnitude`` of fifteen
    levels: the Lloyd-Max levels of the unit Gaussian with zero among them, listed in ``with_zero.py``. The third is
    V in the same form, ``(G * r, 1, C)``. The decoder multiplies the factors as that of ``lowrank`` does.

    About ``4 r (R + C) / (R C)`` bits for each element: 0.16 for the default at ``[1088, 3072]``.

    With ``allocation="energy"`` as many bits are shared out by the energy of components (``allocation.py``). There are
    ``n = min(2 r, R, C)`` of them, component k with ``b_k`` bits, 0 to 6, for each element of both its factors, and the
    sum of all ``b_k`` is ``4 r``. The payload is five sections, each filled up with zeros to a multiple of 16 bytes:

    1. **gains**, G bfloat16, low byte first, powers of two;
    2. **counts**, for each group six uint16, low byte first: how many components have 6, 5, 4, 3, 2 and 1 bits. They
       come in this order; the remaining ones of the n components have none;
    3. **scales**, ``(G, n)`` bfloat16, not negative;
    4. **U transposed**, one run of bits, lowest bit of a byte first: for each group and component its ``b_k`` bit
       planes of R bits, the lowest bits of all its codes first;
    5. **V** in the same form, planes of C bits.

    A code is ``sign << (b - 1) | magnitude``, of the Lloyd-Max levels listed in ``gaussian_levels.py``. The decoder
    computes ``((s_0 u[n,0]) v[0,j] + (s_1 u[n,1]) v[1,j] + ...) * gain`` as that of ``lowrank`` does.

    Args:
        rank: Number of components, 1 to 1024; with ``allocation="energy"`` a quarter of the bits that each row and each
            channel has.
        allocation: ``"equal"`` or ``"energy"``.

    Raises:
        CodecConfigError: An option has a value it does not take.
    """

    codec_id = "lowrank_int4"
    about = About(
        sends="two thin factors in four bits",
        use="the same with four times the rank: better than `lowrank` wherever it was measured",
        source="the same; bits by energy: reverse water-filling (Cover and Thomas, Information Theory, 10.3.3)",
    )
    _default_rank = 32

    def __init__(self, rank: int = 32, allocation: str = "equal") -> None:
        super().__init__(rank)
        self.allocation = check_choice(self.codec_id, "allocation", allocation, ("equal", "energy"))

    def get_config(self) -> dict[str, Any]:
        """Return the options that differ from their defaults."""
        config = super().get_config()
        return config if self.allocation == "equal" else {**config, "allocation": self.allocation}

    @property
    def factor_spec(self) -> FactorSpec | None:
        return FactorSpec(self.rank, MAGNITUDES) if self.allocation == "equal" else None

    def payload_nbytes(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        nbytes, seen = super().payload_nbytes(shape, dtype), matrix_shape(shape)
        return nbytes if self.allocation == "equal" or nbytes == 0 else by_energy.Sizes(seen, self.rank).total_nbytes

    def _encode_weighted(
        self,
        products: list[Products],
        factor: Tensor,
        shape: tuple[int, int, int],
        memory: dict[str, Any] | None,
        weights: Tensor | None,
    ) -> Tensor:
        if self.allocation == "equal":
            return super()._encode_weighted(products, factor, shape, memory, weights)
        return by_energy.encode(products, factor, shape, self.rank, memory, weights)

    def _factors(self, payload: Tensor, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
        if self.allocation == "equal":
            return super()._factors(payload, shape)
        return by_energy.decode(payload, shape, self.rank)

    @staticmethod
    def _quantizer(length: int) -> Int4WithZero:
        return Int4WithZero(length)

    def _factor_nbytes(self, components: int, length: int) -> int:
        return self._quantizer(length).payload_nbytes((components, 1, length), torch.float32)

    def _round(self, factor: Tensor) -> Fitted:
        return fit(factor, MAGNITUDES)

    def _pack(self, parts: list[Fitted], length: int) -> Tensor:
        codes, scale = torch.cat([part.codes for part in parts]), torch.cat([part.scale for part in parts])
        sections = self._quantizer(length).sections_of((len(codes), 1, length))
        data = torch.zeros(sections.total_nbytes, dtype=torch.uint8, device=codes.device)
        packed = kernels.pack_codes(codes.view(-1), sections.bits)
        data[: packed.numel()] = packed
        scale_bytes = kernels.encode_bf16(scale)
        data[sections.channel_scales_at :][: scale_bytes.numel()] = scale_bytes
        return data

    def _decode_factor(self, data: Tensor, components: int, length: int) -> Tensor:
        return self._quantizer(length).decode(data, (components, 1, length), torch.float32)
