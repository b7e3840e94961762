"""How many bits each component gets, and the levels of each depth.

A component that gets b bits loses the mean square error ``LOSS[b]`` of its energy, as a Gaussian does with Lloyd-Max
levels. Reverse water-filling (T. Cover, J. Thomas, "Elements of Information Theory", section 10.3) with these losses
gives the next bit to whatever component loses most by not having it. Both ends compute it from the sent energies in
integers, so nothing is sent that says who got how many bits.
"""

from __future__ import annotations

import math
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

from compactdist.codecs.scalar.gaussian_levels import LOSS, MAGNITUDES
from compactdist.codecs.transform import trellis

__all__ = ["DEEPEST", "PER_OCTAVE", "allocate", "borders", "outermost", "levels"]

DEEPEST = 8
"""Most bits of a component."""

PER_OCTAVE = 8
"""Steps of an energy code to a factor of two in amplitude."""

_REACH = {7: 4.4, 8: 4.8}
"""Outermost level of the uniform grids, in standard deviations."""


@cache
def _magnitudes(depth: int) -> tuple[float, ...]:
    """Positive levels for a unit Gaussian, ascending."""
    if depth in MAGNITUDES:
        return MAGNITUDES[depth]
    count = 1 << (depth - 1)
    return tuple(_REACH[depth] * (2 * i + 1) / (2 * count - 1) for i in range(count))


def outermost(depth: int) -> float:
    """The outermost level, in standard deviations: what the level 127 stands for; 0 for no bits."""
    return _magnitudes(depth)[-1] if depth else 0.0


@cache
def levels(depth: int) -> tuple[int, ...]:
    """The level of each code, ``2**depth`` of them, ascending: -127 to 127."""
    return trellis.whole(_magnitudes(depth))


@cache
def borders(depth: int) -> tuple[float, ...]:
    """Ascending borders between codes, in standard deviations."""
    all_levels = [-one for one in reversed(_magnitudes(depth))] + list(_magnitudes(depth))
    return tuple((a + b) / 2 for a, b in pairwise(all_levels))


@cache
def _worth(on_trellis: bool = False) -> list[int]:
    """What the next bit of a component with 0, 1, ... bits is worth, in steps of an energy code; falling."""
    loss = trellis.LOSS if on_trellis else {**LOSS, 7: LOSS[6] / 4, 8: LOSS[6] / 16}
    return [round(PER_OCTAVE * math.log2(loss[b] - loss[b + 1]) / 2) for b in range(len(loss) - 1)]


@cache
def _worth_on(device: torch.device, on_trellis: bool) -> Tensor:
    """The same, above the least, int64 ``(8,)``, on a trellis ``(7,)``."""
    worth = _worth(on_trellis)
    with torch.inference_mode(False):
        return torch.tensor([one - min(worth) for one in worth], dtype=torch.int64, device=device)


def allocate(codes: Tensor, planes: int, on_trellis: bool = False) -> Tensor:
    """Bits of each component. The host reads nothing.

    Args:
        codes: energy codes, uint8 ``(..., K)``.
        planes: bits to give away in each row of them, at most ``8 K``, on a trellis ``7 K``. Of equal claims the
            component that comes first has the right.
        on_trellis: levels are those of ``trellis.py``.

    Returns:
        int64 ``(..., K)``, 0 to 8, each row's sum ``planes``.
    """
    values = _worth(on_trellis)
    worth, most = _worth_on(codes.device, on_trellis), 256 + max(values) - min(values)
    claims = (codes.long()[..., None] + worth).flatten(-2)
    counts = claims.new_zeros(*claims.shape[:-1], most).scatter_add_(-1, claims, torch.ones_like(claims))
    at_least = counts.flip(-1).cumsum(-1).flip(-1)
    # the lowest level of claims that is served whole lies just above the one that is served in part
    border = (at_least > planes).sum(-1, keepdim=True) - 1
    above, at = claims > border, claims == border
    left = planes - above.sum(-1, keepdim=True)
    served = above | (at & (at.long().cumsum(-1) <= left))
    return served.view(*codes.shape, len(values)).sum(-1)
