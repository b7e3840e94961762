"""CompressedProcessGroup: every ProcessGroup method becomes one exchange, or goes to the inner group.

The object is a registered ``torch.distributed.ProcessGroup``: Python callers find its methods by name, C++ callers
(functional collectives, DDP) through torch's trampoline. Both the names of torch 2.13 and the older ones are defined.
Nothing of a call reaches the link before its arguments are checked, its key is fixed and its frame is complete.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from compactdist import _torch
from compactdist.errors import BadOutputError
from compactdist.exchange.all_to_all import all_to_all
from compactdist.exchange.broadcast import broadcast
from compactdist.exchange.gather import all_gather
from compactdist.exchange.work import Job
from compactdist.group.core import nbytes_of, override
from compactdist.group.lifecycle import GroupLifecycle
from compactdist.group.passthrough import PassThroughMethods
from compactdist.group.point_to_point import PointToPointMethods
from compactdist.group.torch_api import shared_name
from compactdist.observe.stats import PassReason

__all__ = ["CompressedProcessGroup"]


class CompressedProcessGroup(  # type: ignore[misc,override]
    PointToPointMethods, PassThroughMethods, GroupLifecycle, dist.ProcessGroup
):
    """A process group that sends compressed residuals of what each call site sent last; made by ``wrap``."""

    # --- all-gather -------------------------------------------------------------------------------------------------

    def _gather_job(self, outputs: list[Tensor] | Tensor, x: Tensor, opts: Any) -> Job | None:
        """``outputs``: one tensor per rank, or one for all."""
        links = self._ctx.size - 1
        call = self._begin("all_gather", "all_gather", x, links * nbytes_of([x]))
        if call is None:
            return None
        try:
            codec = self._codec(call, x.numel(), links * nbytes_of([x]))
            if codec is None:
                return None
            rows = self._rows(outputs, x) if isinstance(outputs, Tensor) else outputs
            return all_gather(self._ctx, call, codec, rows, x, opts)
        except BaseException:
            self._undo(call)
            raise

    @override
    def allgather(self, output_tensors: Any, input_tensors: Any, opts: Any = None) -> Any:
        """``output_tensors[i]`` is a list of ``size()`` tensors for ``input_tensors[i]``."""
        opts = opts or _torch.options("AllgatherOptions")
        several = len(input_tensors) != 1
        if several or len({t.numel() for t in output_tensors[0]}) > 1:
            reason = PassReason.OP if several else PassReason.UNEVEN
            self._pass("all_gather", reason, (self._ctx.size - 1) * nbytes_of(input_tensors))
        else:
            job = self._gather_job(list(output_tensors[0]), input_tensors[0], opts)
            if job is not None:
                return self._work([job], list(output_tensors[0]))
        return self.inner.allgather(output_tensors, input_tensors, opts)

    def _rows(self, output: Tensor, x: Tensor) -> list[Tensor]:
        if output.numel() != self._ctx.size * x.numel() or output.dtype != x.dtype:
            raise BadOutputError(
                f"{self._ctx.label}, all_gather: the output holds {output.numel()} x {output.dtype}, but "
                f"{self._ctx.size} x {x.numel()} x {x.dtype} will arrive; nothing was sent"
            )
        if not output.is_contiguous():
            raise BadOutputError(f"{self._ctx.label}, all_gather: the output must be contiguous; nothing was sent")
        return list(output.view(self._ctx.size, -1).unbind(0))

    def _gather_single(self, output: Tensor, x: Tensor, opts: Any) -> Any:
        """A job, or the inner group's work."""
        job = self._gather_job(output, x, opts)
        return job if job is not None else _torch.all_gather_single(self.inner, output, x, opts)

    @override
    @shared_name
    def all_gather_single(self, output_tensor: Tensor, input_tensor: Tensor, opts: Any = None) -> Any:
        """``[N, ...]`` of every rank into ``[size() * N, ...]`` (``_allgather_base`` before torch 2.13)."""
        part = self._gather_single(output_tensor, input_tensor, opts)
        return self._work([part], [output_tensor]) if isinstance(part, Job) else part

    @override
    def _allgather_base(self, output_tensor: Tensor, input_tensor: Tensor, opts: Any = None) -> Any:
        part = self._gather_single(output_tensor, input_tensor, opts)
        return self._work([part], [output_tensor]) if isinstance(part, Job) else part

    @override
    def all_gather_single_coalesced(self, output_tensors: Any, input_tensors: Any, opts: Any = None) -> Any:
        """Several single-tensor all-gathers in one call; functional collectives come here, even with one tensor."""
        outputs, inputs = list(output_tensors), list(input_tensors)
        parts = [self._gather_single(o, i, opts) for o, i in zip(outputs, inputs, strict=True)]
        return self._work(parts, outputs)

    allgather_into_tensor_coalesced = all_gather_single_coalesced  # type: ignore[assignment]

    @override
    def allgather_coalesced(self, output_lists: Any, input_list: Any, opts: Any = None) -> Any:
        """``output_lists[rank][i]`` receives ``input_list[i]`` of that rank."""
        parts: list[Any] = []
        for i, x in enumerate(input_list):
            outputs = [per_rank[i] for per_rank in output_lists]
            job = self._gather_job(outputs, x, opts)
            options = opts or _torch.options("AllgatherOptions")
            parts.append(job if job is not None else self.inner.allgather([outputs], [x], options))
        return self._work(parts, [t for per_rank in output_lists for t in per_rank])

    # --- all-to-all -------------------------------------------------------------------------------------------------

    def _exchange_chunks(self, whole: Tensor, sent: float, chunks: Any, opts: Any) -> Job | None:
        """``whole`` tells dtype and differentiability, ``chunks()`` gives outputs and inputs by rank."""
        call = self._begin("all_to_all", "all_to_all", whole, sent)
        if call is None:
            return None
        try:
            outputs, inputs = chunks()
            wrong = next((t for t in (*inputs, *outputs) if t.dtype != call.dtype), None)
            if wrong is not None:
                raise BadOutputError(
                    f"{self._ctx.label}, all_to_all: chunks of {call.dtype} and {wrong.dtype}; nothing was sent"
                )
            me = self._ctx.rank
            if inputs[me].numel() != outputs[me].numel():
                raise BadOutputError(
                    f"{self._ctx.label}, all_to_all: this rank's own chunk has {inputs[me].numel()} elements, the "
                    f"output for it {outputs[me].numel()}; nothing was sent"
                )
            return all_to_all(self._ctx, call, outputs, inputs, opts)
        except BaseException:
            self._undo(call)
            raise

    @override
    def alltoall(self, output_tensors: Any, input_tensors: Any, opts: Any = None) -> Any:
        """One tensor to and from every rank."""
        outputs, inputs = list(output_tensors), list(input_tensors)
        if len(outputs) != self._ctx.size or len(inputs) != self._ctx.size:
            raise BadOutputError(
                f"{self._ctx.label}, all_to_all: {len(inputs)} inputs and {len(outputs)} outputs for "
                f"{self._ctx.size} ranks; nothing was sent"
            )
        sent = nbytes_of(inputs) - nbytes_of([inputs[self._ctx.rank]])
        job = self._exchange_chunks(inputs[0], sent, lambda: (outputs, inputs), opts)
        if job is not None:
            return self._work([job], outputs)
        return self.inner.alltoall(outputs, inputs, opts or _torch.options("AllToAllOptions"))

    def _chunks(self, tensor: Tensor, splits: Sequence[int], what: str) -> list[Tensor]:
        size = self._ctx.size
        rows = tensor.shape[0] if tensor.dim() else 0
        if not splits:
            if rows % size:
                raise BadOutputError(
                    f"{self._ctx.label}, all_to_all: the {what}'s first dimension {rows} does not divide by {size} "
                    "ranks; nothing was sent"
                )
            splits = [rows // size] * size
        if len(splits) != size or sum(splits) != rows or min(splits) < 0:
            raise BadOutputError(
                f"{self._ctx.label}, all_to_all: {what} splits {list(splits)} do not cover the first dimension {rows} "
                f"with {size} chunks; nothing was sent"
            )
        return list(tensor.detach().split(list(splits)))

    def _to_all_single(self, output: Tensor, x: Tensor, out: Any, into: Any, opts: Any) -> Any:
        def chunks() -> tuple[list[Tensor], list[Tensor]]:
            return self._chunks(output, out or (), "output"), self._chunks(x, into or (), "input")

        known = into and len(into) == self._ctx.size
        own = into[self._ctx.rank] / max(1, sum(into)) if known else 1 / self._ctx.size
        job = self._exchange_chunks(x, (1 - own) * nbytes_of([x]), chunks, opts)
        if job is not None:
            return self._work([job], [output])
        return _torch.all_to_all_single(self.inner, output, x, list(out or ()), list(into or ()), opts)

    @override
    @shared_name
    def all_to_all_single(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        output_split_sizes: Any = (),
        input_split_sizes: Any = (),
        opts: Any = None,
    ) -> Any:
        """Splits along dimension 0; none, or equal ones given explicitly (functional collectives do), are even."""
        return self._to_all_single(output_tensor, input_tensor, output_split_sizes, input_split_sizes, opts)

    @override
    def alltoall_base(self, output: Tensor, x: Tensor, out: Any = (), into: Any = (), opts: Any = None) -> Any:
        """The name of ``all_to_all_single`` before torch 2.13."""
        return self._to_all_single(output, x, out, into, opts)

    # --- broadcast --------------------------------------------------------------------------------------------------

    @override
    @shared_name
    def broadcast(self, tensors: Any, opts: Any) -> Any:  # type: ignore[override]
        """The tensor of group rank ``opts.rootRank`` to all ranks; the root's own is left as it is."""
        x, root = tensors[0], opts.rootRank
        links = self._ctx.size - 1 if self._ctx.rank == root else 0
        # only the root could see that its tensor requires grad, so that must not decide (both ends must agree)
        call = self._begin("broadcast", f"broadcast/{root}", x, links * nbytes_of([x]), "backward")
        if call is not None and len(tensors) == 1:
            try:
                codec = self._codec(call, x.numel(), links * nbytes_of([x]))
                job = None if codec is None else broadcast(self._ctx, call, codec, x, root, opts)
            except BaseException:
                self._undo(call)
                raise
            if job is not None:
                return self._work([job], list(tensors))
        return self.inner.broadcast(tensors, opts)

    def _become_tombstone(self) -> None:
        if type(self) is CompressedProcessGroup:  # a subclass keeps its methods
            self.__class__ = ClosedProcessGroup


class ClosedProcessGroup(CompressedProcessGroup):
    """What a wrapped group is after ``close``: torch.distributed learns that it is closed, not that it is unknown."""

    def __hash__(self) -> int:
        # torch.distributed looks every group up in tables, and this one is in none any more
        if _torch.asked_by_torch():
            self._ready()
        return super().__hash__()
