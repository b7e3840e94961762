"""One element of every run of m, see ``reference/topk.py``; compiled by Numba.

Both loops are works that stand alone, over batches of 64 runs, so that no two threads write to one byte of places.
``CODES`` is where places are, ``LEVELS`` where the kept elements are, ``ROW_COUNT`` how many runs there are.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from compactdist.kernels.cpu import call
from compactdist.kernels.cpu.elements import AHEAD, ask_for, ask_for_expected, expected_at, put, residual_at, source_of
from compactdist.kernels.cpu.simd.elements import Pointer
from compactdist.kernels.cpu.simd.jit import inlined
from compactdist.kernels.cpu.simd.memory import load, settle_streams, stack_floats, store
from compactdist.kernels.cpu.simd.slots import ELEMENTS_AT, bytes_at, next_part
from compactdist.kernels.reference import BF16_MAX_BITS, LANES

_u32, _u16, _f32, _at = np.uint32, np.uint16, np.float32, np.uintp
_FIRST_PASS, _CODES, _LEVELS, _OUT = call.FIRST_PASS, call.CODES, call.LEVELS, call.OUT
_NUMEL, _RUNS, _OUT_STREAMS, _BAD = call.NUMEL, call.ROW_COUNT, call.OUT_STREAMS, call.BAD
_INFINITE, _SMALLEST, _LARGEST = 0x7F800000, (127 - 118) << 23, BF16_MAX_BITS
_BATCH = LANES


@inlined
def _largest(room: Pointer, start: int, m: int) -> Any:
    """Place and bits of magnitude of the first of the largest of m elements."""
    place, best = _u32(0), _u32(0)
    for j in range(m):
        size = _u32(_f32(room[_at(start + j)]).view(_u32) & _u32(0x7FFFFFFF))
        place = _u32(j) if size > best else place
        best = size if size > best else best
    return place, best


@inlined
def _as_bf16(value: Any) -> Any:
    """Bits of a bfloat16 as ``round_signed_bf16`` and ``encode_signed_bf16`` make them."""
    bits = _f32(value).view(_u32)
    size = _u32(bits & _u32(0x7FFFFFFF))
    half = _u32(_u32(size + _u32(0x7FFF) + _u32(_u32(size >> _u32(16)) & _u32(1))) >> _u32(16))
    half = _u32(0) if size < _u32(_SMALLEST) else min(half, _u32(_LARGEST))
    return _u16(_u32(half | _u32(0x8000)) if value < _f32(0) else half)


@inlined
def _keep(value: Any, kept: Any, at: int, halves: bool) -> None:
    if halves:
        kept[_at(at)] = _as_bf16(value)
    else:
        kept[_at(at)] = value


def pick(dtype: str, m: int, halves: bool) -> Any:
    """Places and kept elements of the residual, the latter as bfloat16 if ``halves``, else as float32.

    Where the runs are odd in number, a zero follows the last. ``BAD`` is set if something is not finite.
    """
    elements_at, kept_at = ELEMENTS_AT[dtype], ELEMENTS_AT["bfloat16" if halves else "float32"]
    span = _BATCH * m

    def body(args: Any) -> int:
        source, numel, runs = source_of(args, elements_at), args[_NUMEL], args[_RUNS]
        places, kept, room, top = bytes_at(args, _CODES), kept_at(args, _LEVELS), stack_floats(span), _u32(0)
        lo, hi = next_part(args, _FIRST_PASS)
        while lo < hi:
            for batch in range(lo, hi):
                at, first = batch * span, batch * _BATCH
                for j in range(0, span, LANES):
                    ask_for(source, at + j + AHEAD)
                    store(residual_at(source, at + j, max(numel - at - j, 0)), room, j)
                for r in range(0, min(_BATCH, runs - first), 2):
                    one, size = _largest(room, r * m, m)
                    two, other = _largest(room, r * m + m, m)
                    top = max(top, max(size, other))
                    places[_at((first + r) >> 1)] = np.uint8(_u32(one | _u32(two << _u32(4))))
                    _keep(room[_at(r * m + one)], kept, first + r, halves)
                    _keep(room[_at(r * m + m + two)], kept, first + r + 1, halves)
            lo, hi = next_part(args, _FIRST_PASS)
        if top >= _u32(_INFINITE):
            args[_BAD] = 1
        return 0

    return body


@inlined
def _kept_at(kept: Any, at: int, halves: bool) -> Any:
    if halves:
        return _u32(_u32(kept[_at(at)]) << _u32(16)).view(_f32)
    return kept[_at(at)]


def spread(dtype: str, m: int, halves: bool) -> Any:
    """The sum of the terms plus the kept elements in their places."""
    elements_at, kept_at = ELEMENTS_AT[dtype], ELEMENTS_AT["bfloat16" if halves else "float32"]
    span = _BATCH * m

    def body(args: Any) -> int:
        source, numel, runs = source_of(args, elements_at), args[_NUMEL], args[_RUNS]
        target = elements_at(args, _OUT), args[_OUT_STREAMS] != 0
        places, kept, room = bytes_at(args, _CODES), kept_at(args, _LEVELS), stack_floats(span)
        lo, hi = next_part(args, _FIRST_PASS)
        while lo < hi:
            for batch in range(lo, hi):
                at, first = batch * span, batch * _BATCH
                for r in range(min(_BATCH, runs - first)):
                    place = (places[_at((first + r) >> 1)] >> (4 * (r & 1))) & 15
                    value = _kept_at(kept, first + r, halves)
                    for j in range(m):  # all of a run at once, and nothing where no encoder would point
                        room[_at(r * m + j)] = value if j == place else _f32(0)
                for j in range(0, min(span, numel - at), LANES):
                    ask_for_expected(source, at + j + AHEAD)
                    have = numel - at - j
                    put(expected_at(source, at + j, have), load(room, j), target, at + j, have)
            lo, hi = next_part(args, _FIRST_PASS)
        settle_streams()
        return 0

    return body
