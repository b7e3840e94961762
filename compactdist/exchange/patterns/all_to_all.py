"""All-to-all: a stream for each directed pair of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations
from typing import Any

import torch
from torch import Tensor

from compactdist.codecs import Codec
from compactdist.exchange.arrivals import Arrival
from compactdist.exchange.engine import Engine, Flight
from compactdist.exchange.patterns.base import Pattern, memory_of
from compactdist.exchange.patterns.messages import stage_message
from compactdist.exchange.plan import Call, CallPlan, Incoming, Outgoing
from compactdist.observe.stats import PassReason
from compactdist.policy import Rules
from compactdist.state import state_nbytes
from compactdist.wire import raw_payload

__all__ = ["ALL_TO_ALL", "AllToAll"]


class AllToAll(Pattern):
    """An encoder and a decoder per peer; a rank's own chunk is exact.

    Whether a directed chunk is compressed depends on its own number of elements and the policy's answer for its two
    ends, so uneven splits need no agreement beyond what each pair of ranks knows. Signature: (elements to each rank,
    elements from each rank, dtype, device, whether the form of the call says that all chunks of all ranks are equal).
    """

    op = "all_to_all"
    forwards = True

    @staticmethod
    def histories(size: int) -> tuple[int, int, int]:
        return size - 1, size - 1, size - 1

    def answers(self, engine: Engine, call: Call, signature: tuple[Any, ...]) -> tuple[Any, ...]:
        leaving, arriving, dtype, *_ = signature
        chooser, me = engine.chooser, engine.rank
        out = [chooser.ask(chooser.info(call, dtype, n, me, rank)) for rank, n in enumerate(leaving) if rank != me]
        into = [chooser.ask(chooser.info(call, dtype, n, rank, me)) for rank, n in enumerate(arriving) if rank != me]
        return (*out, *into)

    def ends_of(self, engine: Engine, plan: CallPlan, part: Outgoing | Incoming) -> tuple[int | None, int | None]:
        return (engine.rank, part.peer) if isinstance(part, Outgoing) else (part.peer, engine.rank)

    def plan(self, engine: Engine, call: Call, signature: tuple[Any, ...]) -> CallPlan:
        leaving, arriving, dtype, *_ = signature
        chooser, me, site = engine.chooser, engine.rank, engine.store.site(call.site)
        plan = CallPlan(self, site, signature, dtype, self.answers(engine, call, signature))
        plan.want_value = bool(engine.samples.every)
        plan.by_pair, plan.alike = True, signature[4] and not chooser.by_pair
        peers = [rank for rank in range(engine.size) if rank != me]
        reasons: set[PassReason] = set()
        for i, peer in enumerate((*peers, *peers)):
            sends = i < len(peers)
            numel, ends = (leaving[peer], (me, peer)) if sends else (arriving[peer], (peer, me))
            info = chooser.info(call, dtype, numel, *ends)
            chosen = chooser.choose(info, plan.answers[i])
            if not isinstance(chosen, Codec):
                reasons.add(chosen)
            codec = chosen if isinstance(chosen, Codec) and peer not in site.refused else None
            if sends:
                stream = None if codec is None else site.encoder(peer)
                plan.outgoing.append(Outgoing(peer, info.numel, codec, stream))
                plan.codec = plan.codec or codec
            else:
                decoder = None if codec is None else site.decoder(peer)
                part = Incoming(peer, info.numel, codec, decoder)
                part.keyframe_nbytes = part.residual_nbytes = info.numel * dtype.itemsize
                plan.incoming.append(part)
        plan.raw_numel = sum(part.numel for part in plan.outgoing)
        plan.raw_nbytes = plan.raw_numel * dtype.itemsize
        # a function may answer each pair of ranks as it likes, and a rank asks it about its own pairs only
        known_to_all = plan.alike and (chooser.policy is None or isinstance(chooser.policy, Rules))
        plan.detail = sorted(reasons) or (PassReason.BUDGET if known_to_all else PassReason.BUDGET_OF_PAIR)
        even = len({*leaving, *arriving}) == 1
        if even and reasons and not site.refused and all(part.codec is None for part in plan.parts):
            plan.reason = min(reasons)
        return plan

    def reason_if_refused(self, plan: CallPlan) -> PassReason | None:
        # the call cannot pass through, for other ranks may send frames in it: chunks without history travel as they are
        for part in plan.parts:
            if part.peer in plan.site.refused:
                part.codec = part.stream = None
                part.keyframe_nbytes = part.residual_nbytes = part.numel * plan.dtype.itemsize
                part.fresh = False
        plan.codec = next((part.codec for part in plan.outgoing if part.codec is not None), None)
        return None

    def arrival(self, engine: Engine, flight: Flight) -> Arrival | None:
        leaving, arriving, *_ = flight.plan.signature
        if not (_rotates(engine.rank, leaving) and _rotates(engine.rank, arriving)):
            return None
        largest = max(flight.inputs, key=Tensor.numel)
        return engine.arrivals.hold(engine.arrivals.latest(largest), engine.store)

    def common_nbytes(self, engine: Engine, call: Call, plan: CallPlan) -> int:
        if plan.detail is not PassReason.BUDGET:
            return 0
        chooser = engine.chooser
        numel, dtype, links = plan.outgoing[0].numel, plan.dtype, len(plan.outgoing)
        learnt = 0
        if chooser.layouts is not None:  # of all pairs, for a rank has to know what others hold
            infos = [chooser.info(call, dtype, numel, *pair) for pair in permutations(range(engine.size), 2)]
            codec = chooser.choose(infos[0], plan.answers[0])
            hints = {chooser.hint(info) for info in infos} - {None}
            if isinstance(codec, Codec):
                learnt = max((codec.memory_nbytes(hint) for hint in hints if hint is not None), default=0)
        return links * sum(learnt + state_nbytes(engine.config, numel, dtype, sender=sends) for sends in (True, False))

    def refuse(self, engine: Engine, flight: Flight) -> set[int]:
        plan, refusing = flight.plan, set()
        for out, into in zip(plan.outgoing, plan.incoming, strict=True):
            need = memory_of(engine, plan, out, sender=True) + memory_of(engine, plan, into, sender=False)
            # only a keyframe can say that no history will be kept
            can_refuse = out.stream is not None and out.stream.is_fresh(out.numel, plan.dtype)
            what = (out.numel, into.numel, plan.dtype)
            if need and not engine.store.reserve(plan.site, out.peer, what, need, force=not can_refuse):
                refusing.add(out.peer)
        return refusing

    def stage(self, engine: Engine, flight: Flight, part: Outgoing, x: Tensor, keyframe: bool) -> None:
        if part.codec is None:
            flight.staged.append(None)
        else:
            stage_message(engine, flight, part, x, keyframe, accepts_unannounced_keyframe=False)

    def transfer(self, engine: Engine, flight: Flight) -> None:
        plan, size = flight.plan, engine.size
        leaving, arriving = [0] * size, [0] * size
        frames = []
        for part, x, staged in zip(plan.outgoing, flight.inputs, flight.staged, strict=True):
            # an exact chunk travels unpadded: a rank whose chunks all pass through makes the plain call for it
            frames.append(_exact_bytes(x) if staged is None else staged.frame)
            leaving[part.peer] = frames[-1].numel()
        for into in plan.incoming:
            arriving[into.peer] = into.expected_nbytes(flight.call.warm)
        device = flight.inputs[0].device
        wire = torch.cat([torch.empty(0, dtype=torch.uint8, device=device), *frames])
        arrived = torch.empty(sum(arriving), dtype=torch.uint8, device=device)
        flight.work = engine.link.all_to_all(arrived, wire, arriving, leaving, flight.opts)
        chunks = list(arrived.split(arriving))
        del chunks[engine.rank]
        flight.arrived, flight.keep, flight.wire_nbytes = chunks, (wire, arrived), wire.numel()

    def remember(self, engine: Engine, flight: Flight, part: Incoming, target: Tensor, frame: Tensor) -> None:
        leaving, arriving, *_ = flight.plan.signature
        if _rotates(engine.rank, leaving) and _rotates(engine.rank, arriving):
            engine.arrivals.put(flight.plan.site, part.peer, target, frame, by_size=True)


def _exact_bytes(x: Tensor) -> Tensor:
    """The bytes of a tensor without padding: what an uncompressed call would send."""
    return raw_payload(x)[: x.numel() * x.dtype.itemsize]


def _rotates(me: int, numels: Sequence[int]) -> bool:
    """Whether at most one chunk has elements and it is another rank's: one hop of a ring."""
    return not numels[me] and sum(1 for numel in numels if numel) <= 1


ALL_TO_ALL = AllToAll()
