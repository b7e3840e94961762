"""The orthonormal basis of each block of channels, learnt from what both ends hold.

A basis begins with the eigenvectors of the covariance of the first prediction (the decoded keyframe): the channels of a
change are correlated as those of the signal are. After each frame the covariance follows what was decoded, and one
Jacobi sweep turns the basis after it. The covariance is taken in the basis' own coordinates, where no product with the
basis is needed. Its diagonal is known well, as the energies that are sent are the residual's own; the rest is the
correlation of the decoded levels, an exact sum of integers. After a sweep little is left beside the diagonal, so
nothing else of the covariance is kept. Components that got no bits say nothing, and are not turned.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from compactdist.codecs.transform.coding import Spread
from compactdist.codecs.transform.products import gram
from compactdist.kernels import rotate
from compactdist.kernels.reference.rotations import root

__all__ = [
    "ANGLE",
    "SHARE",
    "SMALLEST_SWEEP",
    "Basis",
    "first_basis",
    "followed",
    "memory_nbytes",
    "plain_basis",
    "rows_of",
]

_FIRST_SWEEPS, _FIRST_ANGLE = 4, 1e-6
ANGLE = 1e-4
"""Squared correlations that are smaller are left alone: rows as few as these show more where there is none."""

SHARE = 0.5
"""Of the newest frame in the covariance."""

_ONE = 32767
"""What an element of 1 is held as."""

SMALLEST_SWEEP = 4
"""Components: kernels take no fewer. Zeros make up the number, and stay zeros."""

_SMALLEST = 2.0**-100
"""Predictions that are smaller count as zero: machines differ in subnormal numbers."""


class Basis(NamedTuple):
    """Of the ``M`` blocks of ``n`` channels of each of ``G`` groups.

    Attributes:
        rows: int16 ``(G, M, n, n)``: the components, each a row of channels, times 32767.
        energies: float32 ``(G, M, n)``, of these components, relative to the largest.
    """

    rows: Tensor
    energies: Tensor


def rows_of(held: Tensor) -> Tensor:
    """Rows of a basis in float32, 1 / 32768 shorter than they were: that is exact everywhere."""
    return held.float() * 2.0**-15


def memory_nbytes(groups: int, blocks: int, n: int) -> int:
    """Of a basis."""
    return groups * blocks * n * (2 * n + 4)


def plain_basis(blocks: tuple[int, int], n: int, device: torch.device) -> Basis:
    """The channels themselves, with energies of zero, for groups and blocks."""
    rows = torch.eye(n, dtype=torch.float32, device=device).mul_(_ONE).to(torch.int16)
    return Basis(rows.repeat(*blocks, 1, 1), torch.zeros(*blocks, n, dtype=torch.float32, device=device))


def first_basis(prediction: Tensor) -> Basis:
    """The basis that fits ``prediction``, float32 ``(G, M, R, n)``, finite."""
    groups, blocks, _, n = prediction.shape
    largest = prediction.abs().amax((-2, -1), keepdim=True)
    step = largest / torch.full_like(largest, 127)  # CUDA takes the inverse of a number, and rounds twice
    whole = torch.round(prediction / torch.where(largest > _SMALLEST, step, torch.ones_like(largest)))
    covariance = gram(whole.mT)
    most = covariance.diagonal(0, -2, -1).amax(-1).clamp(min=1)[..., None, None]
    matrices = (covariance / most).flatten(0, 1)
    rows = torch.eye(n, dtype=torch.float32, device=prediction.device).repeat(groups * blocks, 1, 1)
    for _ in range(_FIRST_SWEEPS):
        matrices, rows = rotate(matrices, rows, [n] * len(matrices), _FIRST_ANGLE)
    energies = matrices.diagonal(0, 1, 2).contiguous()
    return Basis(_held(rows).view(groups, blocks, n, n), energies.view(groups, blocks, n))


def followed(rows: Tensor, energies: Tensor, spread: Spread, evidence: Tensor) -> tuple[Tensor, Tensor]:
    """The basis of a group after a frame, new tensors.

    Args:
        rows: of the basis that coded the frame, int16 ``(M, n, n)``.
        energies: of that basis, float32 ``(M, n)``.
        spread: what the frame said of the components.
        evidence: int8 ``(S, R')``, -127 to 127, what was decoded of those that got bits.
    """
    blocks, n = energies.shape
    sizes = [max(SMALLEST_SWEEP, count + count % 2) for count in spread.counts]
    most, counts = max(sizes), torch.tensor(spread.counts, dtype=torch.int64, device=rows.device)
    # the chosen components of each block, one after another, and where that place is among those of all blocks
    first = counts.cumsum(0) - counts
    at = spread.block * most + torch.arange(len(spread.block), device=rows.device) - first[spread.block]
    places = spread.chosen.places
    sums = torch.zeros(blocks, most, most, dtype=torch.float32, device=rows.device)
    for one, some in zip(sums, evidence.split(spread.counts), strict=True):
        one[: len(some), : len(some)] = gram(some.float())

    amplitudes = spread.amplitudes
    energies = (1 - SHARE) * energies.reshape(-1) + SHARE * (amplitudes * amplitudes)
    norms = root(sums.diagonal(0, 1, 2))
    scaled = _spread_out(amplitudes[places], at, norms) / torch.where(norms > 0, norms, torch.ones_like(norms))
    matrices = SHARE * ((sums * scaled[:, :, None]) * scaled[:, None, :])
    matrices.diagonal(0, 1, 2).copy_(_spread_out(energies[places], at, norms))
    turned = rows.new_zeros(blocks * most, n, dtype=torch.float32)
    turned[at] = rows.reshape(-1, n)[places].float()
    matrices, turned = rotate(matrices, turned.view(blocks, most, n), sizes, ANGLE)
    energies[places] = matrices.diagonal(0, 1, 2).reshape(-1)[at]
    rows = rows.reshape(-1, n).clone()
    rows[places] = turned.reshape(-1, n)[at].round_().clamp_(-_ONE, _ONE).to(torch.int16)
    return rows.view(blocks, n, n), energies.view(blocks, n)


def _spread_out(values: Tensor, at: Tensor, like: Tensor) -> Tensor:
    """Zeros as ``like``, with values at some places."""
    out = torch.zeros_like(like)
    out.view(-1)[at] = values
    return out


def _held(rows: Tensor) -> Tensor:
    return (rows * _ONE).round_().clamp_(-_ONE, _ONE).to(torch.int16)
