"""The levels that components are rounded to, a set for each number of bits, and what they lose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

from compactdist.codecs.scalar.gaussian_levels import LOSS, MAGNITUDES
from compactdist.kernels.reference.components import STRIDE

__all__ = ["SCALAR", "LevelSet", "outermost_table", "steps_table", "unit_levels_of", "whole"]


@dataclass(frozen=True)
class LevelSet:
    """Levels for a component of each number of bits.

    Attributes:
        name: of the set; two of the same name are the same.
        magnitudes: of 1, 2, ... bits: positive levels in standard deviations, ascending. Negatives are levels, too.
        losses: of 0, 1, ... bits: the mean square error that a unit Gaussian is left with.
    """

    name: str
    magnitudes: tuple[tuple[float, ...], ...] = field(compare=False, repr=False)
    losses: tuple[float, ...] = field(compare=False, repr=False)

    @property
    def deepest(self) -> int:
        """Most bits of a component."""
        return len(self.magnitudes)

    def outermost(self, depth: int) -> float:
        """The outermost level, in standard deviations: what the level 127 stands for; 0 for no bits."""
        return self.magnitudes[depth - 1][-1] if depth else 0.0

    def whole(self, depth: int) -> tuple[int, ...]:
        """All levels in whole numbers, ascending: -127 to 127."""
        return whole(self.magnitudes[depth - 1])

    def borders(self, depth: int) -> tuple[float, ...]:
        """Ascending borders between codes, in standard deviations."""
        positive = self.magnitudes[depth - 1]
        return tuple((a + b) / 2 for a, b in pairwise([*(-one for one in reversed(positive)), *positive]))


def whole(magnitudes: Sequence[float]) -> tuple[int, ...]:
    """Ascending magnitudes and their negatives in whole numbers, the largest of which is 127."""
    positive = [round(127 * one / magnitudes[-1]) for one in magnitudes]
    return (*(-one for one in reversed(positive)), *positive)


def _uniform(count: int, reach: float) -> tuple[float, ...]:
    return tuple(reach * (2 * i + 1) / (2 * count - 1) for i in range(count))


SCALAR = LevelSet(
    "scalar",
    (*(MAGNITUDES[depth] for depth in range(1, 7)), _uniform(64, 4.4), _uniform(128, 4.8)),
    (*(LOSS[depth] for depth in range(7)), LOSS[6] / 4, LOSS[6] / 16),
)
"""Lloyd-Max levels up to 6 bits, uniform grids of 7 and 8."""


@cache
def steps_table(levels: LevelSet, device: torch.device) -> Tensor:
    """As ``Chosen.steps``."""
    steps = torch.zeros(9, 2, STRIDE, dtype=torch.float32, device="cpu")
    steps[0] = 1
    for depth in range(1, levels.deepest + 1):
        borders, ascending = levels.borders(depth), levels.whole(depth)
        steps[depth, 0, : len(borders)] = torch.tensor(borders, dtype=torch.float32, device="cpu")
        differences = torch.diff(torch.tensor([0, *ascending], dtype=torch.float32, device="cpu"))
        steps[depth, 1, : len(ascending)] = differences
    return steps.to(device)


@cache
def outermost_table(levels: LevelSet, device: torch.device) -> Tensor:
    """What a level of 1 is in amplitudes, by depth, float32 ``(levels.deepest + 1,)``; 0 for none."""
    reach = [levels.outermost(depth) / 127 for depth in range(levels.deepest + 1)]
    return torch.tensor(reach, dtype=torch.float32, device=device)


def unit_levels_of(depths: Tensor, levels: LevelSet) -> Tensor:
    """What a level of 1 is in amplitudes, float32; 0 for a depth of 0."""
    return outermost_table(levels, depths.device)[depths]
