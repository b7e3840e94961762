"""``lowrank_int4`` with ``allocation="energy"``: as many bits as four for each component, given where they help most.

Reverse water-filling (C. E. Shannon 1959; T. M. Cover and J. A. Thomas, "Elements of Information Theory", 10.3.3): with
b bits for each element of both factors, a component of energy e is left with the error ``e * (1 - (1 - d_b)^2)``, where
d_b is the loss of the Lloyd-Max levels of b bits. Each further bit lowers this error by less than the one before, so
the best allocation takes the largest reductions among all components.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from compactdist.codecs.lowrank.factors import fit
from compactdist.codecs.lowrank.products import Products
from compactdist.codecs.lowrank.subspace import Starts, evened, left_directions
from compactdist.codecs.scalar.gaussian_levels import LOSS, MAGNITUDES
from compactdist.codecs.shapes import padded_nbytes
from compactdist.errors import PayloadError
from compactdist.kernels import reference as kernels

MOST_BITS = 6
_PLANES_PER_RANK = 4
_CANDIDATES_PER_RANK = 2
_SMALLEST_SCALE = 2.0**-60


class Sizes:
    """Sizes and offsets of a payload's sections.

    Attributes:
        candidates: n, the number of components that may get bits.
        planes: Bits that all components together have for each row, and for each channel.
        counts_at, scales_at, u_at, v_at, total_nbytes: Offsets in bytes, and the length.
    """

    def __init__(self, shape: tuple[int, int, int], rank: int) -> None:
        groups, rows, channels = shape
        rank = min(rank, rows, channels)
        self.candidates = min(_CANDIDATES_PER_RANK * rank, rows, channels)
        self.planes = _PLANES_PER_RANK * rank
        self.counts_at = padded_nbytes(2 * groups)
        self.scales_at = self.counts_at + padded_nbytes(2 * MOST_BITS * groups)
        self.u_at = self.scales_at + padded_nbytes(2 * groups * self.candidates)
        self.v_at = self.u_at + padded_nbytes(-(-groups * self.planes * rows // 8))
        self.total_nbytes = self.v_at + padded_nbytes(-(-groups * self.planes * channels // 8))


def allocate(energies: Tensor, planes: int) -> Tensor:
    """Share out ``planes`` bits among components of these energies ``(n,)``: int64 ``(n,)``, 0 to 6 each."""
    left = [1 - (1 - LOSS[bits]) ** 2 for bits in range(MOST_BITS + 1)]
    steps = torch.tensor(
        [before - after for before, after in pairwise(left)], dtype=torch.float32, device=energies.device
    )
    best = (energies[:, None] * steps).reshape(-1).topk(planes).indices
    return torch.bincount(best // MOST_BITS, minlength=energies.numel())


def encode(
    products: list[Products],
    factor: Tensor,
    shape: tuple[int, int, int],
    rank: int,
    memory: dict[str, Any] | None,
    weights: Tensor | None,
) -> Tensor:
    """Encode matrices of ``shape``, one of ``products`` for each group.

    Args:
        products: the matrices, scaled by ``factor``.
        factor: powers of two ``(G,)``.
        shape: ``(groups, rows, channels)``.
        rank: a quarter of the bits for each row and channel.
        memory: memory of the stream, see :class:`Starts`; ``None`` for a call that stands alone.
        weights: checked row weights, float32 ``(G, R)``, or ``None``.

    Returns:
        The payload, 1-D uint8.
    """
    sizes = Sizes(shape, rank)
    groups, n = shape[0], sizes.candidates
    payload = torch.zeros(sizes.total_nbytes, dtype=torch.uint8, device=factor.device)
    starts = Starts(memory, shape, n - n // 4, factor.device, at_least=n)
    counts, scales, planes = [], [], ([], [])  # type: ignore[var-annotated]
    for g, one in enumerate(products):
        w = None if weights is None else weights[g]
        seen = replace(one, weights=w)
        start, rounds = starts.of_group(g), starts.rounds
        while True:
            found = left_directions(seen, start, rounds)
            along = seen.with_columns(found)
            if not starts.disappoint(g, along, one.norm):
                break
            start, rounds = evened(along), 1
        bits, order = allocate(along[:n].square().sum(1), sizes.planes).sort(descending=True, stable=True)
        widths = bits.tolist()
        counts.append([widths.count(width) for width in range(MOST_BITS, 0, -1)])
        best = found[:n][order]
        u, u_planes = _levels(best if w is None else best / w, widths)
        towards = one.with_columns(u)
        if w is None:
            v = _least_squares(u @ u.T, towards)
        else:
            v = _least_squares((u * w) @ (u * w).T, seen.with_columns(u * w))
        v, v_planes = _levels(v, widths)
        scales.append(_scales(one, u, v, towards))
        planes[0].append(u_planes)
        planes[1].append(v_planes)
    payload[: 2 * groups] = kernels.encode_bf16(1 / factor)
    numbers = torch.tensor(counts, dtype=torch.int32, device=factor.device).view(-1)
    payload[sizes.counts_at :][: 2 * numbers.numel()] = torch.stack([numbers & 0xFF, numbers >> 8], 1).view(-1)
    payload[sizes.scales_at :][: 2 * groups * n] = kernels.encode_bf16(torch.cat(scales))
    for at, parts in ((sizes.u_at, planes[0]), (sizes.v_at, planes[1])):
        packed = kernels.pack_codes(torch.cat(parts).view(-1), 1)
        payload[at:][: packed.numel()] = packed
    starts.remember()
    return payload


def decode(payload: Tensor, shape: tuple[int, int, int], rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scaled U^T ``(G, n, R)``, V ``(G, n, C)`` and gains ``(G, 1, 1)`` of a payload of the right length.

    Raises:
        PayloadError: The numbers of components do not add up to the bits there are.
    """
    groups, rows, channels = shape
    sizes = Sizes(shape, rank)
    n = sizes.candidates
    pairs = payload[sizes.counts_at :][: 2 * MOST_BITS * groups].view(-1, 2).to(torch.int32)
    counts = (pairs[:, 0] | (pairs[:, 1] << 8)).view(groups, MOST_BITS).tolist()
    scales = kernels.decode_bf16(payload[sizes.scales_at :][: 2 * groups * n]).view(groups, n, 1)
    factors = []
    for at, length in ((sizes.u_at, rows), (sizes.v_at, channels)):
        bits = kernels.unpack_codes(payload[at:], 1, groups * sizes.planes * length)
        planes = bits.view(groups, sizes.planes, length)
        factors.append(torch.stack([_from_planes(planes[g], counts[g], n) for g in range(groups)]))
    gain = kernels.decode_bf16(payload[: 2 * groups]).view(groups, 1, 1)
    return scales * factors[0], factors[1], gain


def _levels(factor: Tensor, widths: list[int]) -> tuple[Tensor, Tensor]:
    """Nearest levels of each row, unscaled, ``(n, L)``, and their bit planes ``(sum of widths, L)``."""
    levels, planes, at = torch.zeros_like(factor), [], 0
    for width in range(MOST_BITS, 0, -1):
        count = widths.count(width)
        if count:
            codes = fit(factor[at : at + count].contiguous(), MAGNITUDES[width]).codes
            levels[at : at + count] = _table(width, factor.device)[codes.to(torch.int32)]
            shifts = torch.arange(width, dtype=torch.uint8, device=factor.device).view(1, width, 1)
            planes.append(((codes.unsqueeze(1) >> shifts) & 1).reshape(count * width, -1))
        at += count
    return levels, torch.cat(planes)


def _from_planes(planes: Tensor, counts: list[int], n: int) -> Tensor:
    """Undo ``_levels``: ``(n, L)``."""
    widths = range(MOST_BITS, 0, -1)
    used = sum(count * width for count, width in zip(counts, widths, strict=True))
    if used != planes.shape[0] or sum(counts) > n:
        raise PayloadError(
            f"codec 'lowrank_int4': {counts} components of 6 to 1 bits take {used} bit planes of {planes.shape[0]} "
            f"and {sum(counts)} places of {n}: the payload was damaged, or is of another shape"
        )
    rows, at = [], 0
    for count, width in zip(counts, widths, strict=True):
        bits = planes[at : at + count * width].view(count, width, planes.shape[1])
        codes = sum((bits[:, j].to(torch.int32) << j for j in range(width)), bits.new_zeros((), dtype=torch.int32))
        rows.append(_table(width, planes.device)[codes] if count else bits.new_zeros(bits[:, 0].shape).float())
        at += count * width
    rows.append(torch.zeros(n - sum(counts), planes.shape[1], dtype=torch.float32, device=planes.device))
    return torch.cat(rows)


def _table(width: int, device: torch.device) -> Tensor:
    positive = MAGNITUDES[width]
    return torch.tensor(positive + tuple(-level for level in positive), dtype=torch.float32, device=device)


def _least_squares(gram: Tensor, towards: Tensor) -> Tensor:
    ridge = torch.where(gram.diagonal() > 0, gram.diagonal() * 1e-6, torch.ones_like(gram.diagonal()))
    inverse: Tensor = torch.linalg.inv(gram + ridge.diag())
    return inverse @ towards


def _scales(products: Products, u: Tensor, v: Tensor, towards: Tensor) -> Tensor:
    """The bfloat16 scales ``(n,)`` of least error for the chosen levels, none negative.

    A least-squares fit of all components together gives the scales; negative ones become zero, and all others are
    multiplied by one gain, fitted as with ``allocation="equal"``. If these scales would not lower the error, all are
    zero.
    """
    v_gram = v @ v.T
    h = (v * towards).sum(1)
    both = (u @ u.T) * v_gram
    scales = _least_squares(both, h.view(-1, 1)).view(-1).clamp(min=0)
    energy = (scales @ both @ scales).clamp(min=0)
    scaled = scales[:, None] * u
    agreement = scales @ h - products.doubt(scaled, v, v_gram, energy, scales[:, None] * towards)
    scales = scales * kernels.divide_or_zero(agreement.clamp(min=0), energy)
    scales = kernels.round_bf16(torch.where(scales < _SMALLEST_SCALE, torch.zeros_like(scales), scales))
    # scales are rounded one by one, and components are not quite orthogonal: check that the error still falls
    gained = 2 * (scales @ h) - scales @ both @ scales
    return torch.where(gained > 0, scales, torch.zeros_like(scales))
