"""Sums of squares by which a sender judges a frame, ``reference/energies.py``, in one launch and one addition."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from compactdist.kernels.gpu.elements import DTYPES, expected, read
from compactdist.kernels.gpu.launch import Launch, Slot, run
from compactdist.kernels.gpu.plan import INTERPRETED, MOST_ELEMENTS
from compactdist.kernels.gpu.terms import TERMS, source_of
from compactdist.kernels.spec import MovingTerm

__all__ = ["energies", "supports"]

_BLOCK, _BLOCKS = (1 << 14, 2) if INTERPRETED else (1 << 10, 8)


@triton.jit
def sum_squares(
    x, base, second, base_scales, second_scales, coefficient, value, sums, numel,
    TERMS: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums over ``BLOCKS`` blocks.

    Args:
        x: flat ``[numel]``.
        base: see ``elements.expected``.
        second: likewise.
        base_scales: likewise.
        second_scales: likewise.
        coefficient: likewise.
        value: the reconstruction, as ``x``.
        sums: float64 ``[programs, 3]``.
        numel: elements.
        TERMS: see ``elements.expected``.
        BLOCKS: of a program.
        BLOCK: elements of a block.
    """
    terms = (base, second, base_scales, second_scales, coefficient)
    program = tl.program_id(0)
    energy = tl.zeros((BLOCK,), tl.float64)
    residual, error = energy, energy
    for block in range(BLOCKS):
        at = (program * BLOCKS + block) * BLOCK + tl.arange(0, BLOCK)
        there = at < numel
        exact = read(x, at, there).to(tl.float64)  # differences of huge values leave float32
        changed = exact - expected(terms, at, there, TERMS).to(tl.float64)
        lost = exact - read(value, at, there).to(tl.float64)
        energy += exact * exact
        residual += changed * changed
        error += lost * lost
    tl.store(sums + 3 * program, tl.sum(energy, axis=0))
    tl.store(sums + 3 * program + 1, tl.sum(residual, axis=0))
    tl.store(sums + 3 * program + 2, tl.sum(error, axis=0))


def supports(dtype: torch.dtype, numel: int) -> bool:
    """Whether there are kernels for such tensors of a device that has kernels."""
    return dtype in DTYPES and 0 < numel <= MOST_ELEMENTS


@lru_cache(maxsize=256)
def _summing(numel: int, dtype: torch.dtype, codes: torch.dtype, terms: int) -> Launch:
    """The launch for tensors of a dtype; ``codes``: dtype of the base, or of its codes."""
    grid = -(-numel // (_BLOCKS * _BLOCK))
    constants = {"TERMS": terms, "BLOCKS": _BLOCKS, "BLOCK": _BLOCK, "num_warps": 4, "enable_fp_fusion": False}
    given = 1 + TERMS + 2
    return Launch(sum_squares, grid, (*map(Slot, range(given)), numel), given, constants)


def energies(x: Tensor, terms: tuple[MovingTerm, ...], value: Tensor) -> Tensor:
    """See ``kernels.energies``."""
    x = x.contiguous()
    number, source = source_of(terms, x)
    launch = _summing(x.numel(), x.dtype, source[0].dtype, number)
    sums = torch.empty((launch.grid, 3), dtype=torch.float64, device=x.device)
    run(launch, (x, *source, value.contiguous(), sums), x.device)
    return sums.sum(0)
