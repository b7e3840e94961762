"""One element of every run of m: which it is, and where it goes.

Elements are seen as ``(G, N)``; each group is filled up with zeros to K runs of m. The element of largest magnitude is
kept, of equal ones the first, so the places do not depend on who looks for them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compactdist.kernels.reference.codes import pack_codes, unpack_codes

__all__ = ["in_runs", "pick", "spread"]


def in_runs(values: Tensor, m: int) -> Tensor:
    """Float32 ``(G, N)`` as ``(G, K, m)``."""
    groups, length = values.shape
    missing = -length % m
    if missing:
        values = torch.cat([values, values.new_zeros(groups, missing)], 1)
    return values.view(groups, -1, m)


def pick(runs: Tensor) -> tuple[Tensor, Tensor]:
    """Places of the kept elements of ``(G, K, m)``, finite: 4 bits each, packed; and the elements, ``(G, K)``."""
    place = runs.abs().argmax(2, keepdim=True)
    return pack_codes(place.to(torch.uint8).view(-1), 4), runs.gather(2, place).squeeze(2)


def spread(places: Tensor, kept: Tensor, m: int) -> Tensor:
    """Undo ``pick``: float32 ``(G, K * m)``, zero where nothing was kept; a place from m on keeps nothing."""
    groups, count = kept.shape
    place = unpack_codes(places, 4, kept.numel())
    # A comparison and not a scatter: a place that no encoder sends must not write outside its run.
    here = place.view(groups, count, 1) == torch.arange(m, dtype=torch.uint8, device=kept.device)
    nothing = torch.zeros((), dtype=torch.float32, device=kept.device)
    return torch.where(here, kept.unsqueeze(2), nothing).view(groups, -1)
