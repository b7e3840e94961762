"""Rounding to eight bits for each element, and back: ``reference/rounding.py`` in loops compiled by Numba.

Sixteen blocks are read for their largest magnitudes, and again from the nearest cache to be coded.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from compactdist.kernels.cpu import call
from compactdist.kernels.cpu.call import E4M3, LINEAR, TERM_IN_INT8
from compactdist.kernels.cpu.elements import AHEAD, SOURCES, ask_for, reaching
from compactdist.kernels.cpu.scales import over, storable
from compactdist.kernels.cpu.simd.ints import bits_of_magnitude, larger
from compactdist.kernels.cpu.simd.jit import inlined
from compactdist.kernels.cpu.simd.memory import (
    load_first,
    stack_floats,
    store,
    velocity_for,
)
from compactdist.kernels.cpu.simd.packing import store_codes
from compactdist.kernels.cpu.simd.sixteen import COUNT, fold_in, folded_rows, store_bf16, store_sixteen
from compactdist.kernels.cpu.simd.slots import ELEMENTS_AT, bytes_at, float_in, halves_at, next_part
from compactdist.kernels.cpu.simd.vectors import zeros
from compactdist.kernels.reference import LANES
from compactdist.kernels.spec import ROUNDED, ROUNDED_BLOCK

_f32 = np.float32
_BLOCK = ROUNDED_BLOCK
_X, _OUT, _OUT_STREAMS, _CODES, _FACTOR = call.X, call.OUT, call.OUT_STREAMS, call.CODES, call.FACTOR
_SECOND_SCALES, _NUMEL, _FIRST_PASS = call.SECOND_SCALES, call.NUMEL, call.FIRST_PASS


@inlined
def _as_they_are(source: Any, at: int, have: int) -> Any:
    return load_first(source[0], at, have)


@inlined
def _velocities(source: Any, at: int, have: int) -> Any:
    x, base, _, _, factor = source
    return velocity_for(x, load_first(x, at, have), load_first(base, at, have), factor)


@inlined
def _round(args: Any, values: Any, source: Any, kind: int, bits: int, steps: Any) -> None:
    """Write codes and scales of ``values(source, at, have)``, batch by batch."""
    codes, scales = bytes_at(args, _CODES), halves_at(args, _SECOND_SCALES)
    numel, room, inverses = args[_NUMEL], stack_floats(256), stack_floats(16)
    for at in range(0, COUNT * COUNT, LANES):
        store(zeros(), room, at)
    lo, hi = next_part(args, _FIRST_PASS)
    while lo < hi:
        for first in range(lo * COUNT, hi * COUNT, COUNT):
            blocks = min(COUNT, (numel + _BLOCK - 1) // _BLOCK - first)
            for b in range(blocks):
                at = (first + b) * _BLOCK
                ask_for(source, at + AHEAD)
                ask_for(source, at + AHEAD + LANES)
                one = bits_of_magnitude(values(source, at, numel - at))
                two = bits_of_magnitude(values(source, at + LANES, numel - at - LANES))
                fold_in(larger(one, two), room, b)
            c = storable(folded_rows(room, True) / steps, True)
            store_bf16(c, scales, first, blocks)
            store_sixteen(over(_f32(1), c), inverses)
            for at in range(first * _BLOCK, min((first + blocks) * _BLOCK, numel), LANES):
                level = values(source, at, numel - at) * inverses[at // _BLOCK - first]
                code = reaching(kind, level, level < _f32(0), _f32(1))[0]
                store_codes(code, bits, codes, at, min(LANES, numel - at))
        lo, hi = next_part(args, _FIRST_PASS)


def _form(terms: int) -> tuple[int, int, Any]:
    whole = terms == TERM_IN_INT8
    return (*((LINEAR, -8) if whole else (E4M3, 8)), _f32(ROUNDED["int8" if whole else "fp8"].largest))


def quantize(dtype: str, terms: int) -> Any:
    """A work over batches of sixteen blocks: codes and scales of the block's ``x``; ``terms``: the form."""
    elements_at, (kind, bits, steps) = ELEMENTS_AT[dtype], _form(terms)

    def body(args: Any) -> int:
        x = elements_at(args, _X)
        _round(args, _as_they_are, (x, x, x, 0, _f32(0)), kind, bits, steps)
        return 0

    return body


def quantize_velocity(dtype: str, terms: int) -> Any:
    """The same of the velocity between ``x`` and the only term, both of that form; ``FACTOR`` has its coefficient."""
    elements_at, source_of, (kind, bits, steps) = ELEMENTS_AT[dtype], SOURCES[terms], _form(terms)

    def body(args: Any) -> int:
        x, base, none, _, _ = source_of(args, elements_at)
        _round(args, _velocities, (x, base, none, 1, float_in(args, _FACTOR)), kind, bits, steps)
        return 0

    return body
