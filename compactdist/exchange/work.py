"""Works of compressed calls: wait once, decode once, in issue order.

A call makes one :class:`Job` per exchange. Jobs of a call site wait in the site's queue; settling one settles those
issued before it, so that decoders see frames in the order encoders made them, whatever order the user waits in. A job
whose work was dropped still moves its decoders on when the site is next used, but no longer writes to the user's
tensors.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import timedelta
from typing import Any

import torch

from compactdist import _torch
from compactdist.exchange.later import Later
from compactdist.exchange.link import CallGroup, Done, as_work
from compactdist.state.store import Site

__all__ = ["FinishedWork", "Job", "Outbox", "PendingWork", "drain"]

_log = logging.getLogger("compactdist")


class Job:
    """One exchange under way.

    Args:
        inner: the inner group's work; waited for exactly once (gloo's point-to-point works hang on a second wait).
        finish: decodes; called with ``True`` if it may write to the user's tensors.
        site: the call site whose jobs finish in issue order; ``None`` for a send, which has nothing to decode.
        keep: tensors that must live until the inner work is done.

    Attributes:
        attended: the call is synchronous, so its caller still holds the outputs although nobody holds a work.
        late: the call was answered with its prediction, so nobody waits and ``error`` is raised by a later call.
    """

    __slots__ = (
        "__weakref__",
        "_finish",
        "_inner",
        "_keep",
        "_lock",
        "_owner",
        "_site",
        "_waited",
        "attended",
        "done",
        "error",
        "late",
    )

    def __init__(
        self, inner: Any, finish: Callable[[bool], None] | None, site: Site | None, keep: Sequence[torch.Tensor] = ()
    ) -> None:
        self._inner = as_work(None) if inner is None else inner
        self._finish = finish
        self._site = site
        self._keep: Sequence[torch.Tensor] = keep
        self._owner: Callable[[], object | None] | None = None
        self._lock = threading.RLock() if site is None else site.lock
        self._waited = inner.__class__ is Done
        self.attended = False
        self.late = False
        self.done = False
        self.error: BaseException | None = None
        if site is not None:
            site.pending.append(self)
        if inner.__class__ is CallGroup:
            inner.jobs.append(self)

    def owned_by(self, work: object) -> None:
        """Remember the work the user holds, weakly."""
        self._owner = weakref.ref(work)

    @property
    def dropped(self) -> bool:
        """Whether nobody holds the work: the user has let go of it, or it was never made."""
        return not self.attended and (self._owner is None or self._owner() is None)

    @property
    def handed_out(self) -> bool:
        """Whether the work was made and the user has had it."""
        return self._owner is not None

    def settle(self, timeout: timedelta = _torch.NO_TIMEOUT) -> None:
        """Finish all jobs issued earlier at this site, then this one; raises this job's error."""
        with self._lock:
            pending = self._site.pending if self._site is not None else None
            while pending and pending[0] is not self and not self.done:
                pending[0].run()
            if not self.done:
                self.run(timeout)
        if self.error is not None:
            raise self.error

    def run(self, timeout: timedelta = _torch.NO_TIMEOUT) -> None:
        """Wait, decode, and keep the error if there is one. The caller holds the lock.

        Raises:
            TimeoutError: the call has not left in time; nothing has changed.
            CallGroupError: the call is inside a group of calls that has not ended; nothing has changed.
        """
        if self._inner.__class__ is CallGroup:
            self._inner.must_be_issued()
        if timeout and isinstance(self._inner, Later):
            self._inner.must_leave(timeout)
        try:
            if not self._waited:
                self._waited = True
                if self._site is not None and self._site.unprepared.sessions:
                    with _torch.without_autocast():
                        self._site.unprepared.prepare()
                if timeout:
                    self._inner.wait(timeout)
                else:
                    self._inner.wait()
            if self._finish is not None:
                self._finish(self.attended or not self.dropped)
        except BaseException as error:
            self.error = error
            if self.dropped and not self.late:
                _log.warning("an exchange whose work was dropped failed: %s", error)
        finally:
            self.done = True
            self._finish = None
            self._keep = ()
            if self._site is not None and self._site.pending and self._site.pending[0] is self:
                self._site.pending.popleft()
            self._site = None  # a work that the caller keeps must not keep histories

    def finish_late(self) -> None:
        """Wait, and decode; an error stays in ``error``."""
        with self._lock:
            while self._site is not None and self._site.pending and not self.done:
                self._site.pending[0].run()

    def abandon(self) -> None:
        """Nobody will ever wait: the CUDA graph that was to make the exchange has come to nothing."""
        with self._lock:
            if self._site is not None and self in self._site.pending:
                self._site.pending.remove(self)
            self.done, self._finish, self._keep, self._site = True, None, (), None

    def is_ready(self) -> bool:
        """Whether waiting would not block."""
        return self.done or bool(self._inner.is_completed())

    def poll(self) -> bool:
        """Decode if that needs no waiting; returns whether the job is done."""
        if self.done:
            return True
        if not self._lock.acquire(blocking=False):
            return False
        try:
            queue = list(self._site.pending) if self._site is not None else [self]
            for job in queue:
                if not job.is_ready():
                    return False
                if job is self:
                    break
            if not self.done:
                try:
                    self.settle()
                except BaseException:
                    _log.debug("kept for wait(): %s", self.error)
            return True
        finally:
            self._lock.release()


def drain(site: Site) -> None:
    """Finish all jobs of this site: needed where the next frames depend on what the last frames announced."""
    if site.pending:
        with site.lock:
            while site.pending:
                site.pending[0].run()


class PendingWork(_torch.Work):
    """What an asynchronous compressed call returns. What others sent is written to the outputs by ``wait`` (or the
    first use of a functional collective's result), not before; a rank's own chunk may be written with its frame.

    Args:
        jobs: :class:`Job` objects, or inner works of parts that passed through (``None`` from synchronous ones).
        result: the output tensors.
        future_pool: returns the group's executor, which resolves futures.
    """

    def __init__(
        self,
        jobs: Sequence[Any],
        result: list[torch.Tensor],
        future_pool: Callable[[], ThreadPoolExecutor],
    ) -> None:
        super().__init__()
        self._jobs = [as_work(job) for job in jobs]
        self._result = result
        self._future_pool = future_pool
        self._future: Any = None
        self._plain_waited: set[int] = set()
        self._lock = threading.RLock()
        for job in self._jobs:
            if isinstance(job, Job):
                job.owned_by(self)

    @_torch.opaque
    def wait(self, timeout: timedelta = _torch.NO_TIMEOUT) -> bool:
        """Wait for the exchange and write the outputs. May be called again; raises the same error again.

        Raises:
            FrameError, NonFiniteError: from ``Engine.finish``; also whatever the inner work raises.
            CallGroupError: the call is inside a group of calls that has not ended.
        """
        error: BaseException | None = None
        with self._lock:
            for i, job in enumerate(self._jobs):
                try:
                    if isinstance(job, Job):
                        job.settle(timeout)
                    elif i not in self._plain_waited:
                        self._plain_waited.add(i)
                        if timeout:
                            job.wait(timeout)
                        else:
                            job.wait()
                except BaseException as e:
                    error = error or e
        if error is not None:
            raise error
        return True

    def is_completed(self) -> bool:
        """Whether the outputs are written. Polling makes progress."""
        return all(job.poll() if isinstance(job, Job) else job.is_completed() for job in self._jobs)

    def is_success(self) -> bool:
        """Whether the call is complete and without error."""
        return self.is_completed() and self.exception() is None

    def exception(self) -> BaseException | None:
        """The first error, or ``None``."""
        return next((job.error for job in self._jobs if isinstance(job, Job) and job.error is not None), None)

    def result(self) -> list[torch.Tensor]:
        """The output tensors; wait first."""
        return self._result

    def synchronize(self) -> None:
        """Same as ``wait``."""
        self.wait()

    def source_rank(self) -> int:
        """The sender's group rank, for a receive from any source."""
        job = self._jobs[0]
        inner = job._inner if isinstance(job, Job) else job
        return int(inner._source_rank())

    _source_rank = source_rank

    def get_future(self) -> Any:
        """A ``torch.futures.Future`` of the outputs, resolved on the group's own thread (gloo's callbacks run on its
        network threads, where waiting would hang, and its point-to-point works have no futures at all).

        Outputs on a GPU are decoded on the stream that is current here, and the future carries an event of that stream.

        Raises:
            CallGroupError: the call is inside a group of calls that has not ended.
        """
        with self._lock:
            if self._future is None:
                self._must_be_issued()
                devices: list[Any] = sorted({x.device for x in self._result if x.is_cuda}, key=str)
                streams = [torch.cuda.current_stream(device) for device in devices]
                future: Any = torch.futures.Future(devices=devices)
                self._future = future

                def resolve() -> None:
                    try:
                        with ExitStack() as current:
                            for stream in streams:
                                current.enter_context(torch.cuda.stream(stream))
                            self.wait()
                            future.set_result(self._result)
                    except BaseException as error:
                        future.set_exception(error)

                self._future_pool().submit(resolve)
            return self._future

    def _must_be_issued(self) -> None:
        for job in self._jobs:
            inner = job._inner if isinstance(job, Job) else job
            if isinstance(inner, CallGroup):
                inner.must_be_issued()


class FinishedWork(_torch.Work):
    """What a synchronous compressed call returns: everything is done."""

    def __init__(self) -> None:
        super().__init__()

    def wait(self, timeout: timedelta = _torch.NO_TIMEOUT) -> bool:
        """Return at once."""
        return True

    synchronize = wait

    def is_completed(self) -> bool:
        """True."""
        return True

    is_success = is_completed

    def exception(self) -> BaseException | None:
        """``None``: an error was raised by the call itself."""
        return None

    def result(self) -> list[torch.Tensor]:
        """Nothing: the outputs are the caller's."""
        return []

    def get_future(self) -> Any:
        """A resolved future."""
        future: Any = torch.futures.Future()
        future.set_result([])
        return future


class Outbox:
    """Keeps the frames of sends alive whose works the caller dropped: gloo loses a send whose work is collected.

    gloo reports a send as complete only to a waiter, so once more than ``depth`` works of sends to one peer are
    dropped, the oldest of these sends is waited for; NCCL would have blocked the CUDA stream long before. A send whose
    work the caller holds is never waited for here: its peer may be waiting for this rank.
    """

    def __init__(self, depth: int = 64) -> None:
        self._depth = depth
        self._queues: dict[int, _Queue] = {}
        self._lock = threading.Lock()

    def add(self, peer: int, job: Job) -> None:
        """Hold a send to ``peer`` until it is known to be done. Call this before the work of ``job`` is made."""
        with self._lock:
            queue = self._queues.setdefault(peer, _Queue())
            while queue.jobs and queue.jobs[0].done:
                queue.jobs.popleft()
            queue.jobs.append(job)
            oldest = queue.dropped_beyond(self._depth)
        for dropped in oldest:
            dropped.settle()

    def flush(self) -> None:
        """Wait for all sends still held."""
        with self._lock:
            jobs = [job for queue in self._queues.values() for job in queue.jobs]
            self._queues.clear()
        for job in jobs:
            job.settle()


class _Queue:
    """The sends to one peer, oldest first."""

    def __init__(self) -> None:
        self.jobs: deque[Job] = deque()
        self._calls_to_skip = 0

    def dropped_beyond(self, depth: int) -> list[Job]:
        """Remove finished sends and all dropped sends but the last ``depth``; returns the removed dropped ones.

        A long queue is not searched in every call, but in one of ``len(jobs) // 64 + 1`` calls: with 10,000 sends under
        way a call looks at 64 of them on average, and up to 156 more than ``depth`` may have been dropped.
        """
        if len(self.jobs) <= depth:
            return []
        if self._calls_to_skip:
            self._calls_to_skip -= 1
            return []
        dropped = [job for job in self.jobs if job.handed_out and job.dropped and not job.done]
        oldest = dropped[: max(len(dropped) - depth, 0)]
        taken = set(oldest)
        self.jobs = deque(job for job in self.jobs if not job.done and job not in taken)
        self._calls_to_skip = len(self.jobs) // 64
        return oldest
