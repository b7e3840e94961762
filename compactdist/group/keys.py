"""Which call site a call belongs to, and which step it falls into.

A key is ``prefix/op#n``: the n-th call of an operation under this prefix within the current step. Both ends compute it
from the order of calls alone. Point-to-point calls are counted per directed pair and tag. Prefixes belong to a thread,
counters to the group: two threads that use one group keep apart by prefixes.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from compactdist.errors import ConfigError

__all__ = ["CallKey", "KeyBook"]


@dataclass(frozen=True, slots=True)
class CallKey:
    """The identity of one call, fixed when it is issued.

    Attributes:
        name: the full key.
        step: the group's step since the last reset, counted from 0; -1 before the first.
        epoch: resets of the group so far.
    """

    name: str
    step: int
    epoch: int


class _Prefixes(threading.local):
    def __init__(self) -> None:
        self.branch: list[str] = []
        self.keys: list[str] = []
        self.modules: list[str] = []


class KeyBook:
    """Prefixes, counters and the step clock of one group."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[str, int] = {}
        self._prefixes = _Prefixes()
        self.step = -1
        self.epoch = 0
        self.engaged = False

    @property
    def prefix(self) -> str:
        """The current thread's prefix: branch, explicit keys, innermost hooked module."""
        p = self._prefixes
        return "/".join((*p.branch, *p.keys, *p.modules[-1:]))

    @property
    def current_branch(self) -> str:
        """The current thread's branch, empty outside ``branch()``."""
        return "/".join(self._prefixes.branch)

    def active(self) -> bool:
        """Whether calls can be told apart across steps: a step, a key or an attached module has been seen."""
        return self.engaged

    def tick(self, index: int | None = None) -> None:
        """Begin the next step, or step ``index``: every counter starts again.

        Raises:
            ConfigError: a negative index.
        """
        if index is not None and index < 0:
            raise ConfigError(f"steps are counted from 0, got {index}")
        with self._lock:
            self.engaged = True
            self.step = self.step + 1 if index is None else index
            self._counts.clear()

    def restart(self) -> None:
        """A new epoch: the next step is the first again."""
        with self._lock:
            self.epoch += 1
            self.step = -1
            self._counts.clear()

    def new_epoch(self) -> None:
        """A new epoch within the running step, for a reset of some sites."""
        with self._lock:
            self.epoch += 1

    def take(self, site: str) -> CallKey:
        """Use up the next ordinal of ``prefix/site``."""
        prefix = self.prefix
        counter = f"{prefix}/{site}" if prefix else site
        with self._lock:
            n = self._counts.get(counter, 0)
            self._counts[counter] = n + 1
            return CallKey(f"{counter}#{n}", self.step, self.epoch)

    def give_back(self, key: CallKey) -> None:
        """Undo ``take`` for a call that failed before it sent anything."""
        counter, _, n = key.name.rpartition("#")
        with self._lock:
            if self._counts.get(counter) == int(n) + 1:
                self._counts[counter] = int(n)

    @contextmanager
    def prefixed(self, name: str, *, branch: bool = False) -> Iterator[None]:
        """Put calls of this thread under a prefix.

        Raises:
            ConfigError: an empty name or one with ``#``.
        """
        if not isinstance(name, str) or not name or "#" in name:
            raise ConfigError(f"a key is a non-empty string without '#', got {name!r}")
        stack = self._prefixes.branch if branch else self._prefixes.keys
        self.engaged = True
        stack.append(name)
        self._begin_prefix()
        try:
            yield
        finally:
            stack.pop()

    def _begin_prefix(self) -> None:
        """Without steps a prefix alone identifies its sites: entering it counts from the first call again."""
        if self.step >= 0:
            return
        prefix = self.prefix + "/"
        with self._lock:
            for counter in [c for c in self._counts if c.startswith(prefix)]:
                del self._counts[counter]

    def push_module(self, name: str) -> None:
        """Enter a hooked module."""
        self._prefixes.modules.append(name)
        self._begin_prefix()

    def pop_module(self, name: str) -> None:
        """Leave a hooked module; nothing happens if it was never entered (another pre-hook raised before ours)."""
        if self._prefixes.modules[-1:] == [name]:
            self._prefixes.modules.pop()
