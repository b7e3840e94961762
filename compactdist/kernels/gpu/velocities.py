"""Velocities of predictions: worked out, chosen by a sender and taken from a frame by a receiver, in one launch each or
two, where torch takes up to twenty-five. ``spec.Velocity`` says what one is, to the bit.

A sender's sums are in an order of their own: what it chooses, its frame says.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from compactdist.kernels.gpu.elements import DTYPES, clamped, from_bits, read, read_rounded, round_half_even, write
from compactdist.kernels.gpu.launch import Launch, Series, Slot, run
from compactdist.kernels.gpu.plan import INTERPRETED, MOST_ELEMENTS
from compactdist.kernels.spec import Rounded, Term, Velocity

__all__ = ["Rule", "choose", "expect", "supports", "write_out"]

_BLOCK = 1 << (14 if INTERPRETED else 11)
_EXACT = {"enable_fp_fusion": False}


@triton.jit
def make_velocity(
    base, previous, coefficient, out, numel, limit, factor, GIVEN: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """``BLOCK`` elements of a velocity.

    Args:
        base: flat ``[numel]``.
        previous: as ``base``.
        coefficient: float32, if ``GIVEN``; else anything.
        out: as ``base``.
        numel: elements.
        limit: largest value of the dtype.
        factor: the coefficient, unless it is ``GIVEN``.
        GIVEN: the coefficient is in memory.
        BLOCK: elements of a program.
    """
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = at < numel
    change = clamped(read(base, at, there) - read(previous, at, there), limit)
    if GIVEN:
        factor = tl.load(coefficient)
        write(out, at, tl.where(factor == 0, -0.0, change * factor), there)
    else:
        write(out, at, change * factor, there)


@triton.jit
def weigh_run(
    x, base, previous, base_scales, previous_scales, sums, numel, distance,
    IN_EIGHT_BITS: tl.constexpr, DTYPE: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """Sums over the run of this program, by which ``choose_coefficient`` chooses.

    Args:
        x: flat ``[numel]``.
        base: as ``x``, or codes of as many elements.
        previous: as ``base``.
        base_scales: of codes.
        previous_scales: likewise.
        sums: float64 ``[runs, 2]``; gets the sum of products of what ``x`` and ``base`` changed by, and the sum of
            squares of the latter.
        numel: elements.
        distance: between the beginnings of two runs.
        IN_EIGHT_BITS: there are codes.
        DTYPE: of the tensors, see ``elements.DTYPES``.
        RUN: elements of a run.
    """
    run_number = tl.program_id(0)
    at = run_number * distance + tl.arange(0, RUN)
    there = at < numel
    if IN_EIGHT_BITS:
        last = read_rounded(base, base_scales, at, there, DTYPE)
        change = last - read_rounded(previous, previous_scales, at, there, DTYPE)
    else:
        last = read(base, at, there)
        change = last - read(previous, at, there)
    along = (read(x, at, there) - last) * change
    tl.store(sums + 2 * run_number, tl.sum(along.to(tl.float64), axis=0))
    tl.store(sums + 2 * run_number + 1, tl.sum((change * change).to(tl.float64), axis=0))


@triton.jit
def choose_coefficient(sums, coefficient, runs, share, grid, finest, largest, RUNS: tl.constexpr):
    """The coefficient that a frame says, by the sums of ``weigh_run``; 0 where they are not finite, or nothing changed.

    Args:
        sums: float64 ``[runs, 2]``.
        coefficient: float32, to be written.
        runs: how many there are.
        share: of the coefficient of least squares.
        grid: ``1 / finest``.
        finest: coefficients are multiples of it, a power of two.
        largest: they have at most this magnitude.
        RUNS: a power of two, at least ``runs``.
    """
    number = tl.arange(0, RUNS)
    there = number < runs
    along = tl.sum(tl.load(sums + 2 * number, mask=there, other=0), axis=0)
    energy = tl.sum(tl.load(sums + 2 * number + 1, mask=there, other=0), axis=0)
    usable = (energy > 0) & (energy < float("inf")) & (tl.abs(along) < float("inf"))
    best = tl.where(usable, along, 0) / tl.where(usable, energy, 1)
    best = clamped(best, largest).to(tl.float32) * (share * grid)
    size = round_half_even(tl.abs(best)) * finest
    tl.store(coefficient, tl.where((best < 0) & (size > 0), -size, size))


@triton.jit
def take_coefficient(frame, coefficient, grid, largest, AT: tl.constexpr, MAY: tl.constexpr):
    """The coefficient that a frame says, if it may say that; else 0.

    Args:
        frame: uint8.
        coefficient: float32, to be written.
        grid: as for ``choose_coefficient``.
        largest: as there.
        AT: place of the coefficient's four bytes.
        MAY: a frame may say another coefficient than 0.
    """
    bits = tl.load(frame + AT).to(tl.int32)
    for byte in tl.static_range(1, 4):
        bits = bits | (tl.load(frame + AT + byte).to(tl.int32) << (8 * byte))
    said = from_bits(bits)
    size = tl.abs(said)
    known = (size <= largest) & (size * grid == round_half_even(tl.minimum(size, largest) * grid))
    if MAY:
        tl.store(coefficient, tl.where(known, said, 0.0))
    else:
        tl.store(coefficient, 0.0)


class Rule(NamedTuple):
    """Which coefficients are chosen, and may be said.

    Attributes:
        share: of the coefficient of least squares.
        grid: they are multiples of one over it, a power of two.
        largest: magnitude.
    """

    share: float
    grid: int
    largest: float


def supports(dtype: torch.dtype, numel: int) -> bool:
    """Whether there are kernels for such tensors of a device that has kernels."""
    return dtype in DTYPES and 0 < numel <= MOST_ELEMENTS


def write_out(term: Velocity, out: Tensor) -> None:
    """Write a velocity to ``out``, contiguous ``[numel]`` of its dtype, which may be ``previous``."""
    base, previous = cast(Tensor, term.base), cast(Tensor, term.previous)
    given = isinstance(term.coefficient, Tensor)
    coefficient = term.coefficient if isinstance(term.coefficient, Tensor) else base
    factor = 0.0 if given else term.coefficient
    launch = _making(term.numel(), term.dtype, factor, given)
    run(launch, (base, previous, coefficient, out), term.device)


def choose(
    x: Tensor,
    kept: tuple[Term, Term],
    samples: tuple[int, int, int],
    rule: Rule,
    out: Tensor,
    queue: int | None = None,
) -> None:
    """Write the coefficient that a frame says to ``out``.

    Args:
        x: what is to be sent, flat, contiguous.
        kept: the last reconstruction and the one before, of the same dtype; both tensors, or both in eight bits.
        samples: how many runs stand for a tensor, how far apart they begin, how many elements they have.
        rule: of the coefficient.
        out: float32 ``[]``.
        queue: as for ``launch.run``.
    """
    base, previous = kept
    if isinstance(base, Rounded):
        assert isinstance(previous, Rounded)
        given = base.codes, previous.codes, base.scales, previous.scales
    else:
        assert isinstance(previous, Tensor)
        given = base, previous, x, x
    sums = torch.empty(2 * samples[0], dtype=torch.float64, device=x.device)
    form = None if isinstance(base, Tensor) else base.codes.dtype
    run(_choosing(x.numel(), x.dtype, form, samples, rule), (x, *given, sums, out), x.device, queue)


def expect(frame: Tensor, at: int, rule: Rule | None, out: Tensor, queue: int | None = None) -> None:
    """Write the coefficient that a frame says to ``out``; 0 where it is one that a frame may not say.

    Args:
        frame: 1-D uint8.
        at: where the coefficient's four bytes begin.
        rule: of the coefficient; ``None``: only 0 may be said.
        out: float32 ``[]``.
        queue: as for ``launch.run``.
    """
    run(_taking(at, rule), (frame, out), frame.device, queue)


@lru_cache(maxsize=256)
def _making(numel: int, dtype: torch.dtype, factor: float, given: bool) -> Launch:
    constants = {"GIVEN": given, "BLOCK": _BLOCK, "num_warps": 4, **_EXACT}
    arguments = (*map(Slot, range(4)), numel, torch.finfo(dtype).max, factor)
    return Launch(make_velocity, -(-numel // _BLOCK), arguments, 4, constants)


@lru_cache(maxsize=256)
def _choosing(
    numel: int, dtype: torch.dtype, codes: torch.dtype | None, samples: tuple[int, int, int], rule: Rule
) -> Series:
    """Of ``(x, base, previous, base_scales, previous_scales, sums, out)``.

    ``codes``: dtype of the codes of the history, if that is in eight bits.
    """
    runs, distance, length = samples
    weighing = (*map(Slot, range(6)), numel, distance)
    kept = {"IN_EIGHT_BITS": codes is not None, "DTYPE": DTYPES[dtype]}
    choosing = (Slot(5), Slot(6), runs, rule.share, float(rule.grid), 1 / rule.grid, rule.largest)
    return Series(
        [
            Launch(weigh_run, runs, weighing, 7, {**kept, "RUN": length, "num_warps": 1, **_EXACT}),
            Launch(
                choose_coefficient, 1, choosing, 7, {"RUNS": triton.next_power_of_2(runs), "num_warps": 4, **_EXACT}
            ),
        ]
    )


@lru_cache(maxsize=64)
def _taking(at: int, rule: Rule | None) -> Launch:
    numbers = (0.0, 0.0) if rule is None else (float(rule.grid), rule.largest)
    constants = {"AT": at, "MAY": rule is not None, "num_warps": 1, **_EXACT}
    return Launch(take_coefficient, 1, (Slot(0), Slot(1), *numbers), 2, constants)
