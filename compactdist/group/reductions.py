"""reduce_scatter_tensor and all_reduce of a wrapped group: compressed where the policy names a codec.

Both wait where they are issued, also when asked to be asynchronous: an all-reduce has to decode between its two legs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from compactdist import _torch
from compactdist.errors import BadOutputError, CaptureError, CompactDistError
from compactdist.exchange.engine import Flight
from compactdist.exchange.link import as_work
from compactdist.exchange.patterns.base import Pattern
from compactdist.exchange.patterns.reductions import ALL_REDUCE, ALL_REDUCE_SUMS, REDUCE_SCATTER, add_in_rank_order
from compactdist.exchange.plan import Call
from compactdist.exchange.work import PendingWork
from compactdist.group.core import GroupCore, nbytes_of
from compactdist.observe.stats import PassReason

__all__ = ["Reductions"]


class Reductions(GroupCore):
    """The reductions of :class:`~compactdist.group.process_group.CompressedProcessGroup`."""

    def _reduces(self, pattern: Pattern, op: str, opts: Any, nbytes: float, x: Tensor) -> bool:
        """Whether a reduction of ``x`` may be compressed; otherwise it is counted as passed through."""
        asked = self._engine.chooser.policy is not None and x.numel() > 0
        alone = self._engine.link.together is None  # two legs cannot be issued together
        if asked and alone and x.layout is torch.strided and _adds_up(opts):
            return True
        if asked:
            self._agree_to_pass(pattern, op, PassReason.OP, "another reduction")
        self._pass(op, PassReason.OP, nbytes)
        return False

    def _chunks_of_all(
        self, pattern: Pattern, site: str, chunks: list[Tensor], nbytes: float
    ) -> tuple[Call, list[Tensor], CompactDistError | None] | None:
        """The call, this rank's chunk of every rank's tensor, in rank order, and the error of the exchange.

        ``None``: the call passes through.
        """
        engine, first = self._engine, chunks[0]
        sizes = tuple(chunk.numel() for chunk in chunks)
        arriving = (sizes[engine.rank],) * engine.size
        planned = self._plan(pattern, site, first, (sizes, arriving, first.dtype, first.device, True), nbytes)
        if planned is None:
            return None
        call, plan = planned
        own = chunks[engine.rank]
        parts = [torch.zeros_like(own) for _ in range(engine.size)]
        parts[engine.rank] = own
        others = [rank for rank in range(engine.size) if rank != engine.rank]
        flight = Flight(
            plan, call, [chunks[r] for r in others], [parts[r] for r in others], _options("AllToAllOptions")
        )
        try:
            self._fly(flight, [])
        except CompactDistError as error:
            if flight.work is None:  # nothing was sent
                raise
            return call, parts, error
        return call, parts, None

    def _scatter_sums(self, output: Tensor, x: Tensor, opts: Any) -> Any:
        """The work of a compressed reduce-scatter; ``None``: it passes through, and was counted."""
        size = self._engine.size
        nbytes = (size - 1) / size * x.nbytes
        if not self._reduces(REDUCE_SCATTER, "reduce_scatter", opts, nbytes, x):
            return None
        if output.numel() * size != x.numel() or output.dtype != x.dtype:
            raise BadOutputError(
                f"{self._engine.label}, reduce_scatter: the output holds {output.numel()} x {output.dtype}, but a "
                f"rank's share of {x.numel()} x {x.dtype} among {size} ranks will arrive; nothing was sent"
            )
        chunks = list(x.detach().reshape(-1).chunk(size))
        arrived = self._chunks_of_all(REDUCE_SCATTER, "reduce_scatter", chunks, nbytes)
        if arrived is None:
            return None
        _, parts, error = arrived
        if error is not None:
            raise error
        self._write(output, add_in_rank_order(parts, mean=_is_mean(opts)))
        return PendingWork((), [output], self._future_pool)

    def _reduce_to_all(self, x: Tensor, opts: Any) -> Any:
        """The work of a compressed all-reduce of ``x`` in place; ``None``: it passes through, and was counted."""
        size = self._engine.size
        nbytes = 2 * (size - 1) / size * nbytes_of((x,))
        if not self._reduces(ALL_REDUCE, "all_reduce", opts, nbytes, x):
            return None
        flat = x.detach().reshape(-1)
        each = -(-flat.numel() // size)
        padded = pad(flat, (0, size * each - flat.numel()))
        arrived = self._chunks_of_all(ALL_REDUCE, "all_reduce", list(padded.chunk(size)), nbytes)
        if arrived is None:
            return None
        call, parts, error = arrived
        sums = add_in_rank_order(parts, mean=_is_mean(opts)).to(x.dtype)
        if error is not None:
            sums.fill_(float("nan"))  # the other ranks wait for the second leg: this makes it raise there, too
        everyones = torch.empty_like(padded)
        try:
            self._gather_sums(everyones, sums)
        except CompactDistError as second:
            if isinstance(second, CaptureError):
                self._take_back(call)  # the graph, and the first leg in it, comes to nothing
            raise error or second from None
        if error is not None:
            raise error
        self._write(x, everyones[: flat.numel()])
        return PendingWork((), [x], self._future_pool)

    def _gather_sums(self, everyones: Tensor, sums: Tensor) -> None:
        engine, numel = self._engine, sums.numel()
        signature = numel, sums.dtype, sums.device
        with _torch.without_autograd():
            planned = self._plan(ALL_REDUCE_SUMS, "all_reduce/sums", sums, signature, (engine.size - 1) * sums.nbytes)
            rows = list(everyones.chunk(engine.size))
            if planned is None:
                as_work(_torch.all_gather_single(self.inner, everyones, sums, None)).wait()
                return
            call, plan = planned
            own = rows.pop(engine.rank)
            self._fly(Flight(plan, call, (sums,), rows, _options("AllgatherOptions"), sums, own), [])

    @staticmethod
    def _write(target: Tensor, value: Tensor) -> None:
        with _torch.without_autograd():
            target.copy_(value.view(target.shape))


def _adds_up(opts: Any) -> bool:
    return _is_mean(opts) or bool(opts.reduceOp == dist.ReduceOp.SUM)


def _is_mean(opts: Any) -> bool:
    return bool(opts.reduceOp == dist.ReduceOp.AVG)


def _options(name: str) -> Any:
    """Options of a call that is done when it returns."""
    options = _torch.options(name)
    options.asyncOp = False
    return options
