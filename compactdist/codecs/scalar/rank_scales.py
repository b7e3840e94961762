"""Scales of rank k for one-bit codes: the magnitudes of a matrix, approximated by a product of two thin ones.

One scale for each row and one for each channel say that the magnitudes are a column times a row. Where they are a sum
of several such products (heads or experts of their own scale, tokens that are loud in some channels only) k of them
say more, for ``16 k (R + C) / (R C)`` bits for each element. CompactFusion has these scales as its "rank k" binary
codec (arXiv 2507.17511 and its public code).

The payload of a tensor seen as ``(G, R, C)`` (``shapes.matrix_shape``) is four sections, each filled up with zeros to a
multiple of 16 bytes, all numbers bfloat16 with the low byte first:

1. **codes**, one bit for each element, as ``sections.py`` says: 1 for values >= 0, else 0;
2. **gains**, G, not negative;
3. **U transposed**, ``(G, k, R)``;
4. **V**, ``(G, k, C)``.

The scale of element ``(g, n, j)`` is ``P * gain`` with ``P = ((U[n,0] V[0,j] + U[n,1] V[1,j]) + ...)`` in float32,
components in ascending order, every product and every sum rounded; a P below ``2**-30``, or negative, counts as zero.
The element decodes to plus or minus that.

k is the wanted rank, cut to ``R C / (16 (R + C))`` rounded down, so that the factors never take more than the one bit
that the signs take. A tensor so thin that this is zero is sent as with ``scales="token_channel"``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compactdist.codecs.lowrank.factors import SMALLEST_FACTOR
from compactdist.codecs.options import check_integer
from compactdist.codecs.shapes import matrix_shape, padded_nbytes
from compactdist.errors import CodecConfigError
from compactdist.kernels import reference as kernels
from compactdist.kernels.sections import Sections

__all__ = ["DEFAULT_RANK", "RankSections", "check_rank", "decode", "encode"]

DEFAULT_RANK = 4

_LARGEST_RANK = 16
_BITS_OF_A_FACTOR = 16
_SPARE_DIRECTIONS = 4
_ITERATIONS = 2
_SEED = 0x5EED
_SMALLEST_GAIN = 2.0**-87
_SMALLEST_SUM = 2.0**-30


@dataclass(frozen=True)
class RankSections(Sections):
    """Sizes and offsets, in bytes, of one payload.

    Attributes:
        rank: k, components of the scales; at least 1.
    """

    rank: int = 1

    @classmethod
    def of_rank(cls, shape: Sequence[int], rank: int) -> RankSections | None:
        """Return the sections of a tensor of this shape, or ``None`` if it is too thin for a single component."""
        groups, rows, channels = matrix_shape(shape)
        rank = min(rank, rows * channels // (_BITS_OF_A_FACTOR * max(1, rows + channels)))
        return cls(groups, rows, channels, bits=1, rank=rank) if rank and groups else None

    @property
    def gains_at(self) -> int:
        """Offset of the gains."""
        return padded_nbytes(self.codes_nbytes)

    @property
    def u_at(self) -> int:
        """Offset of U transposed."""
        return self.gains_at + padded_nbytes(2 * self.groups)

    @property
    def v_at(self) -> int:
        """Offset of V."""
        return self.u_at + padded_nbytes(2 * self.groups * self.rank * self.rows)

    @property
    def total_nbytes(self) -> int:
        """Length of the payload."""
        return self.v_at + padded_nbytes(2 * self.groups * self.rank * self.channels)


def check_rank(codec_id: str, scales: str, rank: int) -> int:
    """Return ``rank`` if these options go together.

    Raises:
        CodecConfigError: ``rank`` is not an integer from 1 to 16, or ``scales`` leaves it without effect.
    """
    check_integer(codec_id, "rank", rank, 1, _LARGEST_RANK)
    if scales != "rank" and rank != DEFAULT_RANK:
        raise CodecConfigError(f"codec {codec_id!r}: rank={rank} needs scales='rank'")
    return rank


def encode(values: Tensor, magnitude: Tensor, amax: Tensor, sections: RankSections) -> Tensor:
    """Encode one sign for each element, and the scales.

    U spans the strongest left directions of the magnitudes, by subspace iteration from the constant direction, which
    is never far from the strongest one of a non-negative matrix, and random ones of the codec's own seed. V is the
    least-squares V for the rounded U. With S the scales that rounded U and V give, the gain is ``<m, S> / <S, S>``:
    the error energy is then ``sum(m ** 2) - <m, S> ** 2 / <S, S>``, never above the energy of the input.

    Args:
        values: float32 ``(G, R, C)``, finite.
        magnitude: Absolute values of ``values``, in memory of their own; overwritten.
        amax: float32 ``(G, 1, 1)``, the largest magnitude of each group.
        sections: Sections for the original shape.
    """
    factor = kernels.power_of_two_near_inverse(amax)
    magnitude.mul_(factor)
    generator = torch.Generator().manual_seed(_SEED)
    count = min(sections.rank + _SPARE_DIRECTIONS, sections.rows, sections.channels)
    start = torch.randn(sections.channels, count, generator=generator, dtype=torch.float32, device="cpu")
    start[:, 0] = 1
    start = start.to(values.device)
    u_parts, v_parts, gains = [], [], []
    for m in magnitude:  # group by group: a batched product may round otherwise than a single one
        u = kernels.round_signed_bf16(_strongest_left(m, start, sections.rank), SMALLEST_FACTOR)
        v = kernels.round_signed_bf16(_least_squares_right(m, u), SMALLEST_FACTOR)
        s = _sums(u.unsqueeze(0), v.unsqueeze(0))[0]
        gains.append(kernels.divide_or_zero((m * s).sum(), (s * s).sum()))
        u_parts.append(u)
        v_parts.append(v)
    gain = kernels.round_bf16(torch.stack(gains)) / factor.view(-1)
    gain = torch.where(gain < _SMALLEST_GAIN, torch.zeros_like(gain), gain)
    payload = torch.zeros(sections.total_nbytes, dtype=torch.uint8, device=values.device)
    payload[: sections.codes_nbytes] = kernels.pack_codes((values >= 0).view(-1).to(torch.uint8), 1)
    payload[sections.gains_at :][: 2 * sections.groups] = kernels.encode_bf16(gain)
    for at, parts in ((sections.u_at, u_parts), (sections.v_at, v_parts)):
        data = kernels.encode_signed_bf16(torch.stack(parts))
        payload[at:][: data.numel()] = data
    return payload


def decode(payload: Tensor, sections: RankSections) -> Tensor:
    """Decode to float32 ``(G, R, C)``."""
    groups, rank, rows, channels = sections.groups, sections.rank, sections.rows, sections.channels
    gain = kernels.decode_bf16(payload[sections.gains_at :][: 2 * groups]).view(groups, 1, 1)
    u = kernels.decode_bf16(payload[sections.u_at :][: 2 * groups * rank * rows]).view(groups, rank, rows)
    v = kernels.decode_bf16(payload[sections.v_at :][: 2 * groups * rank * channels]).view(groups, rank, channels)
    signs = kernels.unpack_levels(payload[: sections.codes_nbytes], (-1.0, 1.0), 1, sections.elements)
    return _sums(u, v).mul_(gain).mul_(signs.view(groups, rows, channels))


def _sums(u: Tensor, v: Tensor) -> Tensor:
    """P of all elements, ``(G, R, C)``, from U transposed ``(G, k, R)`` and V ``(G, k, C)``."""
    total = u[:, 0].unsqueeze(2) * v[:, 0].unsqueeze(1)
    for component in range(1, u.shape[1]):
        total += u[:, component].unsqueeze(2) * v[:, component].unsqueeze(1)
    # the gain could make what cancellation left over subnormal, and machines differ in subnormal numbers
    return torch.where(total < _SMALLEST_SUM, torch.zeros_like(total), total)


def _strongest_left(m: Tensor, start: Tensor, rank: int) -> Tensor:
    """An orthonormal U transposed ``(rank, R)``, exactly zero where a row of ``m`` is.

    Subspace iteration with spare directions (N. Halko, P. G. Martinsson, J. A. Tropp, SIAM Review 53, 2011,
    algorithm 4.4).
    """
    right = torch.linalg.qr(start)[0]
    for _ in range(_ITERATIONS):
        right = torch.linalg.qr(m.T @ (m @ right))[0]
    left = torch.linalg.qr(m @ right)[0]
    thin = left.T @ m
    turn = torch.linalg.eigh(thin @ thin.T)[1].flip(1)[:, :rank]
    u = left @ turn
    return torch.where(m.any(1, keepdim=True), u, torch.zeros_like(u)).T.contiguous()


def _least_squares_right(m: Tensor, u: Tensor) -> Tensor:
    """The V ``(rank, C)`` of least error for the rounded U, exactly zero where a column of ``m`` is."""
    gram = u @ u.T
    # a component that was rounded to nothing takes no part; the ridge keeps the rest solvable
    ridge = torch.eye(gram.shape[0], dtype=torch.float32, device=m.device) * (gram.diagonal().amax() * 1e-6 + 1e-30)
    v = torch.linalg.solve(gram + ridge, u @ m)
    return torch.where(m.any(0, keepdim=True), v, torch.zeros_like(v))
