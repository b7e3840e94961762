"""A velocity by itself, ``spec.Velocity``, and the sums that choose its coefficient, in loops compiled by Numba."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from compactdist.kernels.cpu import call
from compactdist.kernels.cpu.call import Work
from compactdist.kernels.cpu.elements import AHEAD, SOURCES, write
from compactdist.kernels.cpu.native import address_of
from compactdist.kernels.cpu.products import expected_slots, run_alone
from compactdist.kernels.cpu.simd.memory import (
    load_first,
    prefetch,
    rounded_for,
    settle_streams,
    stack_floats,
    store,
    velocity_for,
)
from compactdist.kernels.cpu.simd.slots import ELEMENTS_AT, doubles_at, float_in, next_part
from compactdist.kernels.cpu.steps import CACHE_LINE, DTYPES, STREAMED_NBYTES, loops_of, second_term
from compactdist.kernels.reference import LANES
from compactdist.kernels.spec import Term, Velocity

__all__ = ["weigh", "write_out"]

_BASE, _VELOCITY, _FACTOR, _OUT, _OUT_STREAMS = call.BASE, call.VELOCITY, call.FACTOR, call.OUT, call.OUT_STREAMS
_NUMEL, _FIRST_PASS, _X = call.NUMEL, call.FIRST_PASS, call.X
_RUNS, _DISTANCE, _LENGTH = call.ROWS, call.CHANNELS, call.ELEMENTS

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


def weighing(dtype: str, terms: int) -> Any:
    """A work of one part: over samples, sums of products of what ``x`` and ``base`` changed by, and of squares."""
    elements_at, source_of = ELEMENTS_AT[dtype], SOURCES[terms]

    def body(args: Any) -> int:
        x, base, previous, _, _ = source_of(args, elements_at)
        sums, runs, distance, length = doubles_at(args, _OUT), args[_RUNS], args[_DISTANCE], args[_LENGTH]
        numel, products, squares = args[_NUMEL], stack_floats(LANES), stack_floats(LANES)
        one, two, three, four = 0.0, 0.0, 0.0, 0.0  # in turn, for each waits for the last sum
        for run in range(runs):
            end = min(run * distance + length, numel)
            for at in range(run * distance, end, LANES):
                last = load_first(base, at, end - at)
                change = last - load_first(previous, at, end - at)
                store((load_first(x, at, end - at) - last) * change, products, 0)
                store(change * change, squares, 0)
                for lane in range(0, LANES, 2):
                    one += products[lane]
                    two += products[lane + 1]
                    three += squares[lane]
                    four += squares[lane + 1]
        sums[0] = one + two
        sums[1] = three + four
        return 0

    return body


def weigh(x: Tensor, base: Term, previous: Term, samples: tuple[int, int, int]) -> tuple[float, float]:
    """The two sums over samples of flat, contiguous tensors of one dtype of ``DTYPES``, the last two in one form.

    ``samples``: how many runs there are, how far apart they begin, and how many elements they have.
    """
    runs, distance, length = samples
    sums = np.zeros(2)
    slots = {call.X: x.data_ptr(), **expected_slots((base, previous))}
    slots |= {call.NUMEL: x.numel(), _RUNS: runs, _DISTANCE: distance, _LENGTH: length, call.OUT: sums.ctypes.data}
    run_alone(Work(1, 1, address_of("velocities.weighing", DTYPES[x.dtype], loops_of((base, previous)))), slots)
    return float(sums[0]), float(sums[1])


def write_out(term: Velocity, out: Tensor) -> None:
    """Write a velocity of a dtype of ``DTYPES`` to ``out``, contiguous ``[numel]``, which may be ``previous``."""
    streams = out.nbytes >= STREAMED_NBYTES and out.data_ptr() % CACHE_LINE == 0
    previous_at, _, factor = second_term(term)
    slots = {call.BASE: term.base.data_ptr(), call.VELOCITY: previous_at, call.FACTOR: factor, call.NUMEL: out.numel()}
    slots |= {call.OUT: out.data_ptr(), call.OUT_STREAMS: int(streams)}
    body = address_of("velocities.velocity", DTYPES[out.dtype])
    run_alone(Work(-(-out.numel() // _RUN), out.numel(), body), slots)
