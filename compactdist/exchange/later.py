"""Calls that cannot leave yet: asynchronous collectives whose plan ranks have still to agree on.

They leave in the order in which they were issued, from a thread of the group: the caller may have to do something else,
such as a point-to-point message, before the other ranks come to agree. Other calls of the inner group may come first,
so this is for frames that have a group of their own (:meth:`compactdist.exchange.link.Link.separate`).
"""

from __future__ import annotations

import atexit
import threading
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from compactdist import _torch

__all__ = ["Departures", "Later"]

_STOP_SECONDS = 5.0


class Later:
    """The inner group's work of a call that leaves later."""

    def __init__(self) -> None:
        self._left = threading.Event()
        self._work: Any = None
        self._error: BaseException | None = None

    def leave(self, work: Any) -> None:
        """The call has left: ``work`` is the inner group's."""
        self._work = work
        self._left.set()

    def fail(self, error: BaseException) -> None:
        """The call will not leave."""
        self._error = error
        self._left.set()

    def must_leave(self, timeout: timedelta) -> None:
        """Wait until the call leaves, or fails to.

        Raises:
            TimeoutError: it has not in time; it may still leave.
        """
        if not self._left.wait(timeout.total_seconds()):
            raise TimeoutError(f"ranks have not agreed on the call within {timeout}; wait for it again")

    def wait(self, timeout: timedelta = _torch.NO_TIMEOUT) -> bool:
        """Wait until the call has left and is done.

        Raises:
            TimeoutError: it has not left in time.
            Whatever kept it from leaving, or what the inner group's work raises.
        """
        if timeout:
            self.must_leave(timeout)
        self._left.wait()
        if self._error is not None:
            raise self._error
        return bool(self._work.wait(timeout) if timeout else self._work.wait())

    def is_completed(self) -> bool:
        """Whether waiting would not block."""
        return self._left.is_set() and (self._error is not None or bool(self._work.is_completed()))


class Departures:
    """Calls that leave later, oldest first, and the thread that lets them go.

    Attributes:
        busy: some call has not left yet; later collectives must not overtake it.
        open: the group is in use; once it is not, waits for other ranks should end.

    The thread lives as long as there are calls.
    """

    def __init__(self) -> None:
        self.busy = False
        self.open = True
        self._calls: deque[Callable[[], None]] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def add(self, call: Callable[[], None]) -> None:
        """Let a call leave after those before it; ``call`` must not raise."""
        with self._changed:
            self._calls.append(call)
            self.busy = True
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, daemon=True, name="compactdist-departures")
                self._thread.start()
                atexit.register(self._stop)

    def join(self) -> None:
        """Wait until all calls have left."""
        if self.busy and threading.current_thread() is not self._thread:
            with self._changed:
                while self.busy:
                    self._changed.wait()

    def is_open(self) -> bool:
        """Whether waiting for other ranks still makes sense."""
        return self.open

    def close(self, seconds: float) -> None:
        """Wait for calls that still can leave; those that cannot will fail."""
        with self._changed:
            self._changed.wait_for(lambda: not self.busy, seconds)
            self.open = False

    def _stop(self) -> None:
        """End the thread before the interpreter ends: one inside a store's call would end the process by an abort."""
        thread, self.open = self._thread, False
        if thread is not None:
            thread.join(_STOP_SECONDS)

    def _run(self) -> None:
        while True:
            self._calls[0]()
            with self._changed:
                self._calls.popleft()
                self.busy = bool(self._calls)
                self._changed.notify_all()
                if not self.busy:
                    self._thread = None
                    atexit.unregister(self._stop)
                    return
