"""Whether a residual is far larger than its tensor, see ``reference/samples.py``; compiled by Numba."""

from __future__ import annotations

from typing import Any

import numpy as np

from compactdist.kernels.cpu import call
from compactdist.kernels.cpu.elements import SOURCES, ask_for, residual_at
from compactdist.kernels.cpu.simd.jit import inlined
from compactdist.kernels.cpu.simd.memory import load_first
from compactdist.kernels.cpu.simd.slots import ELEMENTS_AT
from compactdist.kernels.cpu.simd.vectors import folded, magnitude, zeros
from compactdist.kernels.reference import LANES
from compactdist.kernels.reference.samples import NEAR, RUN, RUNS

_NUMEL = call.NUMEL
_RUNS, _RUN, _NEAR = RUNS, RUN, np.float32(NEAR)


@inlined
def _ask_for_runs(source: Any, numel: int) -> None:
    """Ask for all runs at once: they are far apart, and memory would otherwise bring one cache line after another."""
    distance = max(numel // _RUNS, _RUN)
    for run in range(_RUNS):
        for first in range(0, _RUN, LANES):
            ask_for(source, run * distance + first)


@inlined
def _over_runs(source: Any, first: int, numel: int) -> Any:
    """Magnitudes of the residual and of ``x`` at sixty-four elements from ``first`` on of each run, added up."""
    residual, whole, distance = zeros(), zeros(), max(numel // _RUNS, _RUN)
    for run in range(_RUNS):
        at = run * distance + first
        residual = residual + magnitude(residual_at(source, at, numel - at))
        whole = whole + magnitude(load_first(source[0], at, numel - at))
    return residual, whole


@inlined
def _of_two(source: Any, first: int, numel: int) -> Any:
    """The same, folded onto the first half of a run."""
    one, two = _over_runs(source, first, numel), _over_runs(source, first + _RUN // 2, numel)
    return one[0] + two[0], one[1] + two[1]


def far_larger(dtype: str, terms: int) -> Any:
    """1 if the residual of the block's tensors is far larger than ``x``, else 0."""
    elements_at, source_of = ELEMENTS_AT[dtype], SOURCES[terms]

    def body(args: Any) -> int:
        source, numel = source_of(args, elements_at), args[_NUMEL]
        _ask_for_runs(source, numel)
        one, two = _of_two(source, 0, numel), _of_two(source, LANES, numel)
        residual, whole = folded(one[0] + two[0]), folded(one[1] + two[1])
        return 1 if residual * _NEAR > whole else 0

    return body
