"""Frames larger than the size that was agreed: each travels in a message of its own, behind a stand-in for it.

The sender hands such messages to the inner group with the stand-ins, and waits for none of them. A receiver that finds
a stand-in fetches the frame there and then. No other rank takes part, so it makes no difference in which order ranks
wait for their calls.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from compactdist.state.stand_in import tag_of
from compactdist.wire import Header

if TYPE_CHECKING:
    from compactdist.exchange.engine import Engine, Flight

__all__ = ["Behind"]


class Behind:
    """The frames of one rank that follow their stand-ins, kept until all receivers must have them.

    gloo loses a message whose work is collected, and says that it was sent to a waiter only; who waited might wait for
    a rank that waits for this one.

    Attributes:
        sent: of each site, by key: the flight that a frame belongs to, the frame, and its work.
    """

    def __init__(self) -> None:
        self.sent: dict[str, list[tuple[Flight, Tensor, Any]]] = {}

    def send(self, engine: Engine, flight: Flight) -> None:
        """Send the frames that follow the stand-ins of a flight, which are on their way."""
        plan = flight.plan
        kept = self.sent.setdefault(plan.site.key, [])
        for part, staged in zip(plan.outgoing, flight.staged, strict=True):
            if staged is None or staged.behind is None:
                continue
            peers = [part.peer] if part.peer != engine.rank else [r for r in range(engine.size) if r != engine.rank]
            for peer in peers:
                kept.append((flight, staged.behind, engine.link.send(staged.behind, peer, tag_of(staged.header))))
                flight.wire_nbytes += staged.behind.numel()

    @staticmethod
    def fetch(engine: Engine, header: Header, peer: int) -> Tensor:
        """The frame that a stand-in from a peer stands for; ``header``: what the stand-in says. It is waited for."""
        frame = torch.empty(header.nbytes + header.payload_nbytes, dtype=torch.uint8, device="cpu")
        engine.link.receive(frame, peer, tag_of(header)).wait()
        return frame

    def finished(self, flight: Flight) -> None:
        """A flight has arrived: its senders have decoded, and so fetched, what came at its site before."""
        key = flight.plan.site.key
        kept = [one for one in self.sent.pop(key, ()) if one[0] is flight]
        if kept:
            self.sent[key] = kept
