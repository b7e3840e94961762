"""What the transform codec does with single elements: levels and planes of bits, and scaled products put out.

*Chosen* components are those that get bits, in ascending order. Planes lie in a payload the deepest components first;
where each begins, they are told.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "FAR",
    "FARTHEST",
    "LARGEST_UNIT",
    "STRIDE",
    "Chosen",
    "choose",
    "choose_on_trellis",
    "course",
    "in_levels",
    "inverses_of",
    "read",
    "sums",
    "weigh",
]

STRIDE = 256
"""float32 between the borders of a depth, in a table of all depths, and its levels."""

LARGEST_UNIT = 2.0**100
"""Up to this no product of levels and weights, below 2**24, leaves float32 where it is scaled: nothing is clamped."""

FARTHEST = 512.0
"""Values on a trellis are held to so many levels: the nearest level is the same, and what courses lose stays small."""

FAR = 1e20
"""More than any course loses."""


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
    of_row = inverses_of(rows)
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
    return sums(turned, chosen, rows, out)


def choose_on_trellis(
    turned: Tensor, chosen: Chosen, inverses: Tensor, rows: Tensor, planes: Tensor, out: Tensor, stride: int
) -> tuple[Tensor, Tensor]:
    """As :func:`choose`, along the trellis of ``codecs/transform/trellis.py``.

    Args:
        turned: all components, float32 or bfloat16 ``(K, R)``.
        chosen: which of them get bits; ``steps``: ``trellis.search_table``.
        inverses: what makes levels of a chosen component of a row of scale 1, float32 ``(S,)``.
        rows: their scales, float32 ``(R,)``; zero where there is nothing.
        planes: as for :func:`choose`.
        out: as for :func:`choose`.
        stride: rows from one to the next of a course.
    """
    of_row = inverses_of(rows)
    for depth, which in chosen.classes():
        given = in_levels(turned, chosen.places[which], inverses[which], of_row)
        subsets = chosen.steps[depth, 1, : 2 << depth].view(4, -1)
        moves, numbers, out[which] = course(given, subsets, stride)
        planes[chosen.planes[which]] = _packed(moves)
        for bit in range(depth - 1):
            planes[chosen.planes[which] + 1 + bit] = _packed((numbers >> bit) & 1)
    return sums(turned, chosen, rows, out)


def inverses_of(rows: Tensor) -> Tensor:
    """Of scales of rows; 0 of 0."""
    return torch.where(rows > 0, 1 / rows, torch.zeros_like(rows))


def in_levels(turned: Tensor, places: Tensor, inverses: Tensor, of_row: Tensor) -> Tensor:
    """Components with these places in levels, held to ``FARTHEST``; see :func:`choose_on_trellis`."""
    given = (turned[places].float() * inverses[:, None]) * of_row
    return given.nan_to_num(nan=-FARTHEST).clamp(-FARTHEST, FARTHEST)


def course(given: Tensor, subsets: Tensor, stride: int) -> tuple[Tensor, Tensor, Tensor]:
    """The courses of components ``(S, R)`` round the trellis that lose least, with levels ``(4, n)``.

    A course ends in the state that it begins in, for all others lose ``FAR``: so a receiver reads the same levels.

    Returns:
        ``(S, R)``: the bit that moves, uint8; the number of the level in its subset, uint8; the level, int8.
    """
    count, rows = given.shape
    turns = -(-rows // stride)

    def by_turns(values: Tensor) -> Tensor:
        return torch.nn.functional.pad(values, (0, turns * stride - rows)).view(count, turns, stride)

    there, values = by_turns(torch.ones_like(given)), by_turns(given)
    numbers = torch.stack([torch.bucketize(values, (s[1:] + s[:-1]) / 2, right=True) for s in subsets])
    found = torch.stack([s[n] for s, n in zip(subsets, numbers, strict=True)])
    costs = (values - found).square() * there
    # from each state on, and back to it
    apart = (1 - torch.eye(4, dtype=given.dtype, device=given.device)) * FAR
    ends = _passed(apart[:, :, None, None].expand(4, 4, count, stride), costs, None).diagonal().movedim(-1, 0).clone()
    ends[1::2] += (1 - there[:, -1]) * FAR  # the bit of a row that is not there is 0
    state = ends.argmin(0)
    decisions: list[Tensor] = []
    _passed(apart[state].movedim(-1, 0)[None], costs, decisions)
    moves, subset = torch.empty_like(values, dtype=torch.int64), torch.empty_like(values, dtype=torch.int64)
    for turn in reversed(range(turns)):
        before = decisions[turn].long().gather(0, state[None])[0]
        now, last = state & 1, state >> 1
        moves[:, turn], subset[:, turn] = now, 2 * (now ^ before) + last
        state = last + 2 * before
    chosen = moves, numbers.gather(0, subset[None])[0], found.gather(0, subset[None])[0]
    moved, number, level = (one.reshape(count, -1)[:, :rows] for one in chosen)
    return moved.to(torch.uint8), number.to(torch.uint8), level.to(torch.int8)


def _passed(metrics: Tensor, costs: Tensor, decisions: list[Tensor] | None) -> Tensor:
    """What courses to each state have lost after all turns.

    A state is the bit of the last turn, and that of the turn before times two.

    Args:
        metrics: what they have lost before, ``(N, 4, S, stride)`` by state.
        costs: of each subset ``(4, S, turns, stride)``.
        decisions: receives of each turn whether a course came from the other of two states.
    """
    for turn in range(costs.shape[2]):
        d0, d1, d2, d3 = costs[:, :, turn]
        m0, m1, m2, m3 = metrics.unbind(1)
        one = torch.stack([m0 + d0, m0 + d2, m1 + d1, m1 + d3], 1)
        other = torch.stack([m2 + d2, m2 + d0, m3 + d3, m3 + d1], 1)
        metrics = torch.minimum(one, other)
        if decisions is not None:
            decisions.append((one >= other)[0])
    return metrics


def sums(turned: Tensor, chosen: Chosen, rows: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """What :func:`choose` returns of levels ``out``."""
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
