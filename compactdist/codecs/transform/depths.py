"""How many bits each component gets.

A component that gets b bits loses the share ``LevelSet.losses[b]`` of its energy, as a Gaussian does. Reverse
water-filling (T. Cover, J. Thomas, "Elements of Information Theory", section 10.3) with these losses gives the next bit
to whatever component loses most by not having it. Both ends compute it from the sent energies in integers, so nothing
is sent that says who got how many bits.
"""

from __future__ import annotations

import math
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

from compactdist.codecs.transform.levels import LevelSet

__all__ = ["PER_OCTAVE", "allocate", "most_of", "worth_of"]

PER_OCTAVE = 8
"""Steps of an energy code to a factor of two in amplitude."""


@cache
def _worth(levels: LevelSet) -> list[int]:
    """What the next bit of a component with 0, 1, ... bits is worth, in steps of an energy code; falling."""
    return [round(PER_OCTAVE * math.log2(less - more) / 2) for less, more in pairwise(levels.losses)]


@cache
def worth_of(levels: LevelSet, device: torch.device) -> Tensor:
    """What the next bit is worth, over the least, int64 ``(levels.deepest,)``."""
    worth = _worth(levels)
    with torch.inference_mode(False):
        return torch.tensor([one - min(worth) for one in worth], dtype=torch.int64, device=device)


@cache
def most_of(levels: LevelSet) -> int:
    """Codes and what a bit is worth add up to less."""
    return 256 + max(_worth(levels)) - min(_worth(levels))


def allocate(codes: Tensor, planes: int, levels: LevelSet) -> Tensor:
    """Bits of each component. The host reads nothing.

    Args:
        codes: energy codes, uint8 ``(..., K)``.
        planes: bits to give away in each row of them, at most ``levels.deepest * K``. Of equal claims the component
            that comes first has the right.
        levels: that components are rounded to.

    Returns:
        int64 ``(..., K)``, 0 to ``levels.deepest``, each row's sum ``planes``.
    """
    worth, most = worth_of(levels, codes.device), most_of(levels)
    claims = (codes.long()[..., None] + worth).flatten(-2)
    counts = claims.new_zeros(*claims.shape[:-1], most).scatter_add_(-1, claims, torch.ones_like(claims))
    at_least = counts.flip(-1).cumsum(-1).flip(-1)
    # the lowest level of claims that is served whole lies just above the one that is served in part
    border = (at_least > planes).sum(-1, keepdim=True) - 1
    above, at = claims > border, claims == border
    left = planes - above.sum(-1, keepdim=True)
    served = above | (at & (at.long().cumsum(-1) <= left))
    return served.view(*codes.shape, levels.deepest).sum(-1)
