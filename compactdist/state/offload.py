"""Which sites have their state on the device, and which in host memory: ``state_offload="cpu"``.

Nothing is dropped, so no frame depends on it and each rank decides alone: with other budgets than its peers, for sites
whose bytes only two ranks know, and in an order of its own. That order asks when a site will be used next. Sites of
other requests come last; so do sites that stood idle for a whole step. The sites of one step are used in turn, so the
one that was just used waits the longest.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from compactdist import kernels
from compactdist.errors import OffloadError
from compactdist.state.offloaded import Offloaded
from compactdist.state.site_key import without_request

if TYPE_CHECKING:
    from compactdist.state.store import Site

__all__ = ["STATE_OFFLOADS", "Offload", "StateOffload"]

StateOffload = Literal["cpu"]
STATE_OFFLOADS: tuple[StateOffload, ...] = ("cpu",)


@dataclass(slots=True)
class _Use:
    """The last use of a site.

    Attributes:
        site: the call site.
        request: prefix of its request; empty without one.
        step: of the last call.
        at: number of the last call among all calls.
        nbytes: bytes on the device, counted against the budget; before a call, as many as it will need.
        staged: calls that were prepared and have not left: their frames were made against the tensors as they lie.
        is_captured: a CUDA graph knows the addresses of the tensors.
    """

    site: Site
    request: str
    step: int = -1
    at: int = 0
    nbytes: int = 0
    staged: int = 0
    is_captured: bool = False


class Offload:
    """Keeps the state of a group's sites on their devices up to a budget, and the rest in host memory.

    A site that is used comes back, whatever the budget: others make room for it first. Whoever enters a site, or
    changes it, holds a lock of the group under which no other call is prepared or launched.

    Args:
        budget_bytes: bytes of state on the device, of this rank.
        on_offload: told the key of each site whose state is taken to the host.
    """

    def __init__(self, budget_bytes: int, on_offload: Callable[[str], None] = lambda _: None) -> None:
        self.budget_bytes = budget_bytes
        self._on_offload = on_offload
        self._lock = threading.RLock()
        self._uses: dict[str, _Use] = {}
        self._total = 0
        self._clock = 0

    def enter(self, site: Site, step: int, nbytes: int, device: torch.device) -> None:
        """Bring a site's state back for a call, and let it stay until :meth:`leave`; first make room for it.

        Args:
            site: the call site.
            step: of the call.
            nbytes: bytes of history that the site will hold after the call.
            device: of the call's tensors.

        Raises:
            OffloadError: a device, or the host, has no memory for what has to move, or a CUDA graph is being captured.
                All state is as it was.
        """
        with self._lock:
            use = self._uses.get(site.key)
            if use is None or use.site is not site:
                use = self._uses[site.key] = _Use(site, without_request(site.key)[0])
            self._clock += 1
            use.step, use.at = step, self._clock
            if kernels.captures(device):
                self._capture(use)
            else:
                self._count(use, max(nbytes, site.held_bytes))
                try:
                    self._make_room(use)
                    self._bring_back(site)
                except OffloadError:
                    self._count(use, site.state_bytes)
                    raise
            site.queues.enter(device)
            use.staged += 1

    def leave(self, site: Site) -> None:
        """A call that entered has left, or will not."""
        with self._lock:
            use = self._use_of(site)
            if use is not None:
                use.staged -= 1

    def visit(self, site: Site, device: torch.device) -> None:
        """Bring a site's state back to decode a frame that has arrived. The site's lock is held.

        Raises:
            OffloadError: the device has no memory for it; the frame cannot be decoded.
        """
        with self._lock:
            self._bring_back(site)
            site.queues.enter(device)

    def settle(self, site: Site) -> None:
        """Count what a site holds after a call, and make room if that is more than was expected."""
        with self._lock:
            use = self._use_of(site)
            if use is not None:
                self._count(use, site.state_bytes)
                with suppress(OffloadError):  # the next call tries again, and can say so before anything is sent
                    self._make_room(use)

    def forget(self, site: Site) -> None:
        """A site was forgotten; what is under way for it may still bring it back."""
        with self._lock:
            use = self._use_of(site)
            if use is not None:
                self._count(use, 0)
                del self._uses[site.key]

    def wait(self) -> None:
        """Wait until all that was taken to the host is there, so that the host may read it."""
        with self._lock:
            for use in self._uses.values():
                if use.site.offloaded is not None:
                    use.site.queues.wait()

    def _use_of(self, site: Site) -> _Use | None:
        use = self._uses.get(site.key)
        return use if use is not None and use.site is site else None

    def _count(self, use: _Use, nbytes: int) -> None:
        self._total += nbytes - use.nbytes
        use.nbytes = nbytes

    def _capture(self, use: _Use) -> None:
        """Let a site stay for good: a graph that is being captured will read and write at today's addresses."""
        if use.site.offloaded is not None:
            raise OffloadError(
                f"{use.site.label}: {use.site.offloaded_bytes} bytes of its state lie in host memory, and cannot be "
                "brought back while a CUDA graph is captured. Run the same calls once right before the capture, with "
                f"room for all of them: state_budget_bytes is {self.budget_bytes}"
            )
        use.is_captured = True

    def _make_room(self, now: _Use) -> None:
        if self._total > self.budget_bytes:
            for use in self._victims(now):
                self._take_away(use)
                if self._total <= self.budget_bytes:
                    return

    def _victims(self, now: _Use) -> Iterator[_Use]:
        """The sites that may go, those first that will be used last."""
        there = [
            use
            for use in self._uses.values()
            if use is not now and use.nbytes and not use.staged and not use.is_captured and use.site.offloaded is None
        ]
        return iter(sorted(there, key=lambda use: _turn(use, now)))

    def _take_away(self, use: _Use) -> None:
        site = use.site
        if not site.lock.acquire(blocking=False):
            return  # another thread decodes
        try:
            moved = Offloaded(site.streams, site.queues)
        except RuntimeError as error:
            raise OffloadError(
                f"{site.label}: the host has no memory for {site.state_bytes} bytes of its state ({error}), which "
                f"stay where they are, beyond state_budget_bytes={self.budget_bytes}. Nothing was sent; raise "
                "state_budget_bytes, end requests that nobody needs, or leave out state_offload"
            ) from error
        finally:
            site.lock.release()
        if moved.nbytes:
            site.offloaded = moved
            self._on_offload(site.key)
        self._count(use, site.state_bytes)

    def _bring_back(self, site: Site) -> None:
        if site.offloaded is None:
            return
        try:
            site.offloaded.bring_back(site.queues)
        except RuntimeError as error:
            raise OffloadError(
                f"{site.label}: its device has no memory for {site.offloaded_bytes} bytes of its state ({error}), "
                f"which stay in host memory; state_budget_bytes={self.budget_bytes}. Lower it, so that more is left, "
                "and call reset() on all ranks if a frame had arrived"
            ) from error
        site.offloaded = None
        use = self._use_of(site)
        if use is not None:
            self._count(use, max(use.nbytes, site.state_bytes))


def _turn(use: _Use, now: _Use) -> tuple[bool, int, int]:
    """Sorts sites by when they will be used next, the latest first; those with frames to be decoded come last."""
    if use.request != now.request:
        when = 0, use.at
    elif use.step < now.step - 1:
        when = 1, use.at
    else:
        when = 2, -use.at
    return bool(use.site.pending), *when
