"""Frames that may be passed on in place of being made: what patterns with ``forwards`` do with a part."""

from __future__ import annotations

from torch import Tensor

from compactdist.exchange.engine import Engine, Flight
from compactdist.exchange.forward import Message
from compactdist.exchange.plan import Outgoing
from compactdist.state import put_behind, state_nbytes

__all__ = ["commit_messages", "stage_message"]


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
        if staged.header.is_keyframe and not keyframe and not accepts_unannounced_keyframe:
            put_behind(staged, part.residual_nbytes)
        flight.staged.append(staged)
        flight.keyframes = flight.keyframes and staged.header.is_keyframe
    else:
        message.announce(engine.stage(flight, part, x, message.keyframe, own_bytes=message.own_bytes))


def commit_messages(flight: Flight) -> None:
    """Commit the messages of a flight that was launched."""
    if flight.passed is not None and not flight.messages:  # the tensor travels in a frame that touches no history
        for part, staged in zip(flight.plan.outgoing, flight.staged, strict=True):
            part.stream.commit(staged)  # type: ignore[union-attr,arg-type]
        return
    framed = [staged for staged in flight.staged if staged is not None]
    for message, staged in zip(flight.messages, framed, strict=True):
        message.commit(staged)
