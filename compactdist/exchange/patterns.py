"""The ways a call's parts travel, each a list of outgoing and incoming parts and one inner call; the engine drives all.

To add a collective: a class here that says what its plan is (:meth:`Pattern.plan`) and how its frames travel
(:meth:`Pattern.transfer`), and its ProcessGroup method in ``group/process_group.py``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import permutations
from typing import Any, ClassVar

import torch
from torch import Tensor

from compactdist import _torch
from compactdist.codecs import Codec
from compactdist.exchange.arrivals import Arrival
from compactdist.exchange.engine import Engine, Flight
from compactdist.exchange.forward import Message
from compactdist.exchange.parts import Cut, InTurn, cut, number_of_parts, slices
from compactdist.exchange.plan import Call, CallPlan, Incoming, Outgoing
from compactdist.exchange.predicted import at_once
from compactdist.kernels.spec import MatrixView
from compactdist.observe.stats import PassReason
from compactdist.policy import Rules
from compactdist.state import Room, Site, put_behind, state_nbytes
from compactdist.wire import raw_payload

__all__ = [
    "ALL_GATHER",
    "ALL_TO_ALL",
    "BROADCAST",
    "OneMessage",
    "Pattern",
    "commit_messages",
    "in_parts",
    "stage_message",
]

_EVERY_PEER = Site.ALL


class Pattern(ABC):
    """How the parts of one collective travel. It holds no state: what a site needs lies in its plan.

    Attributes:
        op: the collective's name in the policy's terms.
        waits_for_earlier_calls: sizes depend on the frames of the site's earlier calls, so these are decoded first.
        forwards: frames that arrive may be passed on, and tensors that leave may go in a frame that arrived.
        collective: all ranks of the group make the call, and must agree on its plan.
        whole_site: history is kept with all peers of a site or with none.
        no_room: why a call without history passes through, for lack of budget.
        sends_only: nothing arrives, and waiting for the work is waiting for the peer.
        receives_only: nothing leaves, so nothing is put on the link.
        divides: large tensors travel in parts (``Options.parts``). Elsewhere each tensor is one part: chunks of an
            all-to-all and point-to-point messages may be passed on in the frame they came in, a reduction adds up whole
            chunks, and a broadcast's receivers do not know the shape of the root's tensor.
    """

    op: ClassVar[str]
    waits_for_earlier_calls: ClassVar[bool] = True
    forwards: ClassVar[bool] = False
    collective: ClassVar[bool] = True
    whole_site: ClassVar[bool] = False
    no_room: ClassVar[PassReason] = PassReason.BUDGET
    sends_only: ClassVar[bool] = False
    receives_only: ClassVar[bool] = False
    divides: ClassVar[bool] = False

    @staticmethod
    @abstractmethod
    def histories(size: int) -> tuple[int, int, int]:
        """For one call in a group of ``size`` ranks: messages on the link, encoders and decoders with a history."""

    @abstractmethod
    def answers(self, engine: Engine, call: Call, signature: tuple[Any, ...]) -> tuple[Any, ...]:
        """The policy's answers for the messages of a call, which the plan was made with."""

    @abstractmethod
    def plan(self, engine: Engine, call: Call, signature: tuple[Any, ...]) -> CallPlan:
        """The parts of a call with tensors of these sizes, or why it passes through; hints are asked next."""

    @abstractmethod
    def ends_of(self, engine: Engine, plan: CallPlan, part: Outgoing | Incoming) -> tuple[int | None, int | None]:
        """Source and target of a part, as policy and layout hints see them."""

    def ask_hints(self, engine: Engine, call: Call, plan: CallPlan) -> None:
        """Ask for the layout hints of streams that begin with this call.

        Raises:
            LayoutError: a hint does not fit its message.
        """
        for part in plan.parts:
            if part.codec is not None:
                ends = self.ends_of(engine, plan, part)
                part.hint = engine.chooser.hint(engine.chooser.info(call, plan.dtype, part.numel, *ends))

    def reason_if_refused(self, plan: CallPlan) -> PassReason | None:
        """Why a call passes through where some history was refused for lack of budget."""
        return self.no_room

    def arrival(self, engine: Engine, flight: Flight) -> Arrival | None:
        """The arrival that a pattern with ``forwards`` may pass on, held; ``None`` for none."""
        return None

    def common_nbytes(self, engine: Engine, call: Call, plan: CallPlan) -> int:
        """The most bytes of history that any rank holds for a call; 0: for none, or where ranks do not know."""
        return 0

    def held_nbytes(self, engine: Engine, plan: CallPlan) -> int:
        """Bytes that this rank will hold for a site once its histories have begun."""
        return sum(_memory(engine, plan, part, sender=isinstance(part, Outgoing)) for part in plan.parts)

    def refuse(self, engine: Engine, flight: Flight) -> set[int]:
        """Reserve budget for histories that begin; returns the peers (or ``Site.ALL``) it does not suffice for."""
        return set()

    def refuse_all(self, plan: CallPlan) -> set[int]:
        """The peers (or ``Site.ALL``) that a call without room has histories with."""
        return {_EVERY_PEER} if self.whole_site else {part.peer for part in plan.parts if part.codec is not None}

    def stage(self, engine: Engine, flight: Flight, part: Outgoing, x: Tensor, keyframe: bool) -> None:
        """Make the frame of an outgoing part. The engine asks patterns with ``forwards`` only, and encodes others."""
        engine.stage(flight, part, x, keyframe)

    @abstractmethod
    def transfer(self, engine: Engine, flight: Flight) -> None:
        """Hand the frames to the inner group: sets ``work``, ``arrived``, ``keep`` and ``wire_nbytes``."""

    def commit(self, engine: Engine, flight: Flight) -> None:
        """Commit the frames of a pattern with ``forwards``, which are on their way."""
        commit_messages(flight)

    def keep_own(self, engine: Engine, flight: Flight) -> None:
        """Keep this rank's input for its own output, safe from what the caller does to the input before it waits."""
        if flight.own_input is not None:
            value = flight.own_input.detach().reshape(-1)
            flight.own_value = value.clone() if getattr(flight.opts, "asyncOp", True) else value

    def taken(self, engine: Engine, flight: Flight, part: Incoming) -> None:  # noqa: B027 (most patterns count nothing)
        """Count a decoded frame; the engine asks patterns with ``receives_only`` only."""

    def remember(self, engine: Engine, flight: Flight, part: Incoming, target: Tensor, frame: Tensor) -> None:
        """Remember that ``target`` holds a part's value, whose ``frame`` may be passed on when ``target`` is sent."""
        engine.arrivals.put(flight.plan.site, part.peer, target, frame)


class OneMessage(Pattern):
    """A pattern whose parts are all of one size; signature: (numel, dtype, device, further items of the pattern)."""

    def ends(self, engine: Engine, signature: tuple[Any, ...]) -> tuple[int | None, int | None]:
        """Source and target of the message, as the policy sees them."""
        return None, None

    def ends_of(self, engine: Engine, plan: CallPlan, part: Outgoing | Incoming) -> tuple[int | None, int | None]:
        return self.ends(engine, plan.signature)

    def answers(self, engine: Engine, call: Call, signature: tuple[Any, ...]) -> tuple[Any, ...]:
        chooser = engine.chooser
        return (chooser.ask(chooser.info(call, signature[1], signature[0], *self.ends(engine, signature))),)

    def choose(self, engine: Engine, call: Call, signature: tuple[Any, ...]) -> tuple[CallPlan, Codec | None]:
        """A plan without parts, and the codec; ``None``: the call passes through."""
        chooser, numel, dtype = engine.chooser, signature[0], signature[1]
        plan = CallPlan(self, engine.store.site(call.site), signature, dtype, self.answers(engine, call, signature))
        plan.want_value = bool(engine.samples.every)
        info = chooser.info(call, dtype, numel, *self.ends(engine, signature))
        chosen = chooser.choose(info, plan.answers[0])
        if not isinstance(chosen, Codec):
            plan.reason = chosen
            return plan, None
        plan.codec = chosen
        return plan, chosen


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
        return sum(_memory(engine, plan, part, sender=isinstance(part, Outgoing)) for part in plan.parts)

    def refuse(self, engine: Engine, flight: Flight) -> set[int]:
        plan = flight.plan
        need = self.common_nbytes(engine, flight.call, plan)
        fits = engine.store.reserve(plan.site, _EVERY_PEER, (plan.signature[0], plan.dtype), need)
        return set() if fits else {_EVERY_PEER}

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
                part.key_nbytes = part.residual_nbytes = info.numel * dtype.itemsize
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
                part.key_nbytes = part.residual_nbytes = part.numel * plan.dtype.itemsize
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
            need = _memory(engine, plan, out, sender=True) + _memory(engine, plan, into, sender=False)
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


def _memory(engine: Engine, plan: CallPlan, part: Outgoing | Incoming, *, sender: bool) -> int:
    """Bytes that one end of a part's stream will hold.

    Its history, and what the codec learns where a hint says the view.
    """
    if part.codec is None:
        return 0
    learnt = 0 if part.hint is None else part.codec.memory_nbytes(part.hint)
    return learnt + state_nbytes(engine.config, part.numel, plan.dtype, sender=sender)


def _exact_bytes(x: Tensor) -> Tensor:
    """The bytes of a tensor without padding: what an uncompressed call would send."""
    return raw_payload(x)[: x.numel() * x.dtype.itemsize]


def _rotates(me: int, numels: Sequence[int]) -> bool:
    """Whether at most one chunk has elements and it is another rank's: one hop of a ring."""
    return not numels[me] and sum(1 for numel in numels if numel) <= 1


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
        return max(_memory(engine, plan, part, sender=sends) for sends in (True, False))

    def refuse(self, engine: Engine, flight: Flight) -> set[int]:
        plan = flight.plan
        (part,) = plan.parts
        is_root = bool(plan.outgoing)
        need = _memory(engine, plan, part, sender=is_root)
        # only the root can say that no history will be kept; the others follow it
        fits = engine.store.reserve(plan.site, _EVERY_PEER, (part.numel, plan.dtype), need, force=not is_root)
        return set() if fits else {_EVERY_PEER}

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


def stage_message(
    engine: Engine,
    flight: Flight,
    part: Outgoing,
    x: Tensor,
    keyframe: bool,
    *,
    accepts_unannounced_keyframe: bool,
    reserve: bool = False,
) -> None:
    """Encode a part, or pass on the frame it arrived in.

    With ``reserve``, take budget for a keyframe's history first. Without budget left, only set ``flight.passed`` where
    the receiver takes a frame of any size; elsewhere the keyframe it expects says that no history is kept.
    """
    assert part.stream is not None
    assert part.codec is not None
    message = Message(
        engine.arrivals,
        part.stream,
        x,
        part.codec,
        keyframe_expected=keyframe,
        arrival=flight.arrival,
        accepts_unannounced_keyframe=accepts_unannounced_keyframe,
        may_surprise=engine.may_surprise and x.is_cpu,
        may_begin=not (flight.refusing and engine.refuses(flight, part.peer)),
        hint=part.hint,
    )
    if reserve and message.keyframe and (message.begins or not message.forwards):
        need = state_nbytes(engine.config, part.numel, flight.plan.dtype, sender=True)
        if not engine.store.reserve(flight.plan.site, part.peer, (part.numel, flight.plan.dtype), need):
            if accepts_unannounced_keyframe:
                flight.passed = flight.plan.pattern.no_room
                return
            flight.refusing = flight.refusing | {part.peer}
            message.forwards = message.begins = False
    flight.messages.append(message)
    if message.forwards:
        if engine.tap is not None:
            engine.tap(flight.call, part.peer, x, part.hint)
        staged = message.pass_on(flight.call.step, flight.call.epoch)
        if staged.header.is_key and not keyframe and not accepts_unannounced_keyframe:
            put_behind(staged, part.residual_nbytes)
        flight.staged.append(staged)
        flight.keyframes = flight.keyframes and staged.header.is_key
    else:
        message.announce(engine.stage(flight, part, x, message.keyframe, own_bytes=message.own_bytes))


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


def commit_messages(flight: Flight) -> None:
    """Commit the messages of a flight that was launched."""
    if flight.passed is not None and not flight.messages:  # the tensor travels in a frame that touches no history
        for part, staged in zip(flight.plan.outgoing, flight.staged, strict=True):
            part.stream.commit(staged)  # type: ignore[union-attr,arg-type]
        return
    framed = [staged for staged in flight.staged if staged is not None]
    for message, staged in zip(flight.messages, framed, strict=True):
        message.commit(staged)


ALL_GATHER, ALL_TO_ALL, BROADCAST = AllGather(), AllToAll(), Broadcast()
