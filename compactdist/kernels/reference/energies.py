"""Sums of squares by which a sender judges a frame: of a tensor, of its residual, and of what the frame loses."""

from __future__ import annotations

import torch
from torch import Tensor

from compactdist.kernels.reference.terms import restored
from compactdist.kernels.spec import MovingTerm

__all__ = ["energies"]


def energies(x: Tensor, terms: tuple[MovingTerm, ...], value: Tensor) -> Tensor:
    """See ``kernels.energies``."""
    exact = x.double()  # differences of huge values leave float32
    residual = exact - sum(restored(term).double() for term in terms)
    return torch.stack([one.square().sum() for one in (exact, residual, exact - value.double())])
