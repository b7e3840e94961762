"""ProcessGroup methods that go to the inner group unchanged, counted with the bytes their best algorithm sends."""

from __future__ import annotations

from typing import Any

from compactdist import _torch
from compactdist.group.core import GroupCore, nbytes_of, override
from compactdist.group.torch_api import shared_name
from compactdist.observe.stats import PassReason

__all__ = ["PassThroughMethods"]


class PassThroughMethods(GroupCore):
    """Reductions, gather, scatter, barriers: not compressed yet."""

    def _share(self) -> float:
        return (self._ctx.size - 1) / self._ctx.size

    @override
    def allreduce(self, tensors: Any, opts: Any = None) -> Any:
        """Passes through."""
        self._pass("all_reduce", PassReason.OP, 2 * self._share() * nbytes_of(tensors))
        return self.inner.allreduce(tensors, opts or _torch.options("AllreduceOptions"))

    @override
    def allreduce_coalesced(self, tensors: Any, opts: Any = None) -> Any:
        """Passes through."""
        self._pass("all_reduce", PassReason.OP, 2 * self._share() * nbytes_of(tensors))
        return self.inner.allreduce_coalesced(tensors, opts or _torch.options("AllreduceCoalescedOptions"))

    @override
    @shared_name
    def reduce(self, tensors: Any, opts: Any) -> Any:
        """Passes through."""
        self._pass("reduce", PassReason.OP, nbytes_of(tensors))
        return self.inner.reduce(tensors, opts)

    @override
    @shared_name
    def reduce_scatter(self, output_tensors: Any, input_tensors: Any, opts: Any = None) -> Any:
        """Passes through."""
        self._pass("reduce_scatter", PassReason.OP, self._share() * sum(nbytes_of(t) for t in input_tensors))
        return self.inner.reduce_scatter(output_tensors, input_tensors, opts or _torch.options("ReduceScatterOptions"))

    def _reduce_scatter_one(self, output: Any, x: Any, opts: Any) -> Any:
        self._pass("reduce_scatter", PassReason.OP, self._share() * nbytes_of([x]))
        options = opts or _torch.options("ReduceScatterOptions")
        return _torch.inner_call(self.inner, _torch.REDUCE_SCATTER_SINGLE, output, x, options)

    @override
    @shared_name
    def reduce_scatter_single(self, output_tensor: Any, input_tensor: Any, opts: Any = None) -> Any:
        """Passes through (``_reduce_scatter_base`` before torch 2.13)."""
        return self._reduce_scatter_one(output_tensor, input_tensor, opts)

    @override
    def _reduce_scatter_base(self, output_tensor: Any, input_tensor: Any, opts: Any = None) -> Any:
        return self._reduce_scatter_one(output_tensor, input_tensor, opts)

    @override
    def reduce_scatter_single_coalesced(self, output_tensors: Any, input_tensors: Any, opts: Any = None) -> Any:
        """Passes through; functional collectives come here."""
        self._pass("reduce_scatter", PassReason.OP, self._share() * nbytes_of(input_tensors))
        options = opts or _torch.options("ReduceScatterOptions")
        return _torch.inner_call(self.inner, _torch.REDUCE_SCATTER_COALESCED, output_tensors, input_tensors, options)

    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced

    @override
    @shared_name
    def gather(self, output_tensors: Any, input_tensors: Any, opts: Any) -> Any:
        """Passes through."""
        self._pass("gather", PassReason.OP, 0 if opts.rootRank == self._ctx.rank else nbytes_of(input_tensors))
        return self.inner.gather(output_tensors, input_tensors, opts)

    @override
    @shared_name
    def scatter(self, output_tensors: Any, input_tensors: Any, opts: Any) -> Any:
        """Passes through."""
        sent = sum(nbytes_of(t) for t in input_tensors) - (nbytes_of(output_tensors) if input_tensors else 0)
        self._pass("scatter", PassReason.OP, sent)
        return self.inner.scatter(output_tensors, input_tensors, opts)

    @override
    @shared_name
    def barrier(self, opts: Any = None) -> Any:
        """Passes through."""
        self._pass("barrier", PassReason.OP, 0)
        return self.inner.barrier(opts or _torch.options("BarrierOptions"))

    @override
    @shared_name
    def monitored_barrier(self, timeout: Any = None, wait_all_ranks: bool = False) -> Any:
        """Passes through; the inner group's backend must have one (gloo)."""
        self._pass("barrier", PassReason.OP, 0)
        return self.inner.monitored_barrier(timeout, wait_all_ranks)

    @override
    @shared_name
    def split_group(self, *args: Any, **kwargs: Any) -> Any:
        """A plain subgroup of the inner group."""
        return self.inner.split_group(*args, **kwargs)

    @override
    def _start_coalescing(self, device: Any) -> None:
        """Group the following calls, where the backend can (gloo raises, as it does for a plain group)."""
        self.inner._start_coalescing(device)

    @override
    def _end_coalescing(self, device: Any) -> Any:
        return self.inner._end_coalescing(device)
