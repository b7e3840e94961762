"""Rounding to eight bits for each element, and back: ``reference/rounding.py`` in loops compiled by Numba.

Sixteen blocks are read for their largest magnitudes, and again from the nearest cache to be coded.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from compactdist.kernels.cpu import call
from compactdist.kernels.cpu.call import E4M3, LINEAR, TERM_IN_INT8
from compactdist.kernels.cpu.elements import AHEAD, SOURCES, ask_for_expected, expected_at, reaching, write
from compactdist.kernels.cpu.scales import over, storable
from compactdist.kernels.cpu.simd.ints import bits_of_magnitude, larger
from compactdist.kernels.cpu.simd.memory import load_first, prefetch, rounded_for, settle_streams, stack_floats, store
from compactdist.kernels.cpu.simd.packing import store_codes
from compactdist.kernels.cpu.simd.sixteen import COUNT, fold_in, folded_rows, store_bf16, store_sixteen
from compactdist.kernels.cpu.simd.slots import ELEMENTS_AT, bytes_at, halves_at, next_part
from compactdist.kernels.cpu.simd.vectors import zeros
from compactdist.kernels.reference import LANES
from compactdist.kernels.spec import ROUNDED, ROUNDED_BLOCK

_f32 = np.float32
_BLOCK = ROUNDED_BLOCK
_X, _OUT, _OUT_STREAMS, _CODES, _VELOCITY = call.X, call.OUT, call.OUT_STREAMS, call.CODES, call.VELOCITY
_NUMEL, _FIRST_PASS = call.NUMEL, call.FIRST_PASS


def quantize(dtype: str, terms: int) -> Any:
    """A work over batches of sixteen blocks: codes and scales of the block's ``x``; ``terms``: the form."""
    elements_at, whole = ELEMENTS_AT[dtype], terms == TERM_IN_INT8
    kind, bits = (LINEAR, -8) if whole else (E4M3, 8)
    steps = _f32(ROUNDED["int8" if whole else "fp8"].largest)

    def body(args: Any) -> int:
        values, codes, scales = elements_at(args, _X), bytes_at(args, _CODES), halves_at(args, _VELOCITY)
        numel, room, inverses = args[_NUMEL], stack_floats(256), stack_floats(16)
        for at in range(0, COUNT * COUNT, LANES):
            store(zeros(), room, at)
        lo, hi = next_part(args, _FIRST_PASS)
        while lo < hi:
            for first in range(lo * COUNT, hi * COUNT, COUNT):
                blocks = min(COUNT, (numel + _BLOCK - 1) // _BLOCK - first)
                for b in range(blocks):
                    at = (first + b) * _BLOCK
                    prefetch(values, at + AHEAD)
                    prefetch(values, at + AHEAD + LANES)
                    one = bits_of_magnitude(load_first(values, at, numel - at))
                    two = bits_of_magnitude(load_first(values, at + LANES, numel - at - LANES))
                    fold_in(larger(one, two), room, b)
                c = storable(folded_rows(room, True) / steps, True)
                store_bf16(c, scales, first, blocks)
                store_sixteen(over(_f32(1), c), inverses)
                for at in range(first * _BLOCK, min((first + blocks) * _BLOCK, numel), LANES):
                    level = load_first(values, at, numel - at) * inverses[at // _BLOCK - first]
                    code = reaching(kind, level, level < _f32(0), _f32(1))[0]
                    store_codes(code, bits, codes, at, min(LANES, numel - at))
            lo, hi = next_part(args, _FIRST_PASS)
        return 0

    return body


def dequantize(dtype: str, terms: int) -> Any:
    """A work over batches of sixteen blocks: ``out`` becomes the only term, in the form that ``terms`` says."""
    elements_at, source_of = ELEMENTS_AT[dtype], SOURCES[terms]

    def body(args: Any) -> int:
        source, numel = source_of(args, elements_at), args[_NUMEL]
        out, streams = elements_at(args, _OUT), args[_OUT_STREAMS] != 0
        lo, hi = next_part(args, _FIRST_PASS)
        while lo < hi:
            for at in range(lo * COUNT * _BLOCK, min(hi * COUNT * _BLOCK, numel), LANES):
                ask_for_expected(source, at + AHEAD)
                write(rounded_for(out, expected_at(source, at, numel - at)), out, streams, at, numel - at)
            lo, hi = next_part(args, _FIRST_PASS)
        settle_streams()
        return 0

    return body
