"""All streams of one group, by call site, with the memory they may use."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from typing import Any, TypeVar

from compactdist.state.board import Board
from compactdist.state.decoder import StreamDecoder
from compactdist.state.encoder import StreamEncoder
from compactdist.state.offload import Offload
from compactdist.state.offloaded import Offloaded, Queues
from compactdist.state.rate import RateControl
from compactdist.state.replays import Replays
from compactdist.state.site_key import is_under
from compactdist.state.stream import Changes, Spares, StreamState
from compactdist.state.stream_config import StreamConfig
from compactdist.state.unprepared import Unprepared
from compactdist.wire import stream_fingerprint

__all__ = ["Site", "StateStore"]

StreamT = TypeVar("StreamT", StreamEncoder, StreamDecoder)


class Site:
    """One call site: its encoders and decoders by peer, and its exchanges that are not yet decoded, oldest first.

    Attributes:
        key: the site key.
        label: names group, rank and site in error messages.
        fingerprint: names the site's streams in frames.
        encoders, decoders: streams to and from peers (group ranks): those of whole tensors, or of the first parts of
            tensors that travel in parts.
        further_encoders, further_decoders: streams of the further parts, by peer and number of the part from 1.
        changes: counts the changes of the streams that outdate a plan.
        plan: the :class:`~compactdist.exchange.plan.CallPlan` of the site's last call; only the exchanges use it.
        refused: peers with which no history is kept for lack of budget; :data:`ALL` for the whole site.
        reserved: bytes of budget taken per peer (or :data:`ALL`).
        pending: exchanges issued and not yet decoded.
        unprepared: what streams of the group leave to do until a message is waited for.
        captured: counts the replays of its calls, once a CUDA graph has captured one.
        offloaded: what of its state lies in host memory (``state_offload``), or ``None``.
        queues: the CUDA streams that work on its state, known where it may be offloaded.
        lock: held while an exchange of this site is waited for and decoded.
    """

    ALL = -1

    def __init__(
        self,
        key: str,
        config: StreamConfig,
        label: str,
        fingerprint: int,
        spares: Spares | None = None,
        rank: int | None = None,
        board: Board | None = None,
        control: RateControl | None = None,
        unprepared: Unprepared | None = None,
    ) -> None:
        self.key = key
        self._control = control
        self.unprepared = unprepared or Unprepared()
        self._rank = rank
        self.fingerprint = fingerprint
        self._config = config
        self.label = label
        self._spares = spares
        self.changes = Changes()
        self._shared = self.changes, board, self.unprepared
        self.plan: Any = None
        self.encoders: dict[int, StreamEncoder] = {}
        self.decoders: dict[int, StreamDecoder] = {}
        self.further_encoders: dict[tuple[int, int], StreamEncoder] = {}
        self.further_decoders: dict[tuple[int, int], StreamDecoder] = {}
        self.refused: set[int] = set()
        self.reserved: dict[int, tuple[object, int]] = {}
        self.pending: deque[Any] = deque()
        self.captured: Replays | None = None
        self.offloaded: Offloaded | None = None
        self.queues = Queues()
        self.lock = threading.RLock()

    def encoder(self, peer: int, part: int = 0, parts: int = 1) -> StreamEncoder:
        """The stream to ``peer`` (this rank itself for a stream that every rank receives) of one part of its tensors.

        Where the tensors travelled in another number of parts before, all that was kept of them is forgotten.
        """
        found = self.further_encoders.get((peer, part)) if part else self.encoders.get(peer)
        to = f"{self.label}, sending to {'all ranks' if peer == self._rank else f'rank {peer}'}"
        if found is None:
            found = StreamEncoder(self._config, self.fingerprint, to, self._spares, *self._shared)
            if part:
                self.further_encoders[peer, part] = found
            else:
                self.encoders[peer] = found
            if self._control is not None:
                found.steers = self._control.stream((self.key, peer, part) if part else (self.key, peer))
        return self._divided(found, peer, part, parts, to, self.further_encoders)

    def decoder(self, peer: int, part: int = 0, parts: int = 1) -> StreamDecoder:
        """The stream from ``peer`` of one part of its tensors; see :meth:`encoder`."""
        found = self.further_decoders.get((peer, part)) if part else self.decoders.get(peer)
        where = f"{self.label}, frame from rank {peer}"
        if found is None:
            found = StreamDecoder(self._config, self.fingerprint, where, *self._shared)
            if part:
                self.further_decoders[peer, part] = found
            else:
                self.decoders[peer] = found
        return self._divided(found, peer, part, parts, where, self.further_decoders)

    def _divided(
        self, stream: StreamT, peer: int, part: int, parts: int, where: str, further: dict[tuple[int, int], StreamT]
    ) -> StreamT:
        """The stream. If the number of parts has changed, drops its history and those of parts that no longer exist."""
        if stream.parts != parts:
            stream.divide(part, parts, where if parts == 1 else f"{where}, part {part + 1} of {parts}")
            self._let_go(stream)
            for (to, number), other in further.items():
                if to == peer and number >= parts:
                    other.drop()
                    self._let_go(other)
                    if isinstance(other, StreamEncoder) and other.steers is not None:
                        other.steers.rest()
        return stream

    def encoders_to(self, peer: int) -> Iterator[StreamEncoder]:
        """The streams to ``peer``, one for each part."""
        return _of_peer(peer, self.encoders, self.further_encoders)

    def decoders_from(self, peer: int) -> Iterator[StreamDecoder]:
        """The streams from ``peer``, one for each part."""
        return _of_peer(peer, self.decoders, self.further_decoders)

    @property
    def streams(self) -> tuple[StreamEncoder | StreamDecoder, ...]:
        """All streams, those to peers first."""
        encoders = (*self.encoders.values(), *self.further_encoders.values())
        return (*encoders, *self.decoders.values(), *self.further_decoders.values())

    @property
    def held_bytes(self) -> int:
        """Bytes of tensors held for this site, wherever they lie."""
        return sum(stream.state_bytes for stream in self.streams)

    @property
    def state_bytes(self) -> int:
        """Bytes of tensors held for this site where its calls use them, so without those that were offloaded."""
        return self.held_bytes - self.offloaded_bytes

    @property
    def offloaded_bytes(self) -> int:
        """Bytes of this site's tensors that lie in host memory until its next call."""
        return 0 if self.offloaded is None else self.offloaded.nbytes

    def stop_graphs(self) -> None:
        """Replays of this site's captured calls are refused from now on."""
        for stream in self.streams:
            if stream.clock is not None:
                stream.clock.stop()

    def drop(self, peer: int) -> None:
        """Forget the history shared with ``peer`` (or all)."""
        dropped = self.streams if peer == Site.ALL else (*self.encoders_to(peer), *self.decoders_from(peer))
        for stream in dropped:
            stream.drop()
            self._let_go(stream)

    def _let_go(self, stream: StreamState) -> None:
        """A stream has forgotten its history, which may have been offloaded."""
        if self.offloaded is not None:
            self.offloaded.forget(stream)


class StateStore:
    """Sites of one group by key, and the state budget of this rank.

    Args:
        config: how streams predict.
        label: start of every error message, naming group and rank.
        budget_bytes: cap on history tensors of this rank; ``None`` for no cap.
        group: name of the group, equal on all ranks; frames of another group are refused.
        rank: this rank; ``None`` outside a group.
        control: chooses rates for a target; ``None``: nobody does.
        offload: takes what goes beyond the budget to host memory, so that no history is refused; ``None``: nobody does.

    Attributes:
        control, offload: as given.
        known: all sites by key, for reading only.
        board: what streams report from a device.
        unprepared: what streams leave to do until a message is waited for.
        ended: forgotten sites whose calls CUDA graphs have captured, by key. Replays write to their memory still, until
            the site is captured again or the group is closed.
        spares: buffers for the next reconstructions, one of each size for all sites. They hold no history and do not
            count as state.
    """

    def __init__(
        self,
        config: StreamConfig,
        label: str,
        budget_bytes: int | None,
        group: str = "",
        rank: int | None = None,
        control: RateControl | None = None,
        offload: Offload | None = None,
    ) -> None:
        self.config = config
        self._rank = rank
        self.control = control
        self.offload = offload
        self._label = label
        self._group = group
        self._described = repr(config)
        self.budget_bytes = budget_bytes
        self.spares = Spares()
        self.board = Board()
        self.unprepared = Unprepared()
        self.ended: dict[str, list[Site]] = {}
        self._reserved = 0
        self.known: dict[str, Site] = {}
        self._lock = threading.Lock()

    def site(self, key: str) -> Site:
        """The site of this key, made on first use."""
        found = self.known.get(key)
        if found is None:
            with self._lock:
                fingerprint = stream_fingerprint(self._group, key, self._described)
                where = f"{self._label}, site '{key}'"
                known = self.spares, self._rank, self.board, self.control, self.unprepared
                site = Site(key, self.config, where, fingerprint, *known)
                found = self.known.setdefault(key, site)
        return found

    def find(self, key: str) -> Site | None:
        """The site of this key, if there is one."""
        return self.known.get(key)

    def knows(self, site: Site) -> bool:
        """Whether a site was not forgotten since it was made."""
        return self.known.get(site.key) is site

    def sites(self) -> list[Site]:
        """All sites, in order of first use."""
        with self._lock:
            return list(self.known.values())

    def reserve(self, site: Site, peer: int, what: object, nbytes: int, *, force: bool = False) -> bool:
        """Take ``nbytes`` of budget for a stream (or all of a site's); a new amount replaces the old.

        Args:
            site: the call site.
            peer: the stream's other end, or :data:`Site.ALL`.
            what: identifies the amount (numel and dtype); asking for an equal ``what`` again takes nothing.
            nbytes: bytes of history tensors that will be held.
            force: take the amount even beyond the cap, where only the other end could have refused.

        Returns:
            Whether the amount was taken; ``False``: it would go beyond the cap. A site that was forgotten takes
            nothing: what is still under way for it is gone once that is finished.
        """
        with self._lock:
            if not self.knows(site):
                return True
            old, held = site.reserved.get(peer, (None, 0))
            if old == what:
                return True
            capped = self.budget_bytes is not None and self.offload is None
            beyond = capped and self._reserved - held + nbytes > (self.budget_bytes or 0)
            if beyond and not force:
                return False
            self._reserved += nbytes - held
            site.reserved[peer] = (what, nbytes)
            return True

    def refuse(self, site: Site, peer: int) -> None:
        """Keep no history with ``peer`` at this site from now on."""
        site.refused.add(peer)
        site.changes.count += 1
        site.drop(peer)
        with self._lock:
            self._reserved -= site.reserved.pop(peer, (None, 0))[1]

    def reset(self, prefix: str | None = None) -> None:
        """Forget all sites, or those whose key starts with ``prefix``.

        Exchanges under way keep their own site and finish against it.

        Raises:
            CaptureError: a CUDA graph is being captured, and others would end; nothing was forgotten.
        """
        with self._lock:
            gone = [key for key in self.known if is_under(key, prefix)]
            for site in [self.known[key] for key in gone]:
                if site.captured is not None:
                    site.stop_graphs()
            for key in gone:
                site = self.known.pop(key)
                self._reserved -= sum(nbytes for _, nbytes in site.reserved.values())
                site.reserved.clear()
                if site.captured is not None:
                    self.ended.setdefault(key, []).append(site)
                site.plan = None  # which refers to the site: histories would stay until the garbage collector comes
                if self.offload is not None:
                    self.offload.forget(site)
            self.spares.clear()
            self.unprepared.clear()
            if self.control is not None and prefix is None:
                self.control.restart()
            elif self.control is not None and prefix is not None:
                self.control.forget(prefix)

    def rates(self) -> dict[str, str]:
        """The rate in use per key, or the lowest and the highest of its streams, where a target has them chosen."""
        found: dict[str, set[int]] = {}
        for key, rate in () if self.control is None else self.control.rates().items():
            found.setdefault(key[0], set()).add(rate)
        return {key: "-".join(map(str, sorted({min(rates), max(rates)}))) for key, rates in found.items()}

    def state_bytes(self) -> dict[str, int]:
        """Bytes held per key, without those that were offloaded."""
        return {site.key: site.state_bytes for site in self.sites()}

    def offloaded_bytes(self) -> dict[str, int]:
        """Bytes in host memory per key, of the sites that have some there."""
        return {site.key: site.offloaded_bytes for site in self.sites() if site.offloaded is not None}


def _of_peer(peer: int, first: dict[int, StreamT], further: dict[tuple[int, int], StreamT]) -> Iterator[StreamT]:
    if peer in first:
        yield first[peer]
    yield from (stream for (other, _), stream in further.items() if other == peer)
