"""CompressedProcessGroup: every ProcessGroup method becomes an exchange, or goes to the inner group.

The object is a registered ``torch.distributed.ProcessGroup``: Python callers find its methods by name, C++ callers
(functional collectives, DDP) through torch's trampoline. Both the names of torch 2.13 and the older ones are defined.
Nothing of a call reaches the link before its arguments are checked, its key is fixed and all its frames are complete.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from compactdist import _torch
from compactdist.errors import BadOutputError, ConfigError
from compactdist.exchange.engine import Flight
from compactdist.exchange.patterns.all_gather import ALL_GATHER, in_parts
from compactdist.exchange.patterns.all_to_all import ALL_TO_ALL
from compactdist.exchange.patterns.broadcast import BROADCAST
from compactdist.exchange.patterns.point_to_point import RECEIVE, RECEIVE_EXACTLY, SEND, receive_any, stream_name
from compactdist.exchange.plan import Call, CallPlan, refusal, under_autograd
from compactdist.group.core import nbytes_of
from compactdist.group.lifecycle import GroupLifecycle
from compactdist.group.reductions import Reductions
from compactdist.group.torch_api import shared_name
from compactdist.observe.stats import PassReason

__all__ = ["ClosedProcessGroup", "CompressedProcessGroup"]

override = _torch.opaque
_ALL_GATHER_OPTIONS = "AllgatherOptions"


class CompressedProcessGroup(GroupLifecycle, Reductions, dist.ProcessGroup):  # type: ignore[override]
    """A process group that sends compressed residuals of what each call site sent last; made by ``wrap``."""

    # --- all-gather -------------------------------------------------------------------------------------------------

    def _gather_flight(self, outputs: list[Tensor] | Tensor, x: Tensor, opts: Any) -> Flight | None:
        """``outputs``: one tensor per rank, or one for all. ``None``: the call passes through."""
        numel, engine = x.numel(), self._engine
        nbytes = (engine.size - 1) * x.nbytes
        signature: tuple[Any, ...] = numel, x.dtype, x.device
        if engine.chooser.parts != 1:
            signature = *signature, x.shape  # says where it is cut
        planned = self._plan(ALL_GATHER, "all_gather", x, signature, nbytes)
        if planned is None:
            return None
        call, plan = planned
        try:
            rows = plan.rows.kept(outputs)
            if rows is None and isinstance(outputs, Tensor):
                rows = self._rows(plan, outputs, x)
            elif rows is None:
                rows = list(outputs)
                engine.check_outputs("all_gather", rows, numel, x)
        except BaseException:
            self._take_back(call)
            raise
        own = rows.pop(engine.rank)
        flight = Flight(plan, call, (x,), rows, opts, x, own)
        return in_parts(flight) if plan.cuts else flight

    def _rows(self, plan: CallPlan, output: Tensor, x: Tensor) -> list[Tensor]:
        size = self._engine.size
        if output.numel() != size * x.numel() or output.dtype != x.dtype:
            raise BadOutputError(
                f"{self._engine.label}, all_gather: the output holds {output.numel()} x {output.dtype}, but "
                f"{size} x {x.numel()} x {x.dtype} will arrive; nothing was sent"
            )
        if output.is_contiguous():
            return plan.rows.of(output, size) if x.numel() else [output.view(-1)] * size
        if output.shape[0] % size:
            raise BadOutputError(
                f"{self._engine.label}, all_gather: an output of shape {tuple(output.shape)} that is not contiguous "
                f"cannot be divided among {size} ranks along its first dimension; nothing was sent. Pass a contiguous "
                "output"
            )
        return list(output.chunk(size, 0))

    @override
    def allgather(self, output_tensors: Any, input_tensors: Any, opts: Any = None) -> Any:
        """``output_tensors[i]`` is a list of ``size()`` tensors for ``input_tensors[i]``."""
        opts = opts or _torch.options(_ALL_GATHER_OPTIONS)
        several = len(input_tensors) != 1
        if several or len({t.numel() for t in output_tensors[0]}) > 1:
            reason = PassReason.OP if several else PassReason.UNEVEN
            self._pass("all_gather", reason, (self._engine.size - 1) * nbytes_of(input_tensors))
        else:
            flight = self._gather_flight(list(output_tensors[0]), input_tensors[0], opts)
            if flight is not None:
                return self._fly(flight, list(output_tensors[0]))
        return self._hand_on(self.inner.allgather, output_tensors, input_tensors, opts)

    def _gather_single(self, output_tensor: Tensor, input_tensor: Tensor, opts: Any = None) -> Any:
        """``[N, ...]`` of every rank into ``[size() * N, ...]`` (``_allgather_base`` before torch 2.13)."""
        flight = self._gather_flight(output_tensor, input_tensor, opts)
        if flight is not None:
            return self._fly(flight, [output_tensor])
        return self._gather_plainly(output_tensor, input_tensor, opts)

    def _gather_plainly(self, output: Tensor, x: Tensor, opts: Any) -> Any:
        return self._hand_on(partial(_torch.all_gather_single, self.inner), output, x, opts)

    all_gather_single = shared_name(_gather_single, "all_gather_single")

    @override
    def _allgather_base(self, output: Tensor, input: Tensor, opts: Any = None) -> Any:
        return self._gather_single(output, input, opts)

    def _together(
        self, flights: Sequence[Flight | None], plain: Sequence[Callable[[], Any]], result: list[Tensor]
    ) -> Any:
        """The work of several calls in one: compressed ones are all prepared before anything is sent."""
        if len(flights) == 1 and flights[0] is not None:
            return self._fly(flights[0], result)
        calls = [call if flight is None else flight for flight, call in zip(flights, plain, strict=True)]
        return self._work(self._ship(calls), result)

    def _flights(self, calls: Sequence[tuple[Any, Tensor]], opts: Any) -> list[Flight | None]:
        """Flights of several all-gathers; where one is refused, no ordinal is used."""
        flights: list[Flight | None] = []
        try:
            for outputs, x in calls:
                flights.append(self._gather_flight(outputs, x, opts))
        except BaseException:
            self._give_back(flights)
            raise
        return flights

    @override
    def all_gather_single_coalesced(self, outputs: Any, inputs: Any, opts: Any = None) -> Any:
        """Several single-tensor all-gathers in one call; functional collectives come here, even with one tensor."""
        calls = list(zip(outputs, inputs, strict=True))
        plain = [partial(self._gather_plainly, output, x, opts) for output, x in calls]
        return self._together(self._flights(calls, opts), plain, [output for output, _ in calls])

    allgather_into_tensor_coalesced = all_gather_single_coalesced

    @override
    def allgather_coalesced(self, output_lists: Any, input_list: Any, opts: Any = None) -> Any:
        """``output_lists[rank][i]`` receives ``input_list[i]`` of that rank."""
        opts = opts or _torch.options(_ALL_GATHER_OPTIONS)
        calls = [([per_rank[i] for per_rank in output_lists], x) for i, x in enumerate(input_list)]
        plain = [partial(self._hand_on, self.inner.allgather, [outputs], [x], opts) for outputs, x in calls]
        return self._together(self._flights(calls, opts), plain, [t for per_rank in output_lists for t in per_rank])

    # --- all-to-all -------------------------------------------------------------------------------------------------

    def _exchange(
        self, outputs: list[Tensor], inputs: list[Tensor], opts: Any, result: list[Tensor], *, even: bool = False
    ) -> Any:
        """The work of a compressed all-to-all of chunks by rank; ``None``: it passes through.

        ``even``: the form of the call says that all chunks of all ranks are equal.
        """
        engine, first = self._engine, inputs[0]
        me = engine.rank
        leaving, arriving = tuple([t.numel() for t in inputs]), tuple([t.numel() for t in outputs])
        nbytes = (sum(leaving) - leaving[me]) * first.dtype.itemsize
        signature = leaving, arriving, first.dtype, first.device, even
        wrong = next((t for t in (*inputs, *outputs) if t.dtype != first.dtype), None)
        if wrong is not None:
            raise BadOutputError(
                f"{engine.label}, all_to_all: chunks of {first.dtype} and {wrong.dtype}; nothing was sent"
            )
        if leaving[me] != arriving[me]:
            raise BadOutputError(
                f"{engine.label}, all_to_all: this rank's own chunk has {leaving[me]} elements, the output for it "
                f"{arriving[me]}; nothing was sent"
            )
        planned = self._plan(ALL_TO_ALL, "all_to_all", first, signature, nbytes)
        if planned is None:
            return None
        call, plan = planned
        own = inputs.pop(me), outputs.pop(me)
        return self._fly(Flight(plan, call, inputs, outputs, opts, *own), result)

    def _passes_all_to_all(self, whole: Tensor, nbytes: float) -> bool:
        """Whether an all-to-all passes through whatever its chunks are; counts it then. Its splits need no check."""
        self._ready()
        reason = refusal(self._engine.size, whole, self._keys.engaged, "tensor")
        if reason is not None:
            self._agree_to_pass(ALL_TO_ALL, "all_to_all", reason, whole.dtype)
            self._pass("all_to_all", reason, nbytes)
        return reason is not None

    @override
    def alltoall(self, output_tensors: Any, input_tensors: Any, opts: Any = None) -> Any:
        """One tensor to and from every rank."""
        outputs, inputs, size = list(output_tensors), list(input_tensors), self._engine.size
        if len(outputs) != size or len(inputs) != size:
            raise BadOutputError(
                f"{self._engine.label}, all_to_all: {len(inputs)} inputs and {len(outputs)} outputs for {size} ranks; "
                "nothing was sent"
            )
        sent = nbytes_of(inputs) - inputs[self._engine.rank].nbytes
        group = self.inner
        if not self._passes_all_to_all(inputs[0], sent):
            work = self._exchange(list(outputs), list(inputs), opts, outputs)
            if work is not None:
                return work
            group = self._engine.link.carrier(inputs[0])  # pairs of other ranks may exchange frames in this call
        call = partial(self._engine.link.watched, group, group.alltoall)
        return self._hand_on(call, outputs, inputs, opts or _torch.options("AllToAllOptions"))

    def _chunks(self, tensor: Tensor, splits: Sequence[int], what: str) -> list[Tensor]:
        size = self._engine.size
        rows = tensor.shape[0] if tensor.dim() else 0
        if not splits:
            if rows % size:
                raise BadOutputError(
                    f"{self._engine.label}, all_to_all: the {what}'s first dimension {rows} does not divide by {size} "
                    "ranks; nothing was sent"
                )
            splits = [rows // size] * size
        if len(splits) != size or sum(splits) != rows or min(splits) < 0:
            raise BadOutputError(
                f"{self._engine.label}, all_to_all: {what} splits {list(splits)} do not cover the first dimension "
                f"{rows} with {size} chunks; nothing was sent"
            )
        return list(tensor.detach().split(list(splits)))

    def _to_all_single(self, output: Tensor, x: Tensor, arriving: Any, leaving: Any, opts: Any) -> Any:
        """``arriving``, ``leaving``: sizes of the output's and the input's chunks along dimension 0; none: even."""
        arriving, leaving = arriving or (), leaving or ()
        known = leaving and len(leaving) == self._engine.size
        own = leaving[self._engine.rank] / max(1, sum(leaving)) if known else 1 / self._engine.size
        group = self.inner
        if not self._passes_all_to_all(x, (1 - own) * x.nbytes):
            outputs, inputs = self._chunks(output, arriving, "output"), self._chunks(x, leaving, "input")
            work = self._exchange(outputs, inputs, opts, [output], even=not arriving and not leaving)
            if work is not None:
                return work
            group = self._engine.link.carrier(x)  # as above
        call = partial(self._engine.link.watched, group, partial(_torch.all_to_all_single, group))
        return self._hand_on(call, output, x, arriving, leaving, opts)

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
    def alltoall_base(
        self,
        output: Tensor,
        input: Tensor,
        output_split_sizes: Any = (),
        input_split_sizes: Any = (),
        opts: Any = None,
    ) -> Any:
        """The name of ``all_to_all_single`` before torch 2.13."""
        return self._to_all_single(output, input, output_split_sizes, input_split_sizes, opts)

    # --- broadcast --------------------------------------------------------------------------------------------------

    @shared_name
    def broadcast(self, tensors: Any, opts: Any = None) -> Any:
        """The tensor of group rank ``opts.rootRank`` to all ranks; the root's own is left as it is."""
        opts = opts or _torch.options("BroadcastOptions")
        x, root, engine = tensors[0], opts.rootRank, self._engine
        nbytes = (engine.size - 1) * x.nbytes if engine.rank == root else 0
        if len(tensors) == 1:
            # only the root could see that its tensor requires grad, so that must not decide (both ends must agree)
            signature = x.numel(), x.dtype, x.device, root
            planned = self._plan(BROADCAST, f"broadcast/{root}", x, signature, nbytes, "backward")
            if planned is not None:
                call, plan = planned
                flight = Flight(plan, call, (x,) if plan.outgoing else (), (x,) if plan.incoming else (), opts)
                return self._fly(flight, list(tensors))
        else:
            self._pass("broadcast", PassReason.OP, nbytes)
        return self._receive_broadcast(tensors, opts)

    # --- point-to-point; ranks are group ranks ------------------------------------------------------------------------

    def forwarding(self) -> AbstractContextManager[None]:
        """Promise that tensors received and sent again inside the block were not written to in between.

        On a CPU untouched tensors are recognised by their bytes, and this saves the comparison. Elsewhere nothing but
        this lets a tensor go on in the frame it arrived in. It counts for this thread and for tensors that are where
        they were received: same storage, offset, shape and strides. A broken promise sends what was received.

        Raises:
            ConfigError: the group was wrapped with ``forward=False``.
        """
        self._ready()
        if not self._engine.forward:
            raise ConfigError(
                f"{self._engine.label}: forwarding() in a group wrapped with forward=False; drop one of them"
            )
        return self._engine.arrivals.trust()

    def _send_flight(self, x: Tensor, peer: int, tag: int) -> Flight | None:
        me, size = self._engine.rank, self._engine.size
        if not 0 <= peer < size:
            raise ValueError(f"{self._engine.label}: send to group rank {peer} of a group of {size}")
        signature = x.numel(), x.dtype, x.device, me, peer
        planned = self._plan(SEND, stream_name(me, peer, tag), x, signature, x.nbytes, "sender")
        if planned is None:
            return None
        call, plan = planned
        passed = PassReason.AUTOGRAD if under_autograd(x) else None
        return Flight(plan, call, (x,), (), None, tag=tag, passed=passed)

    def _receive_flight(self, x: Tensor, peer: int, tag: int) -> Flight | None:
        me = self._engine.rank
        signature = x.numel(), x.dtype, x.device, peer, me
        pattern = RECEIVE_EXACTLY if self._engine.link.needs_exact_sizes(x) else RECEIVE
        planned = self._plan(pattern, stream_name(peer, me, tag), x, signature, 0, "sender")
        if planned is None:
            return None
        call, plan = planned
        return Flight(plan, call, (), (x,), None, tag=tag)

    @shared_name
    def send(self, tensors: Any, dstRank: int, tag: int = 0) -> Any:
        """``tensors``: a list of one tensor; ``dstRank``: group rank."""
        flight = self._send_flight(tensors[0], dstRank, tag) if len(tensors) == 1 else None
        if flight is None:
            return self._hand_on(self.inner.send, tensors, dstRank, tag, writes=False)
        return self._fly(flight, list(tensors))

    @shared_name
    def recv(self, tensors: Any, srcRank: int, tag: int = 0) -> Any:
        """``tensors``: a list of one tensor; ``srcRank``: group rank."""
        flight = self._receive_flight(tensors[0], srcRank, tag) if len(tensors) == 1 else None
        if flight is None:
            return self._receive_plainly(self.inner.recv, tensors, srcRank, tag)
        return self._fly(flight, list(tensors))

    @override
    def recv_anysource(self, tensors: Any, tag: int = 0) -> Any:
        """Receive from whichever rank sends first; the message tells which stream it belongs to."""
        self._ready()
        engine, keys, x = self._engine, self._keys, tensors[0]
        reason = refusal(engine.size, x, keys.engaged, "sender")
        if reason is None and x.numel() < max(engine.chooser.min_numel, 1):
            engine.chooser.on_small("send", x.numel())
            reason = PassReason.SMALL
        if reason is not None or engine.link.needs_exact_sizes(x):
            self._pass("recv", reason or PassReason.DEVICE, 0)
            return self._receive_plainly(self.inner.recv_anysource, tensors, tag)

        def call_from(source: int) -> Call:
            return keys.take(stream_name(source, engine.rank, tag), "send")

        return self._work([receive_any(engine, call_from, x, tag)], list(tensors))

    recvAnysource = recv_anysource  # the name by which torch 2.14's C++ callers look for it

    def _batch(self, p2p_op_list: list[Any]) -> list[Any]:
        """Encode all sends, then post the receives, then the sends: gloo halves the rate of an exchange whose sends are
        posted first. A backend that groups calls (NCCL) gets the whole batch in one group, for an ungrouped batch can
        deadlock there.
        """
        # torch's own isend and irecv hand complex tensors over as pairs of reals
        tensors = [torch.view_as_real(op.tensor) if op.tensor.is_complex() else op.tensor for op in p2p_op_list]
        is_send = [op.op.__name__ == "isend" for op in p2p_op_list]
        order = sorted(range(len(p2p_op_list)), key=lambda i: is_send[i])
        flights: dict[int, Flight | None] = {}
        device = tensors[0].device
        grouped = self._engine.link.together is None and _torch.supports_coalescing(self.inner, device)
        try:
            for i in order:
                op = p2p_op_list[i]
                plan_flight = self._send_flight if is_send[i] else self._receive_flight
                flights[i] = plan_flight(tensors[i], op.group_peer, op.tag)
        except BaseException:
            self._give_back(flights.values())
            raise

        def plain(i: int) -> Callable[[], Any]:
            op, x = p2p_op_list[i], [tensors[i]]
            if is_send[i]:
                return partial(self._begin, self.inner.send, x, op.group_peer, op.tag, writes=False)
            return partial(self._receive_plainly, self.inner.recv, x, op.group_peer, op.tag)

        calls = [flights[i] or plain(i) for i in order]
        if not grouped:
            parts = dict(zip(order, self._ship(calls), strict=True))
            return [self._work([parts[i]], [op.tensor]) for i, op in enumerate(p2p_op_list)]
        link = self._engine.link
        with self._engine.lock:  # the inner group would issue what other threads hand it together with these
            together = link.begin_together(device)
            try:
                try:
                    self._ship(calls)
                finally:  # also if a call fails, for an open group would hold up all later calls
                    link.end_together(device)
            except BaseException:
                self._undo_captured(flights.values(), together.jobs)
                raise
        return [self._work([*together.jobs, together], [op.tensor for op in p2p_op_list])]

    # --- passed through, counted with the bytes their best algorithm sends --------------------------------------------

    def _share(self) -> float:
        return (self._engine.size - 1) / self._engine.size

    @override
    def allreduce(
        self, tensors: Any = (), opts: Any = None, timeout: Any = None, *, tensor: Any = None, op: Any = None
    ) -> Any:
        """The sum (or mean) over ranks, in place; compressed where the policy names a codec.

        ProcessGroup's three forms: tensors and options, tensors, ``op`` and ``timeout``, or one tensor and these.
        """
        if tensor is not None:
            tensors = tensor
        if isinstance(tensors, Tensor):
            tensors = [tensors]
        opts = _torch.allreduce_options(opts, op, timeout)
        if len(tensors) == 1:
            work = self._reduce_to_all(tensors[0], opts)
            if work is not None:
                return work
        else:
            self._pass("all_reduce", PassReason.OP, 2 * self._share() * nbytes_of(tensors))
        return self._hand_on(self.inner.allreduce, tensors, opts)

    @override
    def allreduce_coalesced(self, tensors: Any, opts: Any = None) -> Any:
        """Passes through."""
        self._pass("all_reduce", PassReason.OP, 2 * self._share() * nbytes_of(tensors))
        options = opts or _torch.options("AllreduceCoalescedOptions")
        return self._hand_on(self.inner.allreduce_coalesced, tensors, options)

    @shared_name
    def reduce(self, tensors: Any, opts: Any = None) -> Any:
        """Passes through."""
        opts = opts or _torch.options("ReduceOptions")
        self._pass("reduce", PassReason.OP, nbytes_of(tensors))
        return self._hand_on(self.inner.reduce, tensors, opts, writes=opts.rootRank == self._engine.rank)

    @shared_name
    def reduce_scatter(self, output_tensors: Any, input_tensors: Any, opts: Any = None) -> Any:
        """Passes through."""
        self._pass("reduce_scatter", PassReason.OP, self._share() * sum(nbytes_of(t) for t in input_tensors))
        options = opts or _torch.options("ReduceScatterOptions")
        return self._hand_on(self.inner.reduce_scatter, output_tensors, input_tensors, options)

    def _reduce_scatter_one(self, output: Any, x: Any, opts: Any) -> Any:
        options = opts or _torch.options("ReduceScatterOptions")
        work = self._scatter_sums(output, x, options)
        if work is not None:
            return work
        scatter = _torch.first_method(self.inner, _torch.REDUCE_SCATTER_SINGLE)
        return self._hand_on(scatter, output, x, options)

    @shared_name
    def reduce_scatter_single(self, output_tensor: Any, input_tensor: Any, opts: Any = None) -> Any:
        """A rank's share of the sum (or mean) over ranks; compressed where the policy names a codec
        (``_reduce_scatter_base`` before torch 2.13).
        """
        return self._reduce_scatter_one(output_tensor, input_tensor, opts)

    @override
    def _reduce_scatter_base(self, outputTensor: Any, inputTensor: Any, opts: Any = None) -> Any:
        return self._reduce_scatter_one(outputTensor, inputTensor, opts)

    @override
    def reduce_scatter_single_coalesced(self, outputs: Any, inputs: Any, opts: Any = None) -> Any:
        """One tensor is as in ``reduce_scatter_single``, several pass through; functional collectives come here."""
        options = opts or _torch.options("ReduceScatterOptions")
        if len(inputs) == 1:
            return self._reduce_scatter_one(outputs[0], inputs[0], options)
        self._pass("reduce_scatter", PassReason.OP, self._share() * nbytes_of(inputs))
        scatter = _torch.first_method(self.inner, _torch.REDUCE_SCATTER_COALESCED)
        return self._hand_on(scatter, outputs, inputs, options)

    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced

    @shared_name
    def gather(self, output_tensors: Any, input_tensors: Any, opts: Any = None) -> Any:
        """Passes through."""
        opts = opts or _torch.options("GatherOptions")
        self._pass("gather", PassReason.OP, 0 if opts.rootRank == self._engine.rank else nbytes_of(input_tensors))
        return self._hand_on(self.inner.gather, output_tensors, input_tensors, opts)

    def _gather_to_root(self, output_tensor: Tensor, input_tensor: Tensor, opts: Any = None) -> Any:
        """Passes through (torch 2.14)."""
        opts = opts or _torch.options("GatherOptions")
        self._pass("gather", PassReason.OP, 0 if opts.rootRank == self._engine.rank else input_tensor.nbytes)
        return self._hand_on(self.inner.gather_single, output_tensor, input_tensor, opts)

    gather_single = shared_name(_gather_to_root, "gather_single")
    gather_into_tensor = shared_name(_gather_to_root, "gather_into_tensor")

    @shared_name
    def scatter(self, output_tensors: Any, input_tensors: Any, opts: Any = None) -> Any:
        """Passes through."""
        opts = opts or _torch.options("ScatterOptions")
        sent = sum(nbytes_of(t) for t in input_tensors) - (nbytes_of(output_tensors) if input_tensors else 0)
        self._pass("scatter", PassReason.OP, sent)
        return self._hand_on(self.inner.scatter, output_tensors, input_tensors, opts)

    @shared_name
    def barrier(self, opts: Any = None) -> Any:
        """Passes through."""
        self._pass("barrier", PassReason.OP, 0)
        return self.inner.barrier(opts or _torch.options("BarrierOptions"))

    @shared_name
    def monitored_barrier(self, timeout: Any = None, wait_all_ranks: bool = False) -> Any:
        """Passes through; the inner group's backend must have one (gloo)."""
        self._pass("barrier", PassReason.OP, 0)
        return self.inner.monitored_barrier(timeout, wait_all_ranks)

    @shared_name
    def get_backend(self, device: torch.device) -> Any:
        """The inner group's backend for a device (torch 2.14; ``_get_backend`` before)."""
        return self._get_backend(device)

    @shared_name
    def split_group(self, *args: Any, **kwargs: Any) -> Any:
        """A plain subgroup of the inner group."""
        return self.inner.split_group(*args, **kwargs)

    @override
    def start_coalescing(self, device: Any) -> None:
        """Begin a group of calls, where the backend can (gloo raises, as it does for a plain group).

        Raises:
            CallGroupError: one is open.
        """
        self._ready()
        self._departures.join()
        with self._engine.lock:  # while another thread's batch is issued
            self._engine.link.begin_together(device)

    @override
    def end_coalescing(self, device: Any) -> Any:
        """Issue the calls made since ``start_coalescing``; returns the work of them all, which decodes what arrives.

        Raises:
            CallGroupError: no group of calls is open.
            Whatever the inner group raises.
        """
        self._ready()
        together = self._engine.link.end_together(device)
        return self._work([*together.jobs, together], together.results)

    _start_coalescing, _end_coalescing = start_coalescing, end_coalescing  # the names before torch 2.14

    def _become_tombstone(self) -> None:
        if type(self) is CompressedProcessGroup:  # a subclass keeps its methods
            self.__class__ = ClosedProcessGroup


class ClosedProcessGroup(CompressedProcessGroup):
    """A wrapped group after ``close``: torch.distributed's functions then raise ClosedGroupError."""

    def __hash__(self) -> int:
        # torch.distributed hashes every group to look it up in its tables: the place to say that this one is closed
        if _torch.asked_by_torch():
            self._ready()
        return super().__hash__()
