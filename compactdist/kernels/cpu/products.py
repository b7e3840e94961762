"""What codecs of products call: tensors to blocks for the loops of ``lowrank.py`` and ``rotations.py``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compactdist.kernels.cpu import call
from compactdist.kernels.cpu.call import Work
from compactdist.kernels.cpu.native import address_of
from compactdist.kernels.cpu.steps import DTYPES, Block, scratch, second_rounded, second_term
from compactdist.kernels.offsets import WIDTH, Offsets, offsets_of
from compactdist.kernels.spec import MatrixView, MovingTerm, Rounded
from compactdist.kernels.threads import team

__all__ = [
    "add_product",
    "expected_slots",
    "fit_levels",
    "multiply",
    "placed",
    "run_alone",
    "supports",
    "sweep",
    "take_in",
]


def supports(*tensors: Tensor) -> bool:
    """Whether ``take_in`` and ``add_product`` apply: contiguous CPU tensors of one known dtype."""
    return all(one.is_cpu and one.dtype == tensors[0].dtype in DTYPES and one.is_contiguous() for one in tensors)


def take_in(x: Tensor, terms: tuple[Tensor, ...], view: MatrixView, out: Tensor) -> Tensor:
    """Write ``x`` less the sum of ``terms`` as matrices to ``out``, bfloat16 ``(G, R, C)``, rounded once.

    Returns:
        Frobenius norms before rounding, float32 ``(G,)``.
    """
    groups, rows, _ = view.shape
    squares, offsets = np.empty(groups * rows, np.float32), offsets_of(view)
    slots = placed(offsets) | expected_slots(terms)
    slots |= {call.X: x.data_ptr(), call.OUT: out.data_ptr(), call.SQUARES: squares.ctypes.data}
    run_alone(Work(groups * rows, view.numel, address_of("lowrank.take_in", DTYPES[x.dtype])), slots)
    norms = np.sqrt(squares.reshape(groups, rows).sum(1, dtype=np.float64))
    return torch.from_numpy(norms.astype(np.float32))


def multiply(u: Tensor, v: Tensor, smallest: float, gain: Tensor) -> Tensor:
    """``(G, r, R)`` and ``(G, r, C)`` to ``(G, R, C)``: sums over r, below ``smallest`` zero, times a gain by group."""
    groups, _, rows = u.shape
    channels = v.shape[2]
    at = np.arange(0, channels, WIDTH, dtype=np.int64)
    row_at = np.arange(groups * rows, dtype=np.int64) * channels
    lengths = np.diff(np.append(at, channels))
    out = torch.empty(groups, rows, channels, dtype=torch.float32, device="cpu")
    offsets = Offsets(row_at, at, at, lengths, rows, channels, groups * rows * channels)
    _add_product(u, v, smallest, gain, {call.TERMS: -1}, offsets, out)
    return out


def add_product(
    u: Tensor, v: Tensor, smallest: float, gain: Tensor, terms: tuple[Tensor, ...], view: MatrixView, out: Tensor
) -> None:
    """Write the sum of ``terms`` plus what ``multiply`` gives to ``out``, kept finite and rounded once.

    ``out`` may be the first of the terms.
    """
    _add_product(u, v, smallest, gain, expected_slots(terms), offsets_of(view), out)


def _add_product(
    u: Tensor, v: Tensor, smallest: float, gain: Tensor, given: dict[int, int], offsets: Offsets, out: Tensor
) -> None:
    groups, rank, rows = u.shape
    u, v, gain, numbers = (
        u.contiguous(),
        v.contiguous(),
        gain.reshape(-1).contiguous(),
        np.array([smallest], np.float32),
    )
    slots = placed(offsets) | given
    slots |= {
        call.OUT: out.data_ptr(),
        call.U: u.data_ptr(),
        call.V: v.data_ptr(),
        call.GAINS: gain.data_ptr(),
        call.RANK: rank,
        call.NUMBERS: numbers.ctypes.data,
    }
    body = address_of("lowrank.add_product", DTYPES[out.dtype])
    run_alone(Work(groups * rows, groups * rows * v.shape[2] * rank, body), slots)


def fit_levels(
    factor: Tensor, smallest: float, borders: Sequence[float], magnitudes: Sequence[float], sigma: float, refits: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As ``factors._fit``, with elements below ``smallest`` as zeros."""
    count, length = factor.shape
    codes, level = (
        torch.empty(count, length, dtype=torch.uint8, device="cpu"),
        torch.empty(count, length, dtype=torch.float32, device="cpu"),
    )
    scale, near = (
        torch.empty(count, 1, dtype=torch.float32, device="cpu"),
        torch.empty(count, 1, dtype=torch.float32, device="cpu"),
    )
    limits, levels = list(borders), list(magnitudes)
    if not limits:  # a search among none cannot be compiled: a border that nothing exceeds
        limits, levels = [np.inf], levels * 2
    numbers, factor = np.array([smallest, sigma, *limits, *levels], np.float32), factor.contiguous()
    slots = {
        call.X: factor.data_ptr(),
        call.CODES: codes.data_ptr(),
        call.LENGTH: length,
        call.REFITS: refits,
        call.RANK: len(magnitudes),
        call.NUMBERS: numbers.ctypes.data,
        call.LEVELS: level.data_ptr(),
        call.SCALES: scale.data_ptr(),
        call.NEAR: near.data_ptr(),
    }
    work = Work(count, factor.numel() * refits, address_of("lowrank.fit_levels", len(limits)))
    run_alone(work, slots, own=-(-3 * length // 16) * 16)
    return codes, level, scale, near


def sweep(matrices: Tensor, basis: Tensor, sizes: Sequence[int], smallest: float) -> tuple[Tensor, Tensor]:
    """As ``reference.rotations.sweep``, for sizes of at least 4."""
    count, n, _ = matrices.shape
    width = basis.shape[2]
    matrices, basis = (
        matrices.clone(memory_format=torch.contiguous_format),
        basis.clone(memory_format=torch.contiguous_format),
    )
    numbers, each = np.array([smallest], np.float32), np.array(sizes, np.int64)
    slots = {
        call.X: matrices.data_ptr(),
        call.OUT: basis.data_ptr(),
        call.LENGTH: n,
        call.CHANNELS: width,
        call.ROW_AT: each.ctypes.data,
        call.NUMBERS: numbers.ctypes.data,
    }
    most = max(sizes)
    body = address_of("rotations.sweep")
    run_alone(Work(count, 8 * count * most * most * width, body), slots, own=-(-2 * most // 16) * 16)
    return matrices, basis


def placed(offsets: Offsets) -> dict[int, int]:
    """The slots of offsets."""
    return {
        call.ROW_AT: offsets.row_at.ctypes.data,
        call.CHUNK_AT: offsets.chunk_at.ctypes.data,
        call.CHUNK_FROM: offsets.chunk_from.ctypes.data,
        call.CHUNK_LEN: offsets.chunk_len.ctypes.data,
        call.CHUNKS: offsets.chunk_at.size,
        call.ROWS: offsets.rows,
        call.CHANNELS: offsets.channels,
        call.NUMEL: offsets.numel,
        call.ROW_COUNT: offsets.row_at.size,
    }


def expected_slots(terms: tuple[MovingTerm, ...]) -> dict[int, int]:
    """The slots of the terms of a prediction, for loops compiled for ``loops_of`` these."""
    if not terms:
        return {call.TERMS: 0}
    if isinstance(first := terms[0], Rounded):
        slots = {call.BASE: first.codes.data_ptr(), call.VELOCITY: first.scales.data_ptr(), call.TERMS: 1}
        if len(terms) > 1:
            of_second = call.TERMS, call.FACTOR, call.SECOND, call.SECOND_SCALES
            slots |= zip(of_second, second_rounded(terms[1]), strict=True)
        return slots
    second_at, number, factor = (0, 1, 0) if len(terms) == 1 else second_term(terms[1])
    return {call.BASE: first.data_ptr(), call.VELOCITY: second_at, call.TERMS: number, call.FACTOR: factor}


def run_alone(work: Work, slots: dict[int, int], own: int = 0) -> Block:
    """Run a work that stands alone, and return its block."""
    team.prepare()
    threads = torch.get_num_threads()
    if scratch.size < threads * own:
        scratch.grow(threads * own)
    given: dict[int, Any] = {
        call.THREADS: threads,
        call.TEAM: team.address,
        call.SCRATCH: scratch.address,
        call.OWN_ROOM: 0,
        call.OWN_EACH: own,
    }
    block = Block(address_of("entries.first_pass"), slots | given, {call.FIRST_PASS: work})
    block.run(block.address)
    return block
