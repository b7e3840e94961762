"""The sum of the terms of a prediction, in a loop compiled by Numba: whatever they are kept as, they are read once."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from compactdist.kernels.cpu import call
from compactdist.kernels.cpu.call import Work
from compactdist.kernels.cpu.elements import AHEAD, SOURCES, ask_for_expected, expected_at, write
from compactdist.kernels.cpu.native import address_of
from compactdist.kernels.cpu.products import expected_slots, run_alone
from compactdist.kernels.cpu.simd.memory import rounded_for, settle_streams
from compactdist.kernels.cpu.simd.slots import ELEMENTS_AT, next_part
from compactdist.kernels.cpu.steps import CACHE_LINE, DTYPES, STREAMED_NBYTES, loops_of
from compactdist.kernels.reference import LANES
from compactdist.kernels.spec import MovingTerm

__all__ = ["write_sum"]

_OUT, _OUT_STREAMS, _NUMEL, _FIRST_PASS = call.OUT, call.OUT_STREAMS, call.NUMEL, call.FIRST_PASS

_RUN = 2048
"""Elements that one thread takes at a time, at least."""


def add_up(dtype: str, terms: int) -> Any:
    """A work over runs: ``out`` becomes the sum of the terms, kept finite and rounded once."""
    elements_at, source_of = ELEMENTS_AT[dtype], SOURCES[terms]

    def body(args: Any) -> int:
        source, numel = source_of(args, elements_at), args[_NUMEL]
        out, streams = elements_at(args, _OUT), args[_OUT_STREAMS] != 0
        lo, hi = next_part(args, _FIRST_PASS)
        while lo < hi:
            for at in range(lo * _RUN, min(hi * _RUN, numel), LANES):
                ask_for_expected(source, at + AHEAD)
                write(rounded_for(out, expected_at(source, at, numel - at)), out, streams, at, numel - at)
            lo, hi = next_part(args, _FIRST_PASS)
        settle_streams()
        return 0

    return body


def write_sum(terms: tuple[MovingTerm, ...], out: Tensor) -> None:
    """Write the sum of contiguous terms to ``out``, contiguous, all of one dtype of ``DTYPES``."""
    streams = out.nbytes >= STREAMED_NBYTES and out.data_ptr() % CACHE_LINE == 0
    slots = {call.X: out.data_ptr(), _OUT: out.data_ptr(), _OUT_STREAMS: int(streams), _NUMEL: out.numel()}
    body = address_of("terms.add_up", DTYPES[out.dtype], loops_of(terms))
    run_alone(Work(-(-out.numel() // _RUN), out.numel(), body), slots | expected_slots(terms))
