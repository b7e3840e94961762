"""What all methods of a wrapped group share: deciding, counting, shipping, and making works."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor

from compactdist import _torch
from compactdist.errors import ClosedGroupError, FrameError
from compactdist.exchange.engine import Engine, Flight
from compactdist.exchange.link import as_work
from compactdist.exchange.patterns import Pattern
from compactdist.exchange.plan import AutogradRule, Call, CallPlan, refusal
from compactdist.exchange.work import FinishedWork, Job, PendingWork
from compactdist.group.keys import KeyBook
from compactdist.observe.stats import PassReason
from compactdist.wire import HEADER_NBYTES, frame_in

__all__ = ["GroupCore", "nbytes_of"]


def nbytes_of(tensors: Sequence[Tensor]) -> int:
    """Bytes of some tensors."""
    return tensors[0].nbytes if len(tensors) == 1 else sum(t.nbytes for t in tensors)


class GroupCore:
    """State and helpers of :class:`~compactdist.group.process_group.CompressedProcessGroup`."""

    _inner: Any
    _engine: Engine
    _keys: KeyBook
    _finished: FinishedWork
    _closed: bool

    _adopted: bool

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
        """
        if self._closed:
            self._ready()
        engine, keys = self._engine, self._keys
        counted_as = "recv" if pattern.receives_only else pattern.op
        reason = refusal(engine.size, tensor, keys.engaged, autograd)
        if reason is not None:
            self._pass(counted_as, reason, nbytes)
            return None
        call = keys.take(site, pattern.op)
        try:
            plan = engine.plan(pattern, call, signature)
        except BaseException:
            keys.give_back(call)
            raise
        if plan.reason is not None:
            shown = None if plan.reason == PassReason.SMALL or pattern.receives_only else call.site
            engine.stats.passed(counted_as, plan.reason, nbytes, shown)
            return None
        return call, plan

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
        with engine.lock:
            try:
                for flight in flights:
                    engine.prepare(flight)
                    prepared += 1
                for call in calls:
                    parts.append(engine.launch(call) if isinstance(call, Flight) else as_work(call()))
            except BaseException:
                left = [call for call in calls[len(parts) :] if isinstance(call, Flight)]
                for flight in flights[:prepared]:
                    if flight in left and flight.work is None:
                        engine.withdraw(flight)
                self._give_back(left)
                raise
        return parts

    def _watched(self, work: Any, tensors: Sequence[Tensor], opts: Any = None) -> Any:
        """The work of a receive that passed through; on a CPU, waiting for it makes sure that no frame came instead.

        A peer that compresses what this rank takes for a plain message sends a frame. gloo takes it wherever it is not
        longer than the tensor.
        """
        x = tensors[0]
        if len(tensors) > 1 or not x.is_cpu or x.nbytes < HEADER_NBYTES or not x.is_contiguous():
            return work

        def look(_: bool) -> None:
            header = frame_in(x)
            if header is not None:
                raise FrameError(
                    f"{self._engine.label}: a message of {x.numel()} x {x.dtype} that this rank lets pass through "
                    f"arrived as a frame ({header.describe()}); the tensor holds that frame, not the values. Give all "
                    "ranks the same policy, call step() at the same places on all of them, and "
                    "send and receive tensors of the same size and dtype; then call reset() on all ranks"
                )

        job = Job(work, look, None, (x,))
        if opts is not None and not getattr(opts, "asyncOp", True):
            job.finish_now()
            return self._finished
        return PendingWork((job,), list(tensors), self._future_pool)

    def _give_back(self, flights: Iterable[Flight | None]) -> None:
        """Undo the use of ordinals by calls that sent nothing, the last one first."""
        for flight in reversed(list(flights)):
            if flight is not None:
                self._keys.give_back(flight.call)

    def _fly(self, flight: Flight, result: list[Tensor]) -> Any:
        """Prepare and launch one flight, and finish it if the call is synchronous; returns the call's work.

        Raises:
            Whatever encoding or the inner group raises; no ordinal is used then. A synchronous call also raises the
            errors of decoding.
        """
        engine = self._engine
        with engine.lock:
            try:
                job = engine.launch(engine.prepare(flight))
            except BaseException:
                self._keys.give_back(flight.call)
                raise
        if getattr(flight.opts, "asyncOp", True):
            return PendingWork((job,), result, self._future_pool)
        job.finish_now()
        return self._finished

    def _work(self, parts: Sequence[Any], result: list[Tensor]) -> PendingWork:
        """A work that waits for several jobs and inner works."""
        return PendingWork(parts, result, self._future_pool)
