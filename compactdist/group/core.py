"""What all methods of a wrapped group share: deciding, counting, shipping, and making works."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from compactdist import _torch
from compactdist.errors import ClosedGroupError, FrameError
from compactdist.exchange.captured import check_capture, error_of
from compactdist.exchange.contiguous import contiguous, copy_back
from compactdist.exchange.engine import Engine, Flight
from compactdist.exchange.later import Departures, Later
from compactdist.exchange.patterns.base import Pattern
from compactdist.exchange.plan import AutogradRule, Call, CallPlan, refusal
from compactdist.exchange.work import FinishedWork, Job, PendingWork
from compactdist.group.agreement import Agreement
from compactdist.group.keys import KeyBook
from compactdist.group.plans import AgreedPlans, publishes
from compactdist.observe.stats import PassReason
from compactdist.wire import HEADER_NBYTES, frame_in, from_raw, raw_nbytes

__all__ = ["GroupCore", "nbytes_of"]


def nbytes_of(tensors: Sequence[Tensor]) -> int:
    """Bytes of some tensors; of sparse ones, bytes of their indices and values."""
    return sum(t._indices().nbytes + t._values().nbytes if t.is_sparse else t.nbytes for t in tensors)


class GroupCore:
    """State and helpers of :class:`~compactdist.group.process_group.CompressedProcessGroup`."""

    _inner: Any
    _engine: Engine
    _keys: KeyBook
    _finished: FinishedWork
    _closed: bool
    _adopted: bool
    _agreement: Agreement | None
    _plans: AgreedPlans
    _departures: Departures
    _captures_cpu: bool = False
    """In tests, where Triton's interpreter plays a device on CPU tensors."""

    def _adopt_backends(self) -> None:
        raise AssertionError("provided by the life cycle")

    def _warn_no_step(self, op: str) -> None:
        raise AssertionError("provided by the life cycle")

    def _future_pool(self) -> Any:
        raise AssertionError("provided by the life cycle")

    def _ready(self) -> None:
        if self._closed:
            raise ClosedGroupError(
                f"{self._engine.label}: the wrapped group was closed; wrap the inner group again, or use it as it is"
            )

    def _refuse_unagreed(self) -> None:
        """Refuse a collective of an epoch in which ranks could not agree: it would meet another one on the inner group.

        Raises:
            PlanMismatchError: there was such an agreement.
        """
        if self._agreement is not None:
            self._agreement.refuse(self._keys.epoch)

    @property
    def inner(self) -> Any:
        """The group that was wrapped; use it for traffic that must not be compressed.

        Raises:
            ClosedGroupError: the wrapped group was closed and has let go of the inner group.
        """
        if self._inner is None:
            self._ready()
        return self._inner

    def _pass(self, op: str, reason: PassReason, nbytes: float) -> None:
        """Count a call that goes to the inner group."""
        self._ready()
        stats = self._engine.stats
        stats.passed(op, reason, nbytes)
        if reason == PassReason.NO_STEP and stats.first_time(reason):
            self._warn_no_step(op)
        if op not in ("send", "recv"):
            self._refuse_unagreed()
        if not self._adopted and _torch.called_by_ddp():
            self._adopt_backends()

    def _plan(
        self,
        pattern: Pattern,
        site: str,
        tensor: Tensor,
        signature: tuple[Any, ...],
        nbytes: float,
        autograd: AutogradRule = "tensor",
    ) -> tuple[Call, CallPlan] | None:
        """Fix the key of a call and find its plan; ``None``: it passes through, and was counted.

        Args:
            pattern: how the parts travel.
            site: the part of the site key between prefix and ordinal.
            tensor: tensor of the call; its dtype and differentiability decide.
            signature: sizes, dtype and device of the call's tensors, in the pattern's form.
            nbytes: bytes on the link, should the call pass through.
            autograd: see :func:`~compactdist.exchange.plan.refusal`.

        Raises:
            CaptureError: the call would be compressed, and the CUDA graph that is being captured cannot take it.
        """
        if self._closed:
            self._ready()
        engine, keys = self._engine, self._keys
        counted_as = "recv" if pattern.receives_only else pattern.op
        reason = refusal(engine.size, tensor, keys.engaged, autograd)
        if reason is not None:
            self._agree_to_pass(pattern, site, reason, tensor.dtype)
            self._pass(counted_as, reason, nbytes)
            return None
        call = keys.take(site, pattern.op)
        try:
            if (not tensor.is_cpu or self._captures_cpu) and _torch.is_capturing():
                self._begin_capture(call)
            plan = engine.plan(pattern, call, signature)
            if plan.reason is not None and pattern.collective:
                if plan.by_pair or plan.was_compressed or publishes(plan.reason):
                    self._departures.join()
                    self._agree(call, plan)
                else:
                    self._refuse_unagreed()
            elif plan.reason is None and call.captured:
                check_capture(engine, call, plan)  # before any agreement, in which others would wait for this rank
        except BaseException:
            self._take_back(call)
            raise
        if plan.reason is not None:
            shown = None if plan.reason == PassReason.SMALL or pattern.receives_only else call.site
            engine.stats.passed(counted_as, plan.reason, nbytes, shown)
            return None
        return call, plan

    def _begin_capture(self, call: Call) -> None:
        """Mark a call as captured. An earlier call of its site must be finished, or the graph would finish it.

        Raises:
            CaptureError: a call of this site has not been finished.
        """
        call.captured = True
        site = self._engine.store.find(call.site)
        if site is not None and site.pending:
            raise error_of(
                self._engine,
                call,
                "an earlier call has not been finished; wait for its work, or make the call uncaptured, first",
            )

    def _agree_to_pass(self, pattern: Pattern, site: str, reason: PassReason, what: object) -> None:
        """Agree that a call passes through in a place where ranks last compressed one.

        Other ranks may be about to do that again: they cannot see that the tensor requires grad here, or that it is of
        another dtype. Without an agreement their frames would meet the plain call. Calls of another kind that come
        before a compressed one in every step are agreed on in the first.

        Args:
            pattern: of the call.
            site: the part of the site key between prefix and ordinal.
            reason: why the call passes through.
            what: is added to the site's name in the agreement, unless ``reason`` is ``AUTOGRAD``.
        """
        if self._agreement is None or not pattern.collective or _torch.graph_task() != -1:
            return
        if reason not in (PassReason.AUTOGRAD, PassReason.DTYPE, PassReason.OP):
            return
        self._departures.join()  # of which all ranks have agreed on what they are
        call = self._keys.peek(site, pattern.op)
        if self._plans.passes(call):
            return
        if reason != PassReason.AUTOGRAD:
            self._agree(replace(call, site=f"{call.site} ({what})"), None, reason)
            return
        self._agree(call, None, reason)
        known = self._engine.store.find(call.site)
        if known is not None:
            known.plan = None  # compressing again needs an agreement

    def _agree(self, call: Call, plan: CallPlan | None, reason: str = "") -> None:
        """Agree with all ranks on what this call is, unless that is known."""
        agreement = self._agreement
        if agreement is not None:
            agreement.refuse(call.epoch)
            subject = self._plans.subject(call, plan, reason)
            if subject is not None:
                try:
                    agreement.agree(subject, self._departures.is_open)
                    self._separate(plan)
                except BaseException:
                    for site in self._engine.store.sites():  # their next calls come here, to be refused
                        if site.plan is not None:
                            site.plan.agreed_at = None
                    raise
                self._plans.agreed(call, plan, reason)
        if plan is not None:
            plan.agreed_at = call.epoch, call.warm

    def _separate(self, plan: CallPlan | None) -> None:
        """Give frames of collectives on a CPU a group of their own. All ranks have just agreed on their first."""
        agreement, link = self._agreement, self._engine.link
        if agreement is None or plan is None or link.gloo is None or link.own is not None:
            return
        passes = plan.reason is not None and not plan.by_pair  # a pair of other ranks may exchange frames in this call
        if not passes and plan.device.type == "cpu":
            try:
                agreement.connect(link.separate, _torch.gloo_addresses(link.gloo))
            except BaseException:
                link.rejoin()
                raise

    def _agree_first(self, flight: Flight) -> Job | None:
        """Agree on a call's plan before it leaves.

        Returns:
            The job of an asynchronous call that leaves later; ``None``: the call may leave now.
        """
        engine, plan, departures = self._engine, flight.plan, self._departures
        tensor = (*flight.inputs, *flight.outputs)[0]
        # Only frames that have a group of their own may leave later. NCCL's calls belong to the stream and the group of
        # calls that they were issued in, and other groups cannot be made twice.
        apart = engine.link.gloo is not None and not engine.link.needs_exact_sizes(tensor)
        asynchronous = apart and getattr(flight.opts, "asyncOp", True)
        waits = departures.busy or (self._agreement and self._plans.subject(flight.call, plan) is not None)
        # a frame that arrived and is passed on holds its stream until it has left: that must not take long
        if asynchronous and waits and (engine.arrivals.empty or not plan.pattern.forwards):
            with engine.lock:
                engine.prepare(flight)
            later = Later()
            job = engine.waiting(flight, later)
            leaving = partial(self._depart, flight, job, later)
            job = engine.answer(flight, job)
            departures.add(leaving)
            return job
        departures.join()
        self._agree(flight.call, plan)
        return None

    def _depart(self, flight: Flight, job: Job, later: Later) -> None:
        engine = self._engine
        try:
            try:
                self._agree(flight.call, flight.plan)
            except BaseException:
                with engine.lock:
                    engine.withdraw(flight)
                raise
            with engine.lock:
                self._ready()  # it may have been closed while this waited
                engine.launch(flight, job)
        except BaseException as error:
            later.fail(error)
        else:
            later.leave(flight.work)

    def _ship(self, calls: Sequence[Flight | Callable[[], Any]]) -> list[Any]:
        """Prepare all flights, then launch them and make the plain calls, in order.

        If one flight cannot be prepared, nothing is sent and no ordinal is used.

        Args:
            calls: flights, and functions that make a passed-through call on the inner group.

        Returns:
            Jobs, and the inner group's works.

        Raises:
            Whatever encoding or the inner group raises. Flights launched before the inner group failed stay under way,
            and both ends can tell.
        """
        engine, prepared, parts = self._engine, 0, []
        flights = [call for call in calls if isinstance(call, Flight)]
        try:
            for flight in flights:
                if flight.plan.pattern.collective:
                    self._departures.join()
                    self._agree(flight.call, flight.plan)
        except BaseException:
            self._give_back(flights)
            raise
        with engine.lock:
            try:
                for flight in flights:
                    engine.prepare(flight)
                    prepared += 1
                for call in calls:
                    if isinstance(call, Flight):
                        parts.append(engine.answer(call, engine.launch(call)))
                    else:
                        parts.append(engine.link.work_of(call()))
            except BaseException:
                left = [call for call in calls[len(parts) :] if isinstance(call, Flight)]
                for flight in flights[:prepared]:
                    if flight in left and flight.work is None:
                        engine.withdraw(flight)
                self._give_back(left)
                self._undo_captured(flights, parts)
                raise
        return parts

    def _begin(self, call: Callable[..., Any], tensors: Any, *more: Any, writes: bool = True) -> Any:
        """Make a passed-through call ``call(tensors, *more)`` on the inner group, with strided tensors as copies.

        Args:
            call: a method of the inner group.
            tensors: a tensor, a list of tensors, or a list of such lists.
            more: the call's other arguments; tensors among them are read only.
            writes: the call writes to ``tensors`` on this rank.

        Returns:
            The inner group's work, or a job that copies back.
        """
        copied: list[tuple[Tensor, Tensor]] = []
        work = call(contiguous(tensors, copied), *(contiguous(value, []) for value in more))
        if not copied or not writes:
            return work
        return Job(self._engine.link.work_of(work), copy_back(copied), None, [copy for _, copy in copied])

    def _hand_on(self, call: Callable[..., Any], tensors: Any, *more: Any, writes: bool = True) -> Any:
        """The work of a passed-through call; see :meth:`_begin`. Options come last among the arguments."""
        part = self._begin(call, tensors, *more, writes=writes)
        if not isinstance(part, Job):
            return part
        return self._settled(part, more[-1], [tensors] if isinstance(tensors, Tensor) else list(tensors))

    def _watched(self, work: Any, x: Tensor, data: Tensor, opts: Any = None) -> Any:
        """The work of a receive that passed through; waiting for it makes sure that no frame came instead of values.

        Args:
            work: of the inner group.
            x: the caller's tensor, on a CPU.
            data: where the message arrives: ``x`` itself, or bytes.
            opts: options of the call.
        """

        def look(may_write: bool) -> None:
            header = frame_in(data)
            if header is not None:
                raise FrameError(
                    f"{self._engine.label}: a message of {x.numel()} x {x.dtype} that this rank lets pass through "
                    f"arrived as a frame ({header.describe()}). The tensor holds no values of it; give all ranks the "
                    "same policy, call step() at the same places on all of them, and send and receive tensors of the "
                    "same size and dtype; then call reset() on all ranks"
                )
            if data is not x and may_write:
                with _torch.without_autograd():
                    x.copy_(from_raw(data, x.numel(), x.dtype).view(x.shape))

        return self._settled(Job(self._engine.link.work_of(work), look, None, (data,)), opts, [x])

    def _receive_broadcast(self, tensors: Sequence[Tensor], opts: Any) -> Any:
        """The work of a broadcast that passes through."""
        x, receives = tensors[0], opts.rootRank != self._engine.rank
        if len(tensors) > 1 or not receives or not x.is_cpu or x.nbytes < HEADER_NBYTES:
            return self._hand_on(self.inner.broadcast, tensors, opts, writes=receives)
        data = contiguous(x, [])
        work = self.inner.broadcast([data], opts)
        return self._watched(work, x, x if data is x else data.view(-1).view(torch.uint8), opts)

    def _receive_plainly(self, receive: Callable[..., Any], tensors: Sequence[Tensor], *of: int) -> Any:
        """The work of a receive ``receive(tensors, *of)`` that passes through.

        gloo ends a process that is sent more than it expects, and a peer that compresses what this rank takes for a
        plain message sends a header before the tensor's bytes: on a CPU there is room for that.
        """
        x = tensors[0]
        small = x.numel() < self._engine.chooser.min_numel
        if len(tensors) > 1 or small or self._engine.link.needs_exact_sizes(x):
            return self._hand_on(receive, tensors, *of)
        data = torch.empty(HEADER_NBYTES + raw_nbytes(x.numel(), x.dtype), dtype=torch.uint8, device="cpu")
        return self._watched(receive([data], *of), x, data)

    def _take_back(self, call: Call) -> None:
        """Undo the use of an ordinal by a call that sent nothing."""
        self._keys.give_back(call)
        self._engine.take_back(call)

    def _give_back(self, flights: Iterable[Flight | None]) -> None:
        """Undo the use of ordinals by calls that sent nothing, the last one first."""
        for flight in reversed(list(flights)):
            if flight is not None:
                self._take_back(flight.call)

    def _undo_captured(self, flights: Iterable[Flight | None], jobs: Iterable[Any]) -> None:
        """Undo the captured ones of calls made together, of which one has failed: their graph comes to nothing."""
        made = [flight for flight in flights if flight is not None and flight.call.captured]
        self._give_back(made)
        for job in jobs if made else ():
            if isinstance(job, Job):
                job.abandon()

    def _fly(self, flight: Flight, result: list[Tensor]) -> Any:
        """Prepare and launch one flight, and finish it if the call is synchronous; returns the call's work.

        Raises:
            Whatever encoding or the inner group raises; no ordinal is used then. A synchronous call also raises the
            errors of decoding.
        """
        engine, call, plan = self._engine, flight.call, flight.plan
        known = plan.agreed_at == (call.epoch, call.warm)
        try:
            job = None
            if not known or self._departures.busy:
                job = self._agree_first(flight) if plan.pattern.collective else None
            if job is None:
                with engine.lock:
                    job = engine.fly(flight)
                    if flight.predicted:
                        job = engine.answer(flight, job)
        except BaseException:
            self._take_back(call)
            raise
        return self._settled(job, flight.opts, result)

    def _settled(self, job: Job, opts: Any, result: list[Tensor]) -> Any:
        """The work of one job; a synchronous call is finished first, unless it is part of a group of calls."""
        link = self._engine.link
        together = None if link.opened is None else link.together
        if together is not None:
            together.results += result
        if getattr(opts, "asyncOp", True):
            return PendingWork((job,), result, self._future_pool)
        if together is None:
            job.attended = True
            job.settle()
        return self._finished

    def _work(self, parts: Sequence[Any], result: list[Tensor]) -> PendingWork:
        """A work that waits for several jobs and inner works."""
        together = self._engine.link.together
        if together is not None:
            together.results += result
        return PendingWork(parts, result, self._future_pool)
