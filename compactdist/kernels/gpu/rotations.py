"""Jacobi sweeps in Triton: ``reference/rotations.py`` to the bit, one program for each matrix, in one launch.

How many rows of a matrix take part is read on the device. A round reads one copy of matrix and basis and writes the
other: each element follows from four elements of the matrix, or two of the basis. Between two rounds the program's
threads wait for each other.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from compactdist.kernels.gpu.launch import Launch, Slot, run

__all__ = ["LARGEST", "sweep", "sweep_held"]

LARGEST = 512
"""Rows of the largest matrix that a program takes."""

_ELEMENTS = 8192
"""That a program holds of a matrix."""


@triton.jit
def _pair_of(place, half, size):
    """The lower and the upper place of the pair that a place is in; a place that takes no part is with itself."""
    lower = tl.where(place < half, place, tl.where(place < size, place - half, place))
    return lower, tl.where(place < size, lower + half, place)


@triton.jit
def _place_after(place, half, size):
    """Which place each place takes over from after a round."""
    inner = tl.where(place < half, place - 1, tl.where(place < size - 1, place + 1, half - 1))
    return tl.where((place == 0) | (place >= size), place, tl.where(place == 1, half, inner))


@triton.jit
def _turn_of(source, lower, upper, ok, n, smallest):
    """Cosine and sine of the rotations of pairs; 1 and 0 where the element between is small."""
    first = tl.load(source + lower * n + lower, mask=ok, other=0)
    second = tl.load(source + upper * n + upper, mask=ok, other=0)
    between = tl.load(source + lower * n + upper, mask=ok, other=0)
    one = tl.full(first.shape, 1.0, tl.float32)
    small = (between * between <= smallest * tl.abs(first * second)) | (lower == upper)
    ratio = tl.div_rn(second - first, tl.where(small, one, between + between))
    tangent = tl.div_rn(one, tl.abs(ratio) + tl.sqrt_rn(one + ratio * ratio))
    tangent = tl.where(ratio < 0, -tangent, tangent)
    tangent = tl.where(small, 0.0, tangent)
    cosine = tl.div_rn(one, tl.sqrt_rn(one + tangent * tangent))
    return cosine, tangent * cosine


@triton.jit
def _turned(lower, upper, cosine, sine, is_lower, alone):
    made = tl.where(is_lower, cosine * lower - sine * upper, sine * lower + cosine * upper)
    return tl.where(alone, lower, made)


@triton.jit
def _round(
    source, target, basis, other, size, n, width, smallest, SIDE: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    """All pairs of one matrix and its basis, ``ROWS`` rows at a time. Where ``size`` is 0 it copies them."""
    half = size // 2
    column, channel = tl.arange(0, SIDE)[None, :], tl.arange(0, WIDTH)[None, :]
    from_column = _place_after(column, half, size)
    left, right = _pair_of(from_column, half, size)
    along, sine_along = _turn_of(source, left, right, column < n, n, smallest)
    is_left, left_alone = from_column == left, left == right
    for start in range(0, n, ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        from_row = _place_after(row, half, size)
        above, below = _pair_of(from_row, half, size)
        cosine, sine = _turn_of(source, above, below, row < n, n, smallest)
        ok, is_above, alone = (row < n) & (column < n), from_row == above, above == below
        top, bottom = source + above * n, source + below * n
        of_left = _turned(
            tl.load(top + left, mask=ok, other=0), tl.load(bottom + left, mask=ok, other=0),
            cosine, sine, is_above, alone,
        )  # fmt: skip
        of_right = _turned(
            tl.load(top + right, mask=ok, other=0), tl.load(bottom + right, mask=ok, other=0),
            cosine, sine, is_above, alone,
        )  # fmt: skip
        made = _turned(of_left, of_right, along, sine_along, is_left, left_alone)
        tl.store(target + row * n + column, made, mask=ok)
        for first in range(0, width, WIDTH):
            there, at = (row < n) & (first + channel < width), first + channel
            upper = tl.load(basis + above * width + at, mask=there, other=0)
            lower = tl.load(basis + below * width + at, mask=there, other=0)
            tl.store(other + row * width + at, _turned(upper, lower, cosine, sine, is_above, alone), mask=there)


@triton.jit
def sweep_one(
    first, second, of_first, of_second, size, n, width, smallest,
    SIDE: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """A round less than rows take part, of ``first`` and its basis; ``second`` and ``of_second`` are room."""
    for turn in range(0, size // 2):
        _round(first, second, of_first, of_second, size, n, width, smallest, SIDE, ROWS, WIDTH)
        tl.debug_barrier()
        back = tl.where(2 * turn + 2 < size, size, 0)
        _round(second, first, of_second, of_first, back, n, width, smallest, SIDE, ROWS, WIDTH)
        tl.debug_barrier()


@triton.jit
def sweep_matrices(
    matrices, basis, sizes, n, width, smallest, copies, SIDE: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    """One matrix: a round less than rows take part, and a copy back.

    Args:
        matrices: float32 ``(2, copies, n, n)``: the matrices, which are written over, and room for a copy.
        basis: float32 ``(2, copies, n, width)``, likewise.
        sizes: int32 ``(copies,)``, how many rows of each matrix take part, even, at least 4.
        n: even.
    """
    matrix = tl.program_id(0)
    first, of_first = matrices + matrix * n * n, basis + matrix * n * width
    second, of_second = first + copies * n * n, of_first + copies * n * width
    size = tl.load(sizes + matrix)
    sweep_one(first, second, of_first, of_second, size, n, width, smallest, SIDE, ROWS, WIDTH)


@lru_cache(maxsize=256)
def _launch(count: int, n: int, width: int, smallest: float, device: torch.device) -> Launch:
    side, along = max(16, triton.next_power_of_2(n)), min(128, max(16, triton.next_power_of_2(width)))
    constants = {"SIDE": side, "ROWS": _ELEMENTS // side, "WIDTH": along, "num_warps": 8, "enable_fp_fusion": False}
    return Launch(sweep_matrices, count, (*map(Slot, range(3)), n, width, smallest, count), 3, constants)


def sweep(matrices: Tensor, basis: Tensor, sizes: Tensor, smallest: float) -> tuple[Tensor, Tensor]:
    """As ``reference.rotations.sweep``, with sizes on the device, int32 ``(M,)``, of at least 4.

    Elements of matrices between rows that take part and others are zero.
    """
    held, rows = (torch.stack((one, one)) for one in (matrices, basis))
    sweep_held(held, rows, sizes, smallest)
    return held[0], rows[0]


def sweep_held(held: Tensor, rows: Tensor, sizes: Tensor, smallest: float) -> None:
    """The same of matrices ``held[0]`` and a basis ``rows[0]``, which are written over; the second of each is room."""
    _, count, n, width = rows.shape
    run(_launch(count, n, width, smallest, held.device), (held, rows, sizes), held.device)
