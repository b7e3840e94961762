"""Broadcast: one encoder at the root, and a decoder for every other rank."""

from __future__ import annotations

from typing import Any

import torch

from compactdist.exchange.engine import Engine, Flight
from compactdist.exchange.patterns.base import OneMessage, memory_of
from compactdist.exchange.plan import Call, CallPlan, Incoming, Outgoing
from compactdist.state import Site

__all__ = ["BROADCAST", "Broadcast"]


class Broadcast(OneMessage):
    """The root encodes once, every other rank decodes. The root's own tensor stays as it was.

    Signature: (numel, dtype, device, group rank of the root).
    """

    op = "broadcast"
    whole_site = True

    @staticmethod
    def histories(size: int) -> tuple[int, int, int]:
        return size - 1, 1, 0

    def ends(self, engine: Engine, signature: tuple[Any, ...]) -> tuple[int | None, int | None]:
        return signature[3], None

    def plan(self, engine: Engine, call: Call, signature: tuple[Any, ...]) -> CallPlan:
        plan, codec = self.choose(engine, call, signature)
        numel, root, site = signature[0], signature[3], plan.site
        links = engine.size - 1 if engine.rank == root else 0
        plan.raw_numel = links * numel
        plan.raw_nbytes = plan.raw_numel * plan.dtype.itemsize
        if codec is not None:
            if engine.rank == root:
                plan.outgoing = [Outgoing(root, numel, codec, site.encoder(root))]
            else:
                plan.incoming = [Incoming(root, numel, codec, site.decoder(root))]
        return plan

    def common_nbytes(self, engine: Engine, call: Call, plan: CallPlan) -> int:
        (part,) = plan.parts  # the root's or another rank's: each knows what the other holds
        return max(memory_of(engine, plan, part, sender=sends) for sends in (True, False))

    def refuse(self, engine: Engine, flight: Flight) -> set[int]:
        plan = flight.plan
        (part,) = plan.parts
        is_root = bool(plan.outgoing)
        need = memory_of(engine, plan, part, sender=is_root)
        # only the root can say that no history will be kept; the others follow it
        fits = engine.store.reserve(plan.site, Site.ALL, (part.numel, plan.dtype), need, force=not is_root)
        return set() if fits else {Site.ALL}

    def transfer(self, engine: Engine, flight: Flight) -> None:
        plan = flight.plan
        staged = flight.staged[0] if flight.staged else None
        if staged is not None:
            frame = staged.frame
            flight.wire_nbytes = (engine.size - 1) * frame.numel()
        else:
            part = plan.incoming[0]
            flight.keyframes = flight.call.warm or part.fresh
            frame = torch.empty(part.expected_nbytes(flight.call.warm), dtype=torch.uint8, device=plan.signature[2])
            flight.arrived = (frame,)
        flight.work, flight.keep = engine.link.broadcast(frame, flight.opts), (frame,)


BROADCAST = Broadcast()
