"""The orthonormal basis of each block of channels, learnt from what both ends hold.

A basis begins with the eigenvectors of the covariance of the first prediction (the decoded keyframe): the channels of a
change are correlated as those of the signal are. After each frame the covariance follows what was decoded, and one
Jacobi sweep turns the basis after it. The covariance is kept in the basis' own coordinates, so a sweep makes it nearly
diagonal and no product with the basis is needed. Its diagonal is known well, as the energies that are sent are the
residual's own; the rest is the correlation of the decoded levels, an exact sum of integers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from compactdist.codecs.transform.products import gram
from compactdist.kernels import rotate
from compactdist.kernels.reference.rotations import root

__all__ = ["Basis", "first_basis", "followed", "plain_basis"]

_FIRST_SWEEPS = 4
_SHARE = 0.5
"""Of the newest frame in the covariance."""


_SMALLEST = 2.0**-100
"""Predictions that are smaller count as zero: machines differ in subnormal numbers."""


class Basis(NamedTuple):
    """Of the ``M`` blocks of ``n`` channels of each of ``G`` groups.

    Attributes:
        rows: float32 ``(G, M, n, n)``: the components, each a row of channels.
        covariance: float32 ``(G, M, n, n)``, in these components, relative to the largest energy.
    """

    rows: Tensor
    covariance: Tensor


def plain_basis(blocks: tuple[int, int], n: int, device: torch.device) -> Basis:
    """The channels themselves, with a covariance of zero, for groups and blocks."""
    return Basis(torch.eye(n, device=device).repeat(*blocks, 1, 1), torch.zeros(*blocks, n, n, device=device))


def first_basis(prediction: Tensor) -> Basis:
    """The basis that fits ``prediction``, float32 ``(G, M, R, n)``, finite."""
    largest = prediction.abs().amax((-2, -1), keepdim=True)
    whole = torch.round(prediction / torch.where(largest > _SMALLEST, largest / 127, torch.ones_like(largest)))
    covariance = gram(whole.mT)
    most = covariance.diagonal(0, -2, -1).amax(-1).clamp(min=1)[..., None, None]
    plain = plain_basis((prediction.shape[0], prediction.shape[1]), prediction.shape[3], prediction.device)
    basis = Basis(plain.rows, covariance / most)
    for _ in range(_FIRST_SWEEPS):
        basis = _swept(basis)
    return basis


def followed(basis: Basis, levels: Tensor, amplitudes: Tensor) -> Basis:
    """The basis after a frame.

    Args:
        basis: that coded the frame.
        levels: whole numbers -127 to 127, float32 ``(G, M, n, R)``, what was decoded of each component.
        amplitudes: of the components, float32 ``(G, M, n)``, relative to the largest.
    """
    sums = gram(levels)
    norms = root(sums.diagonal(0, -2, -1))
    seen = norms > 0
    norms = torch.where(seen, norms, torch.ones_like(norms))
    scaled = amplitudes / norms
    observed = (sums * scaled[..., :, None]) * scaled[..., None, :]
    energies = torch.diag_embed(amplitudes * amplitudes)
    diagonal = torch.eye(sums.shape[-1], dtype=torch.bool, device=sums.device)
    observed = torch.where(diagonal, energies, observed)
    known = (seen[..., :, None] & seen[..., None, :]) | diagonal
    mixed = (1 - _SHARE) * basis.covariance + _SHARE * observed
    return _swept(Basis(basis.rows, torch.where(known, mixed, basis.covariance)))


def _swept(basis: Basis) -> Basis:
    covariance, rows = rotate(basis.covariance.flatten(0, 1), basis.rows.flatten(0, 1))
    return Basis(rows.view_as(basis.rows), covariance.view_as(basis.rows))
