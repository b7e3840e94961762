"""Which sites hold histories, as all ranks know alike: the least recently used ones make room for others.

Every rank keeps this book of the same sites, in the same order of calls and against the same budget. So all ranks evict
the same sites at the same call, without a word.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from typing import NamedTuple, Protocol

from compactdist.state.site_key import is_under

__all__ = ["MOST_PATIENCE", "Ledger", "Verdict"]

MOST_PATIENCE = 16
"""A site that was evicted n times takes the room of sites that stood idle during its last n calls; never more calls."""


class Verdict(NamedTuple):
    """What one call means for the histories of sites.

    Attributes:
        evicted: keys of the sites that lose their history now, the least recently used first.
        held: the site has room for its history; if not, no rank keeps one.
        anew: all ranks drop what they hold for the site, because it has just got room, or has just lost its room.
    """

    evicted: tuple[str, ...] = ()
    held: bool = True
    anew: bool = False


class Used(Protocol):
    """A call, as far as the book looks at it. The same object is one call, another object another call."""

    @property
    def site(self) -> str:
        """The site key."""

    @property
    def step(self) -> int:
        """The step of the call."""


_AS_BEFORE = Verdict()


class Ledger:
    """The histories of sites whose bytes are known to all ranks.

    A new site takes the room of sites that were not used in the same step. A site that was used before (evicted since,
    without room, or grown) takes the room only of sites that were not used since. Each time it is evicted, it waits one
    more of its calls. So sites that are used in turn and do not fit together soon stop evicting one another: some stay,
    the others pass through.

    Args:
        budget_bytes: budget of every rank.
    """

    def __init__(self, budget_bytes: int) -> None:
        self._budget = budget_bytes
        self._lock = threading.Lock()
        self._clock = 0
        self._total = 0
        self._bytes: dict[str, int] = {}  # the least recently used first
        self._calls: dict[str, deque[int]] = {}  # of all sites: the numbers of the last calls
        self._last: dict[str, Used] = {}
        self._taken_back: set[str] = set()
        self._evictions: Counter[str] = Counter()

    def use(self, call: Used, nbytes: int) -> Verdict:
        """Note a call of a site, and find room for its history.

        Args:
            call: the call.
            nbytes: the most bytes of the site's history on any rank, above 0.
        """
        key = call.site
        with self._lock:
            self._clock += 1
            calls = self._calls.setdefault(key, deque(maxlen=MOST_PATIENCE + 1))
            if key in self._taken_back:
                self._taken_back.remove(key)
                calls.pop()
            since = self._idle_since(key)
            calls.append(self._clock)
            self._last[key] = call
            held = self._bytes.pop(key, None)
            if held == nbytes:
                self._bytes[key] = nbytes
                return _AS_BEFORE
            self._total -= held or 0
            evicted = self._room_for(nbytes, since, call.step)
            if evicted is None:
                return Verdict(held=False, anew=held is not None)
            for name in evicted:
                self._total -= self._bytes.pop(name)
                self._evictions[name] += 1
            self._total += nbytes
            self._bytes[key] = nbytes
            return Verdict(tuple(evicted), anew=held is None and since is not None)

    def take_back(self, call: Used) -> None:
        """Let the next call of a site stand for one that sent nothing; what that has evicted stays evicted.

        Other ranks, on which nothing failed, note one call only.
        """
        with self._lock:
            if self._last.get(call.site) is call:
                self._taken_back.add(call.site)

    def held(self) -> dict[str, int]:
        """Bytes by key of the sites that have room, the least recently used first."""
        with self._lock:
            return dict(self._bytes)

    def _idle_since(self, key: str) -> int | None:
        """Number of a call: sites used after it are not evicted for this site; ``None``: the site is new."""
        calls = self._calls[key]
        if not calls:
            return None
        patience = min(max(self._evictions[key], 1), MOST_PATIENCE)
        return calls[-patience] if patience <= len(calls) else 0

    def _room_for(self, nbytes: int, since: int | None, step: int) -> list[str] | None:
        """The sites to evict for a history; ``None``: all that may be evicted would not make enough room."""
        missing = self._total + nbytes - self._budget
        evicted: list[str] = []
        for name, freed in self._bytes.items():
            if missing <= 0 or (since is not None and self._calls[name][-1] > since):
                break
            if self._last[name].step != step:
                evicted.append(name)
                missing -= freed
        return evicted if missing <= 0 else None

    def evictions(self, key: str) -> int:
        """How often a site was evicted since it was last forgotten."""
        return self._evictions[key]

    def forget(self, prefix: str | None = None) -> None:
        """Forget all sites, or those under a prefix."""
        with self._lock:
            for key in [key for key in self._calls if is_under(key, prefix)]:
                self._total -= self._bytes.pop(key, 0)
                del self._calls[key], self._last[key]
                self._evictions.pop(key, None)
                self._taken_back.discard(key)
