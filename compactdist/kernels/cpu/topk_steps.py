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

__all__ = ["Picks"]


class Picks:
    """See ``kernels.Picks``.

    Args:
        m: elements of a run.
        runs: how many there are; behind the last element zeros fill them up.
    """

    __slots__ = ("_m", "_runs")

    def __init__(self, m: int, runs: int) -> None:
        self._m, self._runs = m, runs

    def pick(self, x: Tensor, terms: tuple[Tensor, ...], places: Tensor, kept: Tensor) -> bool:
        """See ``kernels.Picks``; ``x`` and terms are contiguous, of a dtype of ``DTYPES``."""
        places[-(-self._runs // 2) :] = 0
        kept[(2 * self._runs if kept.dtype == torch.uint8 else self._runs) :] = 0
        slots = self._slots(x.numel(), terms, places, kept, {call.X: x.data_ptr()})
        block = run_alone(self._work("topk.pick", x, kept), slots)
        return not block.slots[call.BAD]

    def spread(self, places: Tensor, kept: Tensor, terms: tuple[Tensor, ...], out: Tensor) -> None:
        """See ``kernels.Picks``."""
        streams = out.nbytes >= STREAMED_NBYTES and out.data_ptr() % CACHE_LINE == 0
        # x is not read: out stands in for it, so that what is asked for ahead is memory
        given = {call.X: out.data_ptr(), call.OUT: out.data_ptr(), call.OUT_STREAMS: int(streams)}
        run_alone(self._work("topk.spread", out, kept), self._slots(out.numel(), terms, places, kept, given))

    def _work(self, unit: str, like: Tensor, kept: Tensor) -> Work:
        body = address_of(unit, DTYPES[like.dtype], self._m, kept.dtype == torch.uint8)
        return Work(-(-self._runs // LANES), like.numel(), body)

    def _slots(
        self, numel: int, terms: tuple[Tensor, ...], places: Tensor, kept: Tensor, given: dict[int, int]
    ) -> dict[int, int]:
        shared = {call.NUMEL: numel, call.ROW_COUNT: self._runs}
        shared |= {call.CODES: places.data_ptr(), call.LEVELS: kept.data_ptr()}
        return shared | expected_slots(terms) | given
