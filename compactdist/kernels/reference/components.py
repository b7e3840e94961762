"""What the transform codec does with single elements: levels and planes of bits, and scaled products put out.

*Chosen* components are those that get bits, in ascending order. Planes lie in a payload the deepest components first;
where each begins, they are told.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["STRIDE", "Chosen", "choose", "read", "weigh"]

STRIDE = 256
"""float32 between the borders of a depth, in a table of all depths, and its levels."""


class Chosen(NamedTuple):
    """The components that get bits.

    Attributes:
        places: which they are, int64 ``(S,)``, ascending.
        depths: bits of each, 1 to 8, int64 ``(S,)``.
        planes: the first plane of each, int64 ``(S,)``.
        steps: float32 ``(9, 2, STRIDE)``: of each depth, the borders between codes in standard deviations, ascending;
            the first level, -127 but for none, and what each border adds. Of depth 0, ones.
    """

    places: Tensor
    depths: Tensor
    planes: Tensor
    steps: Tensor

    def classes(self) -> list[tuple[int, Tensor]]:
        """Each depth that occurs, and which of the chosen have it."""
        return [(d, (self.depths == d).nonzero().view(-1)) for d in sorted(set(self.depths.tolist()))]


def choose(
    turned: Tensor, chosen: Chosen, inverses: Tensor, rows: Tensor, planes: Tensor, out: Tensor
) -> tuple[Tensor, Tensor]:
    """Write the planes and the levels of chosen components.

    Args:
        turned: all components, float32 or bfloat16 ``(K, R)``.
        chosen: which of them get bits.
        inverses: what makes standard deviations of a chosen component of a row of scale 1, float32 ``(S,)``.
        rows: their scales, float32 ``(R,)``; zero where there is nothing.
        planes: uint8 ``(planes, ceil(R / 8))``: row r of a plane is bit ``r % 8``.
        out: receives the levels, -127 to 127, int8 ``(S, R)``.

    Returns:
        Of levels times scales, for each chosen component: sums of squares, and of products with the component.
    """
    of_row = torch.where(rows > 0, 1 / rows, torch.zeros_like(rows))
    for depth, which in chosen.classes():
        some = turned[chosen.places[which]].float()
        if depth == 1:  # of a sign no scale matters
            codes = (some >= 0).to(torch.uint8)
        else:
            borders = chosen.steps[depth, 0, : 2**depth - 1].contiguous()
            deviations = (some * inverses[which][:, None]) * of_row
            codes = torch.bucketize(deviations, borders, right=True, out_int32=True).to(torch.uint8)
        out[which] = _levels(codes, chosen.steps, depth)
        for bit in range(depth):
            planes[chosen.planes[which] + bit] = _packed((codes >> bit) & 1)
    scaled = out * rows
    return (scaled * scaled).sum(1), (scaled * turned[chosen.places].float()).sum(1)


def read(planes: Tensor, chosen: Chosen, out: Tensor) -> None:
    """Write the levels of chosen components, as :func:`choose` did, from their planes."""
    for depth, which in chosen.classes():
        codes = torch.zeros(which.numel(), out.shape[1], dtype=torch.uint8, device=out.device)
        for bit in range(depth):
            codes |= _unpacked(planes[chosen.planes[which] + bit])[:, : out.shape[1]] << bit
        out[which] = _levels(codes, chosen.steps, depth)


def weigh(turned: Tensor, places: Tensor, weights: Tensor) -> Tensor:
    """Of each row, the sum of the squares of some components times their weights.

    Args:
        turned: all components, float32 or bfloat16 ``(K, R)``.
        places: which of them, int64 ``(S,)``.
        weights: float32 ``(S,)``.

    Returns:
        float32 ``(R,)``.
    """
    return weights @ turned[places].float().square()


def _levels(codes: Tensor, steps: Tensor, depth: int) -> Tensor:
    return steps[depth, 1, : 2**depth].cumsum(0).to(torch.int8)[codes.int()]


def _packed(bits: Tensor) -> Tensor:
    """uint8 of 0 and 1, eight of the last dimension to a byte, the first lowest."""
    bits = torch.nn.functional.pad(bits, (0, -bits.shape[-1] % 8))
    weights = torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8, device=bits.device)
    return (bits.view(*bits.shape[:-1], -1, 8) * weights).sum(-1, dtype=torch.uint8)


def _unpacked(planes: Tensor) -> Tensor:
    """What :func:`_packed` packed."""
    shifts = torch.arange(8, dtype=torch.uint8, device=planes.device)
    return ((planes[..., None] >> shifts) & 1).flatten(-2)
