"""All-gather: one encoder, and a decoder for every other rank; large tensors travel in parts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compactdist import _torch
from compactdist.codecs import Codec
from compactdist.exchange.engine import Engine, Flight
from compactdist.exchange.parts import Cut, InTurn, cut, number_of_parts, slices
from compactdist.exchange.patterns.base import OneMessage, memory_of
from compactdist.exchange.plan import Call, CallPlan, Incoming, Outgoing
from compactdist.exchange.predicted import at_once
from compactdist.kernels.spec import MatrixView
from compactdist.state import Room, Site

__all__ = ["ALL_GATHER", "AllGather", "in_parts"]


class AllGather(OneMessage):
    """One encoder, every other rank decodes; all frames of a call have one size. A rank's own chunk is written too.

    The tensor's shape is a fourth item of the signature where tensors may travel in parts.
    """

    op = "all_gather"
    whole_site = True
    divides = True

    @staticmethod
    def histories(size: int) -> tuple[int, int, int]:
        return size - 1, 1, size - 1

    def plan(self, engine: Engine, call: Call, signature: tuple[Any, ...]) -> CallPlan:
        plan, codec = self.choose(engine, call, signature)
        links = engine.size - 1
        plan.raw_numel = links * signature[0]
        plan.raw_nbytes = plan.raw_numel * plan.dtype.itemsize
        if codec is not None:
            plan.joint = True
            plan.predicts = self.op == "all_gather" and engine.chooser.predicts(
                plan.answers[0], call.site, codec, engine.config.remembers
            )
            plan.shares_own = not engine.exact_local
            plan.want_value |= plan.shares_own
            hint = self._hint(engine, call, plan) if self._wanted(engine, plan) > 1 else None
            self._divide(engine, plan, codec, hint)
        return plan

    def _wanted(self, engine: Engine, plan: CallPlan) -> int:
        """In how many parts the tensor should travel."""
        if not self.divides or len(plan.signature) < 4:
            return 1
        numel, chooser = plan.signature[0], engine.chooser
        return number_of_parts(chooser.parts, numel, plan.dtype, chooser.min_numel)

    def _hint(self, engine: Engine, call: Call, plan: CallPlan) -> MatrixView | None:
        chooser = engine.chooser
        return chooser.hint(chooser.info(call, plan.dtype, plan.signature[0], *self.ends(engine, plan.signature)))

    def _divide(self, engine: Engine, plan: CallPlan, codec: Codec, hint: MatrixView | None) -> None:
        """Fill in the plan's parts: one for each rank, or for each rank and each part of its tensor."""
        me, site, wanted = engine.rank, plan.site, self._wanted(engine, plan)
        cuts = cut(plan.signature[3], wanted, hint) if wanted > 1 else [Cut(plan.signature[0], hint)]
        plan.cuts, plan.hint = tuple([each.numel for each in cuts]) if len(cuts) > 1 else (), hint
        plan.outgoing, plan.incoming = [], []
        for number, (numel, view) in enumerate(cuts):
            own = site.encoder(me, number, len(cuts))
            plan.outgoing.append(Outgoing(me, numel, codec, own, view, number=number))
            for rank in range(engine.size):
                if rank != me:
                    stream = site.decoder(rank, number, len(cuts))
                    plan.incoming.append(Incoming(rank, numel, codec, stream, view, number=number))

    def ask_hints(self, engine: Engine, call: Call, plan: CallPlan) -> None:
        if self._wanted(engine, plan) < 2 or plan.codec is None:
            super().ask_hints(engine, call, plan)
            return
        hint = self._hint(engine, call, plan)
        if hint != plan.hint:
            self._divide(engine, plan, plan.codec, hint)
            plan.refresh()

    def common_nbytes(self, engine: Engine, call: Call, plan: CallPlan) -> int:
        return sum(memory_of(engine, plan, part, sender=isinstance(part, Outgoing)) for part in plan.parts)

    def refuse(self, engine: Engine, flight: Flight) -> set[int]:
        plan = flight.plan
        need = self.common_nbytes(engine, flight.call, plan)
        fits = engine.store.reserve(plan.site, Site.ALL, (plan.signature[0], plan.dtype), need)
        return set() if fits else {Site.ALL}

    def transfer(self, engine: Engine, flight: Flight) -> None:
        if flight.plan.cuts:
            self._transfer_parts(engine, flight)
            return
        staged = flight.staged[0]
        assert staged is not None
        frame, size = staged.frame, engine.size
        nbytes = frame.numel()
        queue = flight.queue
        place: tuple[Any, ...] = (nbytes, size) if queue is None else (nbytes, size, frame.device, queue)
        # what a graph uses is its own
        room = None if flight.call.captured else engine.store.spares.rooms.pop(place, None)
        if room is None:
            gathered = torch.empty(size * nbytes, dtype=torch.uint8, device=frame.device)
            room = Room(
                place, gathered, tuple([gathered.narrow(0, p.peer * nbytes, nbytes) for p in flight.plan.incoming])
            )
        opts = at_once(flight.opts) if flight.predicted else flight.opts
        flight.work = engine.link.all_gather(room.whole, frame, opts)
        flight.arrived, flight.keep, flight.wire_nbytes = room.views, (frame, room.whole), (size - 1) * nbytes
        flight.rooms = (room,)

    def _transfer_parts(self, engine: Engine, flight: Flight) -> None:
        """Post one inner call for each part, none of which waits."""
        plan, size, link = flight.plan, engine.size, engine.link
        opts, peers = at_once(flight.opts), [part.peer for part in plan.incoming[: size - 1]]
        works, rooms, frames = [], [], []
        for number, staged in enumerate(flight.staged):
            assert staged is not None
            frame = staged.frame
            nbytes = frame.numel()
            place = "part", number, nbytes, size, frame.device, flight.queue
            room = engine.store.spares.rooms.pop(place, None)
            if room is None:
                gathered = torch.empty(size * nbytes, dtype=torch.uint8, device=frame.device)
                room = Room(place, gathered, tuple([gathered.narrow(0, peer * nbytes, nbytes) for peer in peers]))
            works.append(link.all_gather(room.whole, frame, opts))
            rooms.append(room)
            frames.append(frame)
            flight.wire_nbytes += (size - 1) * nbytes
        flight.work = works[0]  # inside a group of calls all have that group's work
        if link.together is None:
            flight.work = flight.in_turn = InTurn(works)
        flight.arrived = [view for room in rooms for view in room.views]
        flight.keep, flight.rooms = (*frames, *[room.whole for room in rooms]), rooms

    def keep_own(self, engine: Engine, flight: Flight) -> None:
        staged = flight.staged[0]
        if flight.failure is not None:
            return
        if flight.plan.cuts and not engine.exact_local and flight.own_output is not None:
            places = flight.places or slices(flight.own_output, flight.plan.cuts)
            found = zip(places, flight.staged, strict=True)
            flight.own_parts = [
                (place, part.value) for place, part in found if part and part.value is not None and not part.copied
            ]
            return
        if engine.exact_local or staged is None or staged.value is None:
            super().keep_own(engine, flight)
        elif not staged.copied:
            flight.own_value = staged.value


def in_parts(flight: Flight) -> Flight:
    """The flight of an all-gather whose plan cuts its tensors: inputs and outputs are those of the parts.

    An output that is not contiguous is written at the end, from one that is.
    """
    cuts = flight.plan.cuts
    with _torch.without_autograd():
        (x,), copies = flight.inputs, []

        def contiguous(output: Tensor) -> Tensor:
            if output.is_contiguous():
                return output
            made = output.detach().contiguous()  # with its values: a part that is refused is not written
            copies.append((output, made))
            return made

        outputs = [slices(contiguous(output), cuts) for output in flight.outputs]
        if flight.own_output is not None:
            flight.own_output = contiguous(flight.own_output)
        flight.inputs = slices(x.detach().contiguous(), cuts)
        flight.outputs = [of_rank[number] for number in range(len(cuts)) for of_rank in outputs]
        flight.copies = copies
    return flight


ALL_GATHER = AllGather()
