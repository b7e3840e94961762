"""Going back to an earlier moment: what a group remembered then is put back, on every rank."""

from __future__ import annotations

import weakref
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compactdist.errors import ConfigError
from compactdist.exchange.work import drain
from compactdist.group.attach import Attachment, Seen
from compactdist.group.keys import Clock, KeyBook
from compactdist.group.plans import AgreedPlans
from compactdist.state import SavedStreams, load_streams, save_streams

if TYPE_CHECKING:
    from compactdist.config import Options
    from compactdist.exchange.engine import Engine
    from compactdist.exchange.later import Departures
    from compactdist.group.request import Request

__all__ = ["Snapshot", "Snapshots"]


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """What one rank of a group remembers at one moment; made by ``CompressedProcessGroup.snapshot``.

    Attributes:
        step: that had begun last; -1: none since the reset before.
        nbytes: bytes of the histories that it holds copies of, on their devices.
    """

    step: int
    nbytes: int
    _group: weakref.ref[Any]
    _clock: Clock
    _engaged: bool
    _changes: tuple[dict[str, str], Counter[str]]
    _seen: tuple[tuple[weakref.ref[Attachment], Seen], ...]
    _streams: SavedStreams

    def __repr__(self) -> str:
        return f"<Snapshot of step {self.step}, {self.nbytes} bytes>"


class Snapshots:
    """``snapshot`` and ``restore`` of a wrapped group."""

    if TYPE_CHECKING:
        options: Options
        _attachments: list[Attachment]
        _departures: Departures
        _engine: Engine
        _keys: KeyBook
        _plans: AgreedPlans
        _requests: dict[str, Request]
        _ready: Any
        _meet_errors: Any
        reset: Any

    def snapshot(self) -> Snapshot:
        """Copy what this rank remembers, so that :meth:`restore` can go back to this moment, as often as wanted.

        All ranks must call it at the same place among their calls. For trying a step again, and for going on from the
        middle of a request in several ways. It holds as many bytes as the histories do, on their devices, and waits
        for these. Counters (``stats``) and what a target has measured are not in it.

        Raises:
            ConfigError: a call has not been waited for whose work the caller holds, a request has not ended, or
                ``state_budget_bytes`` is set.
            CodecConfigError: a codec's session cannot say what it remembers (``Session.copy_memory``).
            FrameError, NonFiniteError, LateExchangeError: what a GPU, or a late frame, has met since the last step.
        """
        self._ready()
        self._check("snapshot")
        self._departures.join()
        self._meet_errors()
        for site in self._engine.store.sites():
            if not all(job.dropped for job in tuple(site.pending)):
                raise ConfigError(
                    f"{self._engine.label}, site '{site.key}': snapshot() while a call has not been waited for, whose "
                    "history is about to change: wait for its work first, on all ranks"
                )
            drain(site)  # nobody can wait for a call whose work was dropped
        with self._engine.lock:
            streams = save_streams(self._engine.store)
        clock = self._keys.own_clock
        seen = tuple((weakref.ref(one), one.seen(clock)) for one in self._attachments)
        known = clock.copy(), self._keys.engaged, self._plans.changes()
        return Snapshot(clock.step, streams.nbytes, weakref.ref(self), *known, seen, streams)

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to the moment of a snapshot: a reset, after which histories and steps are what they were then.

        All ranks must call it at the same place among their calls, with the snapshots that they made at one place. What
        has been sent since is forgotten, CUDA graphs end, and ranks agree on their plans once again. Calls that do the
        same as those after the snapshot did send the same bytes, but for those of a group with a ``target``.

        Raises:
            ConfigError: the snapshot is another group's, a request has not ended, or ``state_budget_bytes`` is set;
                nothing has changed.
            FrameError, NonFiniteError, LateExchangeError: what a GPU, or a late frame, has met since the last step,
                once everything is put back.
        """
        self._ready()
        self._check("restore")
        if not isinstance(snapshot, Snapshot):
            raise ConfigError(
                f"{self._engine.label}: restore() takes what snapshot() returned, got {type(snapshot).__name__}"
            )
        if snapshot._group() is not self:
            raise ConfigError(
                f"{self._engine.label}: this snapshot is of another group, whose histories its peers do not hold: "
                "restore() it there"
            )
        try:
            self.reset()
        finally:
            self._go_back(snapshot)

    def _go_back(self, snapshot: Snapshot) -> None:
        engine = self._engine
        with engine.lock:
            engine.arrivals.relayed(*load_streams(engine.store, snapshot._streams))
        clock = self._keys.own_clock
        clock.go_on_from(snapshot._clock)
        self._keys.engaged = snapshot._engaged or bool(self._attachments)
        self._plans.go_on_from(snapshot._changes, self._keys.epoch)
        for known, seen in snapshot._seen:
            attachment = known()
            if attachment in self._attachments:
                attachment.go_on_from(clock, seen)

    def _check(self, what: str) -> None:
        """Refuse what snapshots do not know of."""
        label = self._engine.label
        if self._requests:
            raise ConfigError(
                f"{label}: {what}() while request '{next(iter(self._requests))}' has not ended: requests have steps "
                "and histories of their own, which a snapshot does not take; end() them first"
            )
        if self.options.state_budget_bytes is not None:
            raise ConfigError(
                f"{label}: {what}() with state_budget_bytes={self.options.state_budget_bytes}: what is evicted or "
                "offloaded is not in a snapshot yet, which would take as much memory again; use no budget"
            )
