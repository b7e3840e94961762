"""What sessions of ``topk`` and ``topk_int4`` call: tensors to blocks for the loops of ``topk.py``."""

from __future__ import annotations

import torch
from torch import Tensor

from compactdist.kernels.cpu import call
from compactdist.kernels.cpu.call import Work
from compactdist.kernels.cpu.native import address_of
from compactdist.kernels.cpu.products import expected_slots, run_alone
from compactdist.kernels.cpu.steps import CACHE_LINE, DTYPES, STREAMED_NBYTES
from compactdist.kernels.reference import LANES

__all__ = ["pick", "spread"]


def pick(x: Tensor, terms: tuple[Tensor, ...], m: int, places: Tensor, kept: Tensor) -> bool:
    """Write places and kept elements of ``x`` less the sum of ``terms``, seen as one run after the other.

    Args:
        x: flat, contiguous, of a dtype of ``DTYPES``.
        terms: of the prediction, in the form of ``x``.
        m: elements of a run; behind the last element zeros fill up the last run.
        places: uint8, a byte for two runs.
        kept: float32, or uint8 for bfloat16, low byte first; one element for each run, and one more if the runs are
            odd in number, which becomes zero.

    Returns:
        Whether the residual was finite.
    """
    block = run_alone(_work("topk.pick", x, m, kept), _slots(x.numel(), terms, m, places, kept, {call.X: x.data_ptr()}))
    return not block.slots[call.BAD]


def spread(places: Tensor, kept: Tensor, m: int, terms: tuple[Tensor, ...], out: Tensor) -> None:
    """Write the sum of ``terms`` plus the kept elements in their places to ``out``, kept finite and rounded once.

    ``out`` may be the first of the terms.
    """
    streams = out.nbytes >= STREAMED_NBYTES and out.data_ptr() % CACHE_LINE == 0
    # x is not read: out stands in for it, so that what is asked for ahead is memory
    given = {call.X: out.data_ptr(), call.OUT: out.data_ptr(), call.OUT_STREAMS: int(streams)}
    run_alone(_work("topk.spread", out, m, kept), _slots(out.numel(), terms, m, places, kept, given))


def _work(unit: str, like: Tensor, m: int, kept: Tensor) -> Work:
    body = address_of(unit, DTYPES[like.dtype], m, kept.dtype == torch.uint8)
    return Work(-(-like.numel() // (m * LANES)), like.numel(), body)


def _slots(
    numel: int, terms: tuple[Tensor, ...], m: int, places: Tensor, kept: Tensor, given: dict[int, int]
) -> dict[int, int]:
    shared = {call.NUMEL: numel, call.ROW_COUNT: -(-numel // m)}
    shared |= {call.CODES: places.data_ptr(), call.LEVELS: kept.data_ptr()}
    return shared | expected_slots(terms) | given
