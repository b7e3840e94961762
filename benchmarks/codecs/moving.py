"""What the fused CPU steps read and write of their tensors, moved without computing anything: what no step can beat.

Codes and scales are not in it. A new base is written past the caches, as the steps do. Words are those of
``compactdist/kernels/cpu/call.py``.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compactdist.kernels.cpu import call, native
from compactdist.kernels.cpu.call import Work
from compactdist.kernels.cpu.simd.memory import load, settle_streams, store, stream
from compactdist.kernels.cpu.simd.slots import floats_at, next_part
from compactdist.kernels.cpu.simd.vectors import folded, zeros
from compactdist.kernels.cpu.steps import Block
from compactdist.kernels.reference import LANES
from compactdist.kernels.threads import team

_X, _BASE, _OUT, _FIRST_PASS, _ONE = call.X, call.BASE, call.OUT, call.FIRST_PASS, np.float32(1)


@cache
def _one_from_two() -> int:
    def body(args: Any) -> int:
        given, before, to = floats_at(args, _X), floats_at(args, _BASE), floats_at(args, _OUT)
        lo, hi = next_part(args, _FIRST_PASS)
        while lo < hi:
            for at in range(lo * LANES, hi * LANES, LANES):
                stream(load(given, at) + load(before, at), to, at)
            lo, hi = next_part(args, _FIRST_PASS)
        settle_streams()
        return 0

    return native.build(body)


@cache
def _read_two() -> int:
    def body(args: Any) -> int:
        given, before, total = floats_at(args, _X), floats_at(args, _BASE), zeros()
        lo, hi = next_part(args, _FIRST_PASS)
        while lo < hi:
            for at in range(lo * LANES, hi * LANES, LANES):
                total = total + (load(given, at) + load(before, at))
            lo, hi = next_part(args, _FIRST_PASS)
        floats_at(args, _OUT)[0] = folded(total)
        return 0

    return native.build(body)


@cache
def _in_place() -> int:
    def body(args: Any) -> int:
        to = floats_at(args, _OUT)
        lo, hi = next_part(args, _FIRST_PASS)
        while lo < hi:
            for at in range(lo * LANES, hi * LANES, LANES):
                store(load(to, at) + _ONE, to, at)
            lo, hi = next_part(args, _FIRST_PASS)
        return 0

    return native.build(body)


def _run(body: int, words: int, **tensors: Tensor) -> None:
    """Run a loop over float32 words, of which the sums mean nothing."""
    team.prepare()
    slots = {getattr(call, name): tensor.data_ptr() for name, tensor in tensors.items()}
    slots |= {call.THREADS: torch.get_num_threads(), call.TEAM: team.address}
    block = Block(native.address_of("entries.first_pass"), slots, {call.FIRST_PASS: Work(words // LANES, words, body)})
    block.run(block.address)


def move_for_blocks(x: Tensor, base: Tensor, out: Tensor) -> None:
    """Read ``x`` and ``base`` and write ``out``: what encoding in one pass does, as with scales of blocks.

    All of one size, a multiple of 256 bytes, that begin a cache line.
    """
    _run(_one_from_two(), x.nbytes // 4, X=x, BASE=base, OUT=out)


def move_for_rows(x: Tensor, base: Tensor, out: Tensor) -> None:
    """The same after reading ``x`` and ``base`` once before: what scales of rows and channels take."""
    _run(_read_two(), x.nbytes // 4, X=x, BASE=base, OUT=torch.empty(1))
    move_for_blocks(x, base, out)


def move_for_decoding(held: Tensor) -> None:
    """Read and write a tensor in place, as decoding does."""
    _run(_in_place(), held.nbytes // 4, OUT=held)
