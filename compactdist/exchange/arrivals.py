"""The last frame of every incoming stream that may be passed on, found again by the tensor it was decoded to.

Nothing here keeps a user's tensor alive: an arrival refers weakly to its storage and is removed when that is collected.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compactdist.state import Site, StateStore
from compactdist.state.relay import Received, digest_of
from compactdist.state.site_key import is_under
from compactdist.wire import HEADER_NBYTES, NO_STATE, NONFINITE, STATELESS, payload_of

__all__ = ["Arrival", "Arrivals"]

_Stream = tuple[str, int]


@dataclass(slots=True)
class Arrival:
    """The last frame of an incoming stream and the tensor it was decoded to.

    Attributes:
        received: the frame.
        site: call site of the stream; while its lock is held, the decoder does not move on.
        stream: key of the site and group rank of the sender.
        storage: weak reference to the tensor's storage.
        address, shape, strides, dtype: of the tensor; together with ``storage`` they identify it.
    """

    received: Received
    site: Site
    stream: _Stream
    storage: weakref.ref[Any]
    address: int
    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype

    def release(self) -> None:
        """Let the stream move on again after ``Arrivals.hold``."""
        self.site.lock.release()

    def is_in(self, x: Tensor) -> bool:
        """Whether ``x`` is this tensor: same storage, address, shape, strides and dtype."""
        return (
            (self.shape, self.strides, self.dtype) == (x.shape, x.stride(), x.dtype)
            and self.address == x.data_ptr()
            and self.storage() is x.untyped_storage()
        )


class _Trust(threading.local):
    depth = 0


class Arrivals:
    """The arrivals of one group.

    Args:
        enabled: ``False``: remember nothing.
    """

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self._lock = threading.RLock()  # a storage may be collected, and its arrival with it, while this is held
        self._by_stream: dict[_Stream, Arrival] = {}
        self._by_address: dict[int, Arrival] = {}
        self._by_size: dict[tuple[int, torch.dtype], Arrival] = {}
        self._relayed: set[_Stream] = set()
        self._trust = _Trust()

    @property
    def empty(self) -> bool:
        """Whether nothing can be passed on."""
        return not self._by_stream

    @property
    def trusted(self) -> bool:
        """Whether this thread is inside :meth:`trust`."""
        return self._trust.depth > 0

    @contextmanager
    def trust(self) -> Iterator[None]:
        """Context in which this thread promises that it sends received tensors on untouched."""
        self._trust.depth += 1
        try:
            yield
        finally:
            self._trust.depth -= 1

    def put(self, site: Site, source: int, x: Tensor, frame: Tensor, *, by_size: bool = False) -> None:
        """Remember the frame that the site's decoder for ``source`` has just decoded, and that ``x`` holds its value.

        Args:
            site: the call site, locked.
            source: group rank of the sender.
            x: the user's tensor.
            frame: 1-D uint8.
            by_size: let :meth:`latest` find the arrival.
        """
        decoder = site.decoder(source)
        header = decoder.header
        if not self.enabled or header is None or header.flags & (STATELESS | NONFINITE | NO_STATE):
            return
        received = Received(decoder, decoder.sequence, header, decoder.checksum)
        stream = (site.key, source)
        coded_keyframe = header.is_keyframe and not header.is_raw_keyframe
        if received.checksum is None and (stream in self._relayed or header.is_keyframe):
            received.head = frame[:HEADER_NBYTES].clone()
        if stream in self._relayed or coded_keyframe:  # a coded keyframe is passed on by streams that relay nothing yet
            if not header.is_raw_keyframe:
                received.payload = payload_of(frame, header).clone()
            if x.device.type == "cpu" and not decoder.config.remembers_values:
                received.digest = digest_of(x)
        try:
            storage = x.untyped_storage()
        except NotImplementedError:  # a tensor subclass without storage
            return
        arrival = Arrival(
            received,
            site,
            stream,
            weakref.ref(storage, lambda ref: self._collected(stream, ref)),
            x.data_ptr(),
            x.shape,
            x.stride(),
            x.dtype,
        )
        with self._lock:
            self._by_stream[stream] = arrival
            self._by_address[arrival.address] = arrival
            if by_size:
                self._by_size[x.numel(), x.dtype] = arrival

    def forget(self, site: Site, source: int) -> None:
        """Forget a stream's arrival, because its decoder is about to move on."""
        if self.enabled:
            with self._lock:
                arrival = self._by_stream.get((site.key, source))
                if arrival is not None:
                    self._remove(arrival)

    def _collected(self, stream: _Stream, ref: weakref.ref[Any]) -> None:
        with self._lock:
            arrival = self._by_stream.get(stream)
            if arrival is not None and arrival.storage is ref:
                self._remove(arrival)

    def _remove(self, arrival: Arrival) -> None:
        del self._by_stream[arrival.stream]
        if self._by_address.get(arrival.address) is arrival:
            del self._by_address[arrival.address]
        size = (arrival.shape.numel(), arrival.dtype)
        if self._by_size.get(size) is arrival:
            del self._by_size[size]

    def clear(self, prefix: str | None = None) -> None:
        """Forget everything, or what arrived at sites under a prefix."""

        def gone(stream: _Stream) -> bool:
            return is_under(stream[0], prefix)

        with self._lock:
            for arrival in list(self._by_stream.values()):
                if gone(arrival.stream):
                    self._remove(arrival)
            self._relayed = {stream for stream in self._relayed if not gone(stream)}

    def relayed(self, *streams: _Stream) -> None:
        """Outgoing streams relay these: from now on keep the payloads and digests that passing on needs."""
        with self._lock:
            self._relayed.update(streams)

    def found(self, x: Tensor) -> Arrival | None:
        """The arrival that was decoded into this very tensor, or ``None``.

        Off the CPU nothing proves that the tensor is untouched, so there an arrival is found inside :meth:`trust` only.
        """
        if not self._by_address or (x.device.type != "cpu" and not self.trusted):
            return None
        arrival = self._by_address.get(x.data_ptr())
        return arrival if arrival is not None and arrival.is_in(x) else None

    def latest(self, x: Tensor) -> Arrival | None:
        """The last arrival of this size and dtype put with ``by_size``, or ``None``; on the CPU only.

        The caller must prove that ``x`` holds its values: they may have been copied since.
        """
        return self._by_size.get((x.numel(), x.dtype)) if x.device.type == "cpu" else None

    def hold(self, arrival: Arrival | None, store: StateStore) -> Arrival | None:
        """Keep an arrival's decoder from moving on until :meth:`Arrival.release`.

        Returns:
            The arrival; ``None`` if its stream has moved on, if a reset has dropped its site, or if another thread
            holds the site's lock. Waiting for that thread could block for ever: it may wait for a message that depends
            on the one this thread is about to send.
        """
        if arrival is None or not store.knows(arrival.site):
            return None
        if not arrival.site.lock.acquire(blocking=False):
            return None
        if arrival.received.decoder.sequence == arrival.received.sequence:
            return arrival
        arrival.site.lock.release()
        return None

    def kept_bytes(self) -> dict[str, int]:
        """Bytes of payloads kept, by the key of the site where they arrived."""
        kept: dict[str, int] = {}
        with self._lock:
            for arrival in list(self._by_stream.values()):
                if arrival.received.payload is not None:
                    key = arrival.site.key
                    kept[key] = kept.get(key, 0) + arrival.received.payload.nbytes
        return kept
