"""Sums of squares by which a sender judges a frame, ``reference/energies.py``, in one pass compiled by Numba."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from compactdist.kernels.cpu import call
from compactdist.kernels.cpu.call import Work
from compactdist.kernels.cpu.elements import AHEAD, SOURCES, ask_for, expected_at
from compactdist.kernels.cpu.native import address_of
from compactdist.kernels.cpu.products import expected_slots, run_alone
from compactdist.kernels.cpu.simd.doubles import add_differences, add_squares, no_squares, total_of
from compactdist.kernels.cpu.simd.memory import load_first, prefetch
from compactdist.kernels.cpu.simd.slots import ELEMENTS_AT, doubles_at, next_part
from compactdist.kernels.cpu.steps import DTYPES, loops_of
from compactdist.kernels.reference import LANES
from compactdist.kernels.spec import MovingTerm

__all__ = ["energies"]

_OUT, _PAYLOAD, _NUMEL, _FIRST_PASS = call.OUT, call.PAYLOAD, call.NUMEL, call.FIRST_PASS

_RUN = 1 << 14
"""Elements whose sums are written out together: the same for every number of threads."""


def sum_runs(dtype: str, terms: int) -> Any:
    """A work over runs: three float64 for each, where ``PAYLOAD`` says; ``OUT`` is where the reconstruction is."""
    elements_at, source_of = ELEMENTS_AT[dtype], SOURCES[terms]

    def body(args: Any) -> int:
        source, value = source_of(args, elements_at), elements_at(args, _OUT)
        sums, numel = doubles_at(args, _PAYLOAD), args[_NUMEL]
        lo, hi = next_part(args, _FIRST_PASS)
        while lo < hi:
            for run in range(lo, hi):
                energy, residual, error = no_squares(), no_squares(), no_squares()
                for at in range(run * _RUN, min((run + 1) * _RUN, numel), LANES):
                    ask_for(source, at + AHEAD)
                    prefetch(value, at + AHEAD)
                    have = numel - at
                    x = load_first(source[0], at, have)
                    energy = add_squares(energy, x)
                    residual = add_differences(residual, x, expected_at(source, at, have))
                    error = add_differences(error, x, load_first(value, at, have))
                sums[3 * run] = total_of(energy)
                sums[3 * run + 1] = total_of(residual)
                sums[3 * run + 2] = total_of(error)
            lo, hi = next_part(args, _FIRST_PASS)
        return 0

    return body


def energies(x: Tensor, terms: tuple[MovingTerm, ...], value: Tensor) -> Tensor:
    """See ``kernels.energies``; all are of one dtype of ``DTYPES``."""
    x, value, terms = x.contiguous(), value.contiguous(), tuple([term.contiguous() for term in terms])
    runs = -(-x.numel() // _RUN)
    sums = np.zeros((runs, 3))
    slots = {call.X: x.data_ptr(), _OUT: value.data_ptr(), _PAYLOAD: sums.ctypes.data, _NUMEL: x.numel()}
    body = address_of("energies.sum_runs", DTYPES[x.dtype], loops_of(terms))
    run_alone(Work(runs, x.numel(), body), slots | expected_slots(terms))
    return torch.from_numpy(sums.sum(0))
