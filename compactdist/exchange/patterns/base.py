"""What a pattern says about a kind of call: its parts, and how their frames travel. The engine drives all patterns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import Tensor

from compactdist.codecs import Codec
from compactdist.exchange.arrivals import Arrival
from compactdist.exchange.engine import Engine, Flight
from compactdist.exchange.patterns.messages import commit_messages
from compactdist.exchange.plan import Call, CallPlan, Incoming, Outgoing
from compactdist.observe.stats import PassReason
from compactdist.state import Site, state_nbytes

__all__ = ["OneMessage", "Pattern", "memory_of"]


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
        return sum(memory_of(engine, plan, part, sender=isinstance(part, Outgoing)) for part in plan.parts)

    def refuse(self, engine: Engine, flight: Flight) -> set[int]:
        """Reserve budget for histories that begin; returns the peers (or ``Site.ALL``) it does not suffice for."""
        return set()

    def refuse_all(self, plan: CallPlan) -> set[int]:
        """The peers (or ``Site.ALL``) that a call without room has histories with."""
        return {Site.ALL} if self.whole_site else {part.peer for part in plan.parts if part.codec is not None}

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


def memory_of(engine: Engine, plan: CallPlan, part: Outgoing | Incoming, *, sender: bool) -> int:
    """Bytes that one end of a part's stream will hold.

    Its history, and what the codec learns where a hint says the view.
    """
    if part.codec is None:
        return 0
    learnt = 0 if part.hint is None else part.codec.memory_nbytes(part.hint)
    return learnt + state_nbytes(engine.config, part.numel, plan.dtype, sender=sender)
