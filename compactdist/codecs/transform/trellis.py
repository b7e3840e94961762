"""Levels of components that are chosen along a trellis of four states: twice as many levels for the same bits.

A component with b bits has ``2**(b + 1)`` levels, in ascending order of the subsets D0, D1, D2, D3, D0, ... A bit u of
each row moves through the trellis, b - 1 bits choose a level in the row's subset. The subset is
``2 * (u[t] ^ u[t - 2]) + u[t - 1]``, Ungerboeck's code of four states, so that each state has two subsets, and a
receiver needs no more than the bits of two rows before. The sender takes the course through the trellis that loses
least (M. Marcellin, T. Fischer, "Trellis coded quantization of memoryless and Gauss-Markov sources", IEEE Trans.
Commun. 38, 1990). Rows a stride apart follow one another, so as many courses lie side by side. A course is a ring: the
bits before its first turn are those of the last two, of rows that are not there 0.
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from statistics import NormalDist

import torch
from torch import Tensor

from compactdist.codecs.transform.levels import LevelSet, steps_table
from compactdist.kernels.reference.components import STRIDE, Chosen

__all__ = ["TRELLIS", "search_table", "stride_of", "untangled"]

_MAGNITUDES: dict[int, tuple[float, ...]] = {
    1: (0.397498, 1.189522),
    2: (0.167768, 0.634986, 1.05728, 1.861776),
    3: (0.096443, 0.339017, 0.554452, 0.8122, 1.065764, 1.38192, 1.812201, 2.51618),
    4: (
        0.060982, 0.185302, 0.311717, 0.440735, 0.573493, 0.709338, 0.843667, 0.988153,
        1.129094, 1.294182, 1.466277, 1.665105, 1.90391, 2.202634, 2.601472, 3.205033,
    ),
}  # fmt: skip
"""Positive levels by bits, for a unit Gaussian; trained as ``tools/trellis_levels.py`` does."""

_SPREAD = 1.5
"""Of many levels, how much wider than the Gaussian they are spread. Without a trellis the root of 3 would lose least
(P. Panter, W. Dite, Proc. IRE 39, 1951); 1.5 was measured to, of 1.2 to 1.8.
"""

_LONG, _WIDE, _NARROW = 1024, 64, 8
"""Rows from which courses are ``_WIDE`` apart, which compiled loops take side by side; ``_NARROW`` below."""


def stride_of(rows: int) -> int:
    """Rows from one to the next of a course, a multiple of 8."""
    return _WIDE if rows >= _LONG else _NARROW


def _spread(depth: int) -> tuple[float, ...]:
    count = 1 << depth
    quantile = NormalDist().inv_cdf
    # rounded, for no two machines may differ
    return tuple(round(_SPREAD * quantile(0.5 + (i + 0.5) / (2 * count)), 6) for i in range(count))


TRELLIS = LevelSet(
    "trellis",
    tuple(_MAGNITUDES[depth] if depth in _MAGNITUDES else _spread(depth) for depth in range(1, 8)),
    (1.0, 0.315, 0.0886, 0.0244, 0.00658, 0.00169, 0.00044, 0.000128),
)
"""Of more than 7 bits levels would be finer than whole numbers up to 127. ``tools/trellis_levels.py`` prints losses."""


@cache
def search_table(device: torch.device) -> Tensor:
    """float32 ``(9, 2, STRIDE)``: of each depth, the borders between the levels of a subset, one subset after another;
    then the levels, likewise, in whole numbers. Of depth 0, ones.
    """
    table = torch.zeros(9, 2, STRIDE, dtype=torch.float32, device="cpu")
    table[0] = 1
    for depth in range(1, TRELLIS.deepest + 1):
        subsets = [TRELLIS.whole(depth)[first::4] for first in range(4)]
        borders = [(a + b) / 2 for subset in subsets for a, b in pairwise(subset)]
        table[depth, 0, : len(borders)] = torch.tensor(borders, dtype=torch.float32, device="cpu")
        flat = torch.tensor(subsets, dtype=torch.float32, device="cpu").view(-1)
        table[depth, 1, : flat.numel()] = flat
    return table.to(device)


@cache
def _reading_table(device: torch.device) -> Tensor:
    """As ``Chosen.steps``, by one bit more than a component has: codes of two bits for the subset, then of levels."""
    table = steps_table(TRELLIS, device).roll(1, 0)
    table[0] = 1
    return table


def _turned(planes: Tensor, stride: int, turns: int) -> Tensor:
    """Planes whose bits are those of so many turns before."""
    nbytes = planes.shape[1]
    ring = torch.nn.functional.pad(planes, (0, -nbytes % (stride // 8)))
    return ring.roll(turns * stride // 8, 1)[:, :nbytes]


def untangled(planes: Tensor, chosen: Chosen, rows: int) -> tuple[Tensor, Chosen]:
    """Planes and components that are read without a trellis: of each component two planes for the subset in place of
    the first one.

    Args:
        planes: uint8 ``(planes, ceil(R / 8))``.
        chosen: which components have them.
        rows: R.
    """
    first = torch.zeros(planes.shape[0], dtype=torch.int64, device=planes.device)
    first[chosen.planes] = 1
    behind = torch.arange(planes.shape[0], device=planes.device) + first.cumsum(0)
    moves, stride = planes[chosen.planes], stride_of(rows)
    out = planes.new_empty(planes.shape[0] + chosen.planes.numel(), planes.shape[1])
    out[behind] = planes
    out[behind[chosen.planes] - 1] = _turned(moves, stride, 1)
    out[behind[chosen.planes]] = moves ^ _turned(moves, stride, 2)
    steps = _reading_table(planes.device)
    return out, Chosen(chosen.places, chosen.depths + 1, behind[chosen.planes] - 1, steps)
