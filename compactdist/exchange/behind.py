"""Frames larger than the size that was agreed: each travels in a message of its own, behind a stand-in for it.

The sender hands such messages to the inner group with the stand-ins, and its callers wait for none of them. A receiver
that finds a stand-in fetches the frame there and then. No other rank takes part, so it makes no difference in which
order ranks wait for their calls, nor when.
"""

from __future__ import annotations

import atexit
import logging
import threading
import time
from collections import deque
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from compactdist.exchange.link import Link
from compactdist.state.stand_in import tag_of
from compactdist.wire import Header

if TYPE_CHECKING:
    from compactdist.exchange.engine import Engine, Flight

__all__ = ["Behind"]

_log = logging.getLogger("compactdist")
_FOR_EVER = timedelta(days=30)
"""gloo closes all connections of a group where a wait runs into its timeout."""
_STOP_SECONDS = 5.0
_THREADS = 16
"""As many messages are waited for at a time; more only where none of these has been received for a while."""
_STUCK_SECONDS = 10.0


class Behind:
    """The frames of one rank that follow their stand-ins, kept until their receivers have them.

    gloo loses a message whose work is garbage collected, and tells only a waiter that a message was received. So
    threads wait for the messages. No caller does: it might wait for a rank that waits for this one. Where a receiver
    has dropped its call, nobody fetches the message; it keeps one thread busy and delays no other message.
    """

    def __init__(self) -> None:
        self._left: deque[tuple[Tensor, Any]] = deque()
        self._under_way = self._threads = 0
        self._changed = threading.Condition()
        self._moved = 0.0

    def __len__(self) -> int:
        """Messages that may not have been received."""
        return self._under_way

    def send(self, engine: Engine, flight: Flight) -> None:
        """Send the frames that follow the stand-ins of a flight, if there are any; these are on their way."""
        for part, staged in zip(flight.plan.outgoing, flight.staged, strict=True):
            if staged is None or staged.behind is None:
                continue
            peers = [part.peer] if part.peer != engine.rank else [r for r in range(engine.size) if r != engine.rank]
            for peer in peers:
                self._keep(staged.behind, engine.link.send(staged.behind, peer, tag_of(staged.header)))
                flight.wire_nbytes += staged.behind.numel()

    @staticmethod
    def fetch(link: Link, header: Header, peer: int) -> Tensor:
        """The frame that a stand-in from a peer stands for; ``header``: what the stand-in says. It is waited for."""
        frame = torch.empty(header.nbytes + header.payload_nbytes, dtype=torch.uint8, device="cpu")
        link.receive(frame, peer, tag_of(header)).wait()
        return frame

    def join(self, seconds: float) -> bool:
        """Wait until all messages were received, at most so long; returns whether they were."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._under_way, seconds)

    def _keep(self, frame: Tensor, work: Any) -> None:
        with self._changed:
            self._left.append((frame, work))
            self._under_way += 1
            if self._under_way == 1:
                atexit.register(self.join, _STOP_SECONDS)
            if self._threads < _THREADS or time.monotonic() - self._moved > _STUCK_SECONDS:
                self._threads, self._moved = self._threads + 1, time.monotonic()
                threading.Thread(target=self._run, daemon=True, name="compactdist-behind").start()

    def _run(self) -> None:
        while True:
            with self._changed:
                if not self._left:
                    self._threads -= 1
                    return
                message = self._left.popleft()
            try:
                message[1].wait(_FOR_EVER)
            except Exception as error:  # the group is gone, or a rank: calls say so, too
                _log.debug("a frame behind a stand-in was not received: %s", error)
            del message
            with self._changed:
                self._moved = time.monotonic()
                self._under_way -= 1
                if not self._under_way:
                    atexit.unregister(self.join)
                self._changed.notify_all()
