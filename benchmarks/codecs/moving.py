"""What the fused CPU steps read and write of their tensors, moved without computing anything: what no step can beat.

Codes and scales are not in it. A new base is written past the caches, as the steps do. Words are those of
``compactdist/kernels/cpu_loops.py``.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from compactdist.kernels.cpu_elements import jit, next_part
from compactdist.kernels.cpu_memory import data_of, load, settle_streams, store, stream
from compactdist.kernels.cpu_vectors import folded, zeros
from compactdist.kernels.reference import LANES
from compactdist.kernels.threads import spread


@jit
def _one_from_two(parts, x, base, out):  # type: ignore[no-untyped-def]
    given, before, to = data_of(x), data_of(base), data_of(out)
    lo, hi = next_part(parts)
    while lo < hi:
        for at in range(lo * LANES, hi * LANES, LANES):
            stream(load(given, at) + load(before, at), to, at)
        lo, hi = next_part(parts)
    settle_streams()


@jit
def _read_two(parts, x, base, sums):  # type: ignore[no-untyped-def]
    given, before, total = data_of(x), data_of(base), zeros()
    lo, hi = next_part(parts)
    while lo < hi:
        for at in range(lo * LANES, hi * LANES, LANES):
            total = total + (load(given, at) + load(before, at))
        lo, hi = next_part(parts)
    sums[0] = folded(total)


@jit
def _in_place(parts, held):  # type: ignore[no-untyped-def]
    to = data_of(held)
    lo, hi = next_part(parts)
    while lo < hi:
        for at in range(lo * LANES, hi * LANES, LANES):
            store(load(to, at) + np.float32(1), to, at)
        lo, hi = next_part(parts)


def _words(tensor: Tensor) -> np.ndarray:
    """A tensor's memory as float32, of which the sums mean nothing."""
    words: np.ndarray = tensor.view(torch.float32).numpy()
    return words


def _each(words: np.ndarray) -> tuple[int, int]:
    return words.size // LANES, words.size


def move_for_blocks(x: Tensor, base: Tensor, out: Tensor) -> None:
    """Read ``x`` and ``base`` and write ``out``: what encoding with scales of blocks does.

    All of one size, a multiple of 256 bytes, that begin a cache line.
    """
    arrays = _words(x), _words(base), _words(out)
    spread(lambda parts: _one_from_two(parts, *arrays), *_each(arrays[0]))


def move_for_rows(x: Tensor, base: Tensor, out: Tensor) -> None:
    """The same after reading ``x`` and ``base`` once before: what scales of rows and channels take."""
    arrays, sums = (_words(x), _words(base)), np.empty(1, np.float32)
    spread(lambda parts: _read_two(parts, *arrays, sums), *_each(arrays[0]))
    move_for_blocks(x, base, out)


def move_for_decoding(held: Tensor) -> None:
    """Read and write a tensor in place, as decoding does."""
    words = _words(held)
    spread(lambda parts: _in_place(parts, words), *_each(words))
