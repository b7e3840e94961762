"""The inner group's six calls that carry frames; callers see no difference between backends or torch versions.

A work that is ``None`` (NCCL, for a synchronous call) counts as done: later work on its CUDA stream comes after it.
Inside a group of calls the inner group's works mean nothing (NCCL returns ``None``, or a work that cannot be waited
for): what to wait for is the work that the end of the group returns (:class:`CallGroup`).
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compactdist import _torch
from compactdist.errors import CallGroupError

__all__ = ["CallGroup", "Collectives", "Done", "Link", "as_work"]


class Done(_torch.Work):
    """The work of a call that returned none: nothing is left to wait for."""

    def __init__(self) -> None:
        super().__init__()

    def wait(self, timeout: timedelta = _torch.NO_TIMEOUT) -> bool:
        """Return at once."""
        return True

    def is_completed(self) -> bool:
        """True."""
        return True

    def _source_rank(self) -> int:
        raise RuntimeError("the inner group returned no work for a receive from any source: receive from a named rank")


def as_work(work: Any) -> Any:
    """The work that an inner call returned, or a :class:`Done` if it returned ``None``."""
    return Done() if work is None else work


class CallGroup(_torch.Work):
    """Calls that the inner group issues together when the group of calls ends: the inner work of each of them.

    Attributes:
        jobs: what is to be decoded, in the order of the calls.
        results: the calls' output tensors.
        ended: the calls have been issued.
        thread, name: of the thread that makes the calls.
    """

    def __init__(self) -> None:
        super().__init__()
        self.jobs: list[Any] = []
        self.results: list[Tensor] = []
        self.ended = False
        self.thread, self.name = threading.get_ident(), threading.current_thread().name
        self._work: Any = None
        self._error: BaseException | None = None
        self._lock = threading.Lock()

    def end(self, work: Any) -> None:
        """The calls have been issued; ``work`` is the inner group's, of all of them."""
        self._work, self.ended = as_work(work), True

    def fail(self, error: BaseException) -> None:
        """The calls could not be issued."""
        self._error, self.ended = error, True

    def must_be_issued(self) -> None:
        """Refuse to go on while nothing was issued.

        Raises:
            CallGroupError: the group of calls has not ended.
        """
        if not self.ended:
            raise CallGroupError(
                "a call inside a group of calls (a coalescing manager), which is issued at its end, was waited for, "
                "its future was asked for, or its site was called again: end the group first"
            )

    def wait(self, timeout: timedelta = _torch.NO_TIMEOUT) -> bool:
        """Wait for all calls; later waits return at once (gloo's point-to-point works hang on a second wait).

        Raises:
            CallGroupError: nothing was issued yet.
            Whatever the inner group raised when it ended, or raises now.
        """
        self.must_be_issued()
        with self._lock:
            if self._error is not None:
                raise self._error
            work, self._work = self._work, None
            if work is not None:
                try:
                    work.wait(timeout) if timeout else work.wait()
                except BaseException as error:
                    self._error = error
                    raise
        return True

    def is_completed(self) -> bool:
        """Whether waiting would not block."""
        return self.ended and (self._work is None or bool(self._work.is_completed()))


class Collectives(NamedTuple):
    """The methods of a process group, or of a backend, that carry frames of collectives."""

    all_gather: Callable[..., Any]
    all_to_all: Callable[..., Any]
    broadcast: Callable[..., Any]

    @classmethod
    def of(cls, group: Any) -> Collectives:
        """Those of a group."""
        gather, exchange = _torch.ALL_GATHER_SINGLE, _torch.ALL_TO_ALL_SINGLE
        return cls(_torch.first_method(group, gather), _torch.first_method(group, exchange), group.broadcast)


class Link:
    """The calls of an inner group that carry frames, 1-D uint8 tensors. Every call returns a work.

    gloo's collectives have to be issued in one order on all ranks. A frame may leave later than it was issued, as ranks
    have to agree on it first, and the caller may use the inner group in the meantime. So frames of collectives get a
    gloo group of their own (:meth:`separate`) before the first of them leaves.

    Args:
        inner: the group that frames travel on; ``None`` once the wrapped group is closed: then no call can be made.

    Attributes:
        opened: the group of calls that is open; ``None`` for none.
        exact_sizes: messages of all tensors must be received at the size they are sent with.
        on_cpu, elsewhere: what carries the frames of collectives, on CPUs and on other devices.
        gloo: the inner group's gloo backend for CPU tensors; ``None``: it has none that can be made twice.
        own: the gloo group that frames of collectives on CPUs have of their own, or ``None``.
    """

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.opened: CallGroup | None = None
        self._done = Done()
        self.exact_sizes = bool(getattr(inner, "exact_sizes", False))
        self.gloo: Any = None if self.exact_sizes else _torch.gloo_of(inner)
        self.own: Any = None
        self._timeout: Any = None
        self._under_way: deque[Any] = deque()
        if inner is None:
            return
        self.on_cpu = self.elsewhere = Collectives.of(inner)

    def separate(self, store: Any) -> None:
        """Give frames of collectives on CPUs a gloo group of their own. Collective; not twice.

        Args:
            store: that nobody else uses.

        Raises:
            RuntimeError: ranks could not be connected in time.
        """
        self.own = _torch.second_gloo(self.gloo, store)
        self.on_cpu = Collectives.of(self.own)
        self._timeout = self.gloo.options._timeout

    def rejoin(self) -> None:
        """Let frames travel on the inner group again; those under way on their own group may still arrive."""
        if self.own is not None:
            _torch.leave_gloo(self.own, self._under_way)
            self.own, self._under_way, self.on_cpu = None, deque(), self.elsewhere

    def follow_timeout(self) -> None:
        """Give the frames' own group, which there is, the timeout that the inner group has now."""
        timeout = self.gloo.options._timeout
        if timeout != self._timeout:
            self._timeout = timeout
            self.own._set_default_timeout(timeout)

    def watched(self, group: Any, call: Callable[..., Any], *given: Any) -> Any:
        """What a collective returns that is made on ``group``, a :meth:`carrier`."""
        work = call(*given)
        return work if group is not self.own else self._carried(work)

    def _carried(self, work: Any) -> Any:
        """The work of a collective on the frames' own group, once that is remembered while it is under way."""
        under_way = self._under_way  # gloo gives every call a work, and has no groups of calls
        while under_way and under_way[0].is_completed():
            under_way.popleft()
        under_way.append(work)
        return work

    def carrier(self, x: Tensor) -> Any:
        """The group that frames of such tensors travel on in collectives: their own one, or the inner group."""
        return self.own if self.own is not None and x.is_cpu else self._inner

    @property
    def together(self) -> CallGroup | None:
        """The group of calls that this thread has opened; ``None`` for none."""
        opened = self.opened
        return opened if opened is not None and opened.thread == threading.get_ident() else None

    def refuse_others(self) -> None:
        """Refuse a call that would be issued with the group of calls that another thread has opened.

        Raises:
            CallGroupError: there is one.
        """
        opened = self.opened
        if opened is not None and opened.thread != threading.get_ident():
            raise CallGroupError(
                f"thread {opened.name!r} has a group of calls (a coalescing manager) open on this process group, and "
                f"thread {threading.current_thread().name!r} makes a call, which the inner group would issue with "
                "those: end the group of calls first, or give each thread a process group of its own. Nothing was sent"
            )

    def needs_exact_sizes(self, x: Tensor) -> bool:
        """Whether messages of such tensors must be received at the size they are sent with, as on NCCL.

        gloo takes a shorter message, and only gloo carries CPU tensors.
        """
        return self.exact_sizes or not x.is_cpu

    def work_of(self, work: Any) -> Any:
        """What to wait for after an inner call that returned ``work``."""
        opened = self.opened
        if opened is not None and opened.thread == threading.get_ident():
            return opened
        return self._done if work is None else work

    def begin_together(self, device: torch.device) -> CallGroup:
        """Begin a group of calls.

        Raises:
            CallGroupError: one is open.
            RuntimeError: the inner group cannot group calls (gloo).
        """
        self.refuse_others()
        if self.opened is not None:
            raise CallGroupError(
                "a group of calls (a coalescing manager) was begun inside another, or after one that an error left "
                "open: end the first one before you begin the next"
            )
        _torch.inner_call(self._inner, _torch.START_COALESCING, device)
        made = self.opened = CallGroup()
        return made

    def end_together(self, device: torch.device) -> CallGroup:
        """End the group of calls, which issues them.

        Raises:
            CallGroupError: none is open.
            Whatever the inner group raises; then waiting for the calls raises it, too.
        """
        self.refuse_others()
        together, self.opened = self.opened, None
        if together is None:
            raise CallGroupError("a group of calls (a coalescing manager) was ended that was not begun")
        try:
            together.end(_torch.inner_call(self._inner, _torch.END_COALESCING, device))
        except BaseException as error:
            together.fail(error)
            raise
        return together

    def all_gather(self, arrived: Tensor, frame: Tensor, opts: Any) -> Any:
        """Gather every rank's frame, all of one size, into ``arrived``, in rank order."""
        calls = self.on_cpu if frame.is_cpu else self.elsewhere
        opts = opts or _torch.options("AllgatherOptions")
        work = calls.all_gather(arrived, frame, opts)
        return self._carried(work) if self.own is not None and frame.is_cpu else self.work_of(work)

    def all_to_all(self, arrived: Tensor, frames: Tensor, arriving: list[int], leaving: list[int], opts: Any) -> Any:
        """Exchange frames between all ranks; ``arriving`` and ``leaving`` give bytes by group rank."""
        calls, opts = self.on_cpu if frames.is_cpu else self.elsewhere, opts or _torch.options("AllToAllOptions")
        work = calls.all_to_all(arrived, frames, arriving, leaving, opts)
        return self._carried(work) if self.own is not None and frames.is_cpu else self.work_of(work)

    def broadcast(self, frame: Tensor, opts: Any) -> Any:
        """Copy the root's frame into every other rank's ``frame``."""
        calls = self.on_cpu if frame.is_cpu else self.elsewhere
        work = calls.broadcast([frame], opts)
        return self._carried(work) if self.own is not None and frame.is_cpu else self.work_of(work)

    def send(self, frame: Tensor, peer: int, tag: int) -> Any:
        """Send a frame to group rank ``peer``."""
        return self._pair_work(self._inner.send([frame], peer, tag))

    def receive(self, frame: Tensor, peer: int, tag: int) -> Any:
        """Receive a frame from group rank ``peer``."""
        return self._pair_work(self._inner.recv([frame], peer, tag))

    def _pair_work(self, work: Any) -> Any:
        """The work of a point-to-point call, which is ``None`` only inside a group of calls.

        Raises:
            CallGroupError: it was begun past this group, so nobody would know when to decode.
        """
        if work is None and self.together is None:
            raise CallGroupError(
                "the inner group is inside a group of calls that the wrapped group was not told of, as in functional "
                "batches on NCCL before torch 2.14: use torch.distributed.batch_isend_irecv, or the inner group; then "
                "call reset() on all ranks"
            )
        return self.work_of(work)

    def receive_any(self, frame: Tensor, tag: int) -> Any:
        """Receive a frame from whichever rank sends first; the work's ``_source_rank`` gives its group rank."""
        return self.work_of(self._inner.recv_anysource([frame], tag))
