"""Which call site a call belongs to, and which step it falls into.

A site key is ``prefix/op#n``: the n-th call of an operation under this prefix within the current step. Both ends
compute it from the order of calls alone. Point-to-point calls are counted per directed pair and tag. Prefixes belong to
a thread, counters to the group: two threads that use one group keep apart by prefixes. A request has a step clock and
counters of its own, so that a server may interleave requests.

Order alone tells calls apart that have no name, neither a key nor a module. Where a step made fewer of them than the
step before, nobody can say which were left out: one warning says so, and calls beyond the shorter step's raise.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from compactdist.errors import ConfigError
from compactdist.exchange.plan import Call
from compactdist.state.site_key import REQUEST_PREFIX

__all__ = ["Clock", "KeyBook", "check_name", "check_part"]

_log = logging.getLogger("compactdist")


class Clock:
    """The steps of one request, or of a group that has just one at a time; as a context, the block of its running step.

    Attributes:
        step: steps begun since the last reset, less one; -1 before the first.
        counts: calls so far in this step, by prefix and operation.
        within: the block of the running step has been entered and not left.
        before: by nameless counter, its calls in the last ended step that made some; 0: no such step has ended.
        short: by nameless counter, its calls in a step that made fewer of them than the step before.
    """

    __slots__ = ("__weakref__", "before", "counts", "short", "step", "within")

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.before: dict[str, int] = {}
        self.short: dict[str, int] = {}
        self.restart()

    def restart(self) -> None:
        """Let the first step be the next one."""
        self.step = -1
        self.within = False
        for counts in (self.counts, self.before, self.short):
            counts.clear()

    def copy(self) -> Clock:
        """A clock that shows the same."""
        made = Clock()
        made.go_on_from(self)
        return made

    def go_on_from(self, other: Clock) -> None:
        """Show what another clock shows; a block that has been entered stays so."""
        self.step = other.step
        self.counts, self.before, self.short = dict(other.counts), dict(other.before), dict(other.short)

    def __enter__(self) -> None:
        self.within = True

    def __exit__(self, *exc: object) -> None:
        self.within = False

    def close_step(self) -> tuple[str, int, int] | None:
        """Note each nameless counter's calls; returns (counter, calls before, calls now) of one that made fewer."""
        behind = None
        for counter, before in self.before.items():
            now = self.counts.get(counter, 0)
            if not now:
                continue
            if now < before:
                self.short[counter] = now
                behind = counter, before, now
            self.before[counter] = now
        return behind


class _Prefixes(threading.local):
    def __init__(self) -> None:
        self.clock: Clock | None = None
        self.request: list[str] = []
        self.branch: list[str] = []
        self.keys: list[str] = []
        self.modules: list[str] = []
        self.text = ""
        self.nameless = True

    def join(self) -> str:
        """The prefix as text: request, branch, explicit keys, innermost hooked module."""
        self.text = "/".join((*self.request, *self.branch, *self.keys, *self.modules[-1:]))
        self.nameless = not (self.keys or self.modules)
        return self.text


class KeyBook:
    """Prefixes, counters and the step clock of one group.

    Args:
        warmup_steps: steps after a reset whose frames are all keyframes.
        label: group and rank, for messages.
        on_step: called before a step begins; an error that it raises leaves the clock as it is.

    Attributes:
        epoch: resets so far; more where this rank heard of a rank that had made more.
        engaged: calls can be told apart across steps: a step, a key or an attached module has been seen.
    """

    def __init__(self, warmup_steps: int = 0, label: str = "", on_step: Callable[[], None] | None = None) -> None:
        self._warmup_steps = warmup_steps
        self._on_step = on_step
        self._label = label
        self._warned = False
        self._lock = threading.Lock()
        self._clock = Clock()
        self._prefixes = _Prefixes()
        self._heard_of = 0
        self.epoch = 0
        self.engaged = False

    @property
    def prefix(self) -> str:
        """The current thread's prefix."""
        return self._prefixes.text

    @property
    def current_branch(self) -> str:
        """The current thread's branch, empty outside ``branch()``."""
        return "/".join(self._prefixes.branch)

    @property
    def clock(self) -> Clock:
        """The clock of the current thread's request, or the group's."""
        return self._prefixes.clock or self._clock

    @property
    def own_clock(self) -> Clock:
        """The group's clock, outside of any request."""
        return self._clock

    @property
    def step(self) -> int:
        """Steps begun since the last reset, less one; -1 before the first."""
        return self.clock.step

    def tick(self, index: int | None = None) -> Clock:
        """Begin the next step, or step ``index``: every counter starts again.

        Returns:
            The clock, whose context is the step's block.

        Raises:
            ConfigError: a negative index, or the block of another step has not been left.
            FrameError, NonFiniteError: a device has reported one since the last step.
        """
        if index is not None and (not isinstance(index, int) or index < 0):
            raise ConfigError(f"steps are counted from 0, got {index!r}")
        clock = self._prefixes.clock or self._clock
        if clock.within:
            raise ConfigError(
                f"a step begins inside the with block of step {clock.step}: leave that block first; where attach() "
                "counts the steps, call no step()"
            )
        if self._on_step is not None:
            self._on_step()
        with self._lock:
            self.engaged = True
            ended, behind = clock.step, clock.close_step() if clock.before and clock.step >= 0 else None
            clock.step = clock.step + 1 if index is None else index
            clock.counts.clear()
        if behind is not None and not self._warned:
            self._warned = True
            _log.warning(
                "%s: step %d made fewer calls '%s' than the step before (%d before, %d now). Calls without a name are "
                "told apart by their order, so calls after a left-out one were taken for others, and their residuals "
                "were larger. Name calls that a step may leave out, with key() or attach(model); a later step with "
                "more than %d of these calls raises",
                self._label,
                ended,
                *behind,
                behind[-1],
            )
        return clock

    def restart(self) -> None:
        """Begin a new epoch, whose first step is the next one."""
        self.new_epoch()
        with self._lock:
            self._clock.restart()

    def new_epoch(self) -> None:
        """Begin a new epoch within the running step, for a reset of some sites."""
        with self._lock:
            self.epoch = max(self.epoch, self._heard_of) + 1

    def heard_of(self, epoch: int) -> None:
        """Another rank is in an epoch, maybe a later one: after the next reset of all, both are in the same again."""
        with self._lock:
            self._heard_of = max(self._heard_of, epoch)

    def take(self, site: str, op: str) -> Call:
        """Use up the next ordinal of ``prefix/site``.

        Args:
            site: the operation; for point-to-point calls, followed by the pair of ranks and the tag.
            op: the operation's name in the policy's terms.

        Returns:
            The call.

        Raises:
            ConfigError: an earlier step made fewer of these nameless calls than the one before it, so what this one
                continues is not known.
        """
        prefixes = self._prefixes
        counter = f"{prefixes.text}/{site}" if prefixes.text else site
        clock = prefixes.clock or self._clock
        with self._lock:
            n = clock.counts.get(counter, 0)
            if not n and prefixes.nameless:
                clock.before.setdefault(counter, 0)
            if clock.short and n >= clock.short.get(counter, n + 1):
                raise ConfigError(self._cannot_pair(counter, n, clock))
            clock.counts[counter] = n + 1
            return Call(f"{counter}#{n}", op, clock.step, self.epoch, 0 <= clock.step < self._warmup_steps)

    def _cannot_pair(self, counter: str, n: int, clock: Clock) -> str:
        return (
            f"{self._label}: step {clock.step} makes call {n + 1} of '{counter}', after a step that made {n} of them "
            "and an earlier one that made more. Which of them that step left out cannot be told from their order, so "
            "this call may continue another call's history; nothing was sent. Name calls that a step may leave out, "
            "with key() or attach(model), on all ranks; or call reset() on all ranks where steps begin to make other "
            "calls"
        )

    def peek(self, site: str, op: str) -> Call:
        """The call that :meth:`take` would give now. Its ordinal stays unused, and nothing is refused."""
        prefixes = self._prefixes
        counter = f"{prefixes.text}/{site}" if prefixes.text else site
        clock = prefixes.clock or self._clock
        n = clock.counts.get(counter, 0)
        return Call(f"{counter}#{n}", op, clock.step, self.epoch, 0 <= clock.step < self._warmup_steps)

    def give_back(self, call: Call) -> None:
        """Undo ``take`` for a call that failed before it sent anything."""
        counter, _, n = call.site.rpartition("#")
        counts = self.clock.counts
        with self._lock:
            if counts.get(counter) == int(n) + 1:
                counts[counter] = int(n)

    @contextmanager
    def prefixed(self, name: str, *, branch: bool = False) -> Iterator[None]:
        """Put calls of this thread under a prefix.

        Raises:
            ConfigError: an empty name, one with ``#``, or one that begins as the site keys of requests do.
        """
        check_name(name)
        check_part(name)
        prefixes = self._prefixes
        stack = prefixes.branch if branch else prefixes.keys
        self.engaged = True
        stack.append(name)
        self._begin_prefix()
        try:
            yield
        finally:
            stack.pop()
            prefixes.join()

    @contextmanager
    def within_request(self, prefix: str, clock: Clock) -> Iterator[None]:
        """Let calls and steps of this thread belong to a request."""
        prefixes = self._prefixes
        before = prefixes.clock, prefixes.request
        prefixes.clock, prefixes.request = clock, [prefix]
        prefixes.join()
        try:
            yield
        finally:
            prefixes.clock, prefixes.request = before
            prefixes.join()

    def _begin_prefix(self) -> None:
        """Without steps a prefix alone identifies its sites: entering it counts from the first call again."""
        prefix = self._prefixes.join() + "/"
        clock = self.clock
        if clock.step >= 0:
            return
        with self._lock:
            for counter in [c for c in clock.counts if c.startswith(prefix)]:
                del clock.counts[counter]

    def push_module(self, name: str) -> None:
        """Enter a hooked module."""
        self._prefixes.modules.append(name)
        self._begin_prefix()

    def pop_module(self, name: str) -> None:
        """Leave a hooked module; nothing happens if it was never entered (another pre-hook raised before ours)."""
        prefixes = self._prefixes
        if prefixes.modules[-1:] == [name]:
            prefixes.modules.pop()
            prefixes.join()


def check_name(name: object) -> None:
    """Refuse a name that cannot be part of a site key.

    Raises:
        ConfigError: ``name`` is no string, is empty, or contains ``#``.
    """
    if not isinstance(name, str) or not name or "#" in name:
        raise ConfigError(f"a key is a non-empty string without '#', got {name!r}")


def check_part(name: str) -> None:
    """Refuse the name of a key, branch or module by which a site could be taken for one of a request.

    Raises:
        ConfigError: ``name`` begins as the site keys of requests do.
    """
    if name.startswith(REQUEST_PREFIX):
        raise ConfigError(
            f"the name {name!r} begins with {REQUEST_PREFIX!r}, as the site keys of request() do: calls under it could "
            "be taken for those of a request, and lose their history when that ends. Name it "
            f"{name.replace(':', '-', 1)!r}, or use request()"
        )
