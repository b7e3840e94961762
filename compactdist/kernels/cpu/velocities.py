"""A velocity by itself, ``spec.Velocity``, in a loop compiled by Numba."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from compactdist.kernels.cpu import call
from compactdist.kernels.cpu.call import Work
from compactdist.kernels.cpu.elements import AHEAD, write
from compactdist.kernels.cpu.native import address_of
from compactdist.kernels.cpu.products import run_alone
from compactdist.kernels.cpu.simd.memory import load_first, prefetch, rounded_for, settle_streams, velocity_for
from compactdist.kernels.cpu.simd.slots import ELEMENTS_AT, float_in, next_part
from compactdist.kernels.cpu.steps import CACHE_LINE, DTYPES, STREAMED_NBYTES, second_term
from compactdist.kernels.reference import LANES
from compactdist.kernels.spec import Velocity

__all__ = ["write_out"]

_BASE, _VELOCITY, _FACTOR, _OUT, _OUT_STREAMS = call.BASE, call.VELOCITY, call.FACTOR, call.OUT, call.OUT_STREAMS
_NUMEL, _FIRST_PASS = call.NUMEL, call.FIRST_PASS

_RUN = 1024
"""Elements that one thread takes at a time, at least."""


def velocity(dtype: str) -> Any:
    """A work over runs: ``out`` becomes the velocity."""
    elements_at = ELEMENTS_AT[dtype]

    def body(args: Any) -> int:
        base, previous, factor = elements_at(args, _BASE), elements_at(args, _VELOCITY), float_in(args, _FACTOR)
        out, streams, numel = elements_at(args, _OUT), args[_OUT_STREAMS] != 0, args[_NUMEL]
        lo, hi = next_part(args, _FIRST_PASS)
        while lo < hi:
            for at in range(lo * _RUN, min(hi * _RUN, numel), LANES):
                prefetch(base, at + AHEAD)
                prefetch(previous, at + AHEAD)
                have = numel - at
                value = velocity_for(base, load_first(base, at, have), load_first(previous, at, have), factor)
                write(rounded_for(out, value), out, streams, at, have)
            lo, hi = next_part(args, _FIRST_PASS)
        settle_streams()
        return 0

    return body


def write_out(term: Velocity, out: Tensor) -> None:
    """Write a velocity of a dtype of ``DTYPES`` to ``out``, contiguous ``[numel]``, which may be ``previous``."""
    streams = out.nbytes >= STREAMED_NBYTES and out.data_ptr() % CACHE_LINE == 0
    previous_at, _, factor = second_term(term)
    slots = {call.BASE: term.base.data_ptr(), call.VELOCITY: previous_at, call.FACTOR: factor, call.NUMEL: out.numel()}
    slots |= {call.OUT: out.data_ptr(), call.OUT_STREAMS: int(streams)}
    body = address_of("velocities.velocity", DTYPES[out.dtype])
    run_alone(Work(-(-out.numel() // _RUN), out.numel(), body), slots)
