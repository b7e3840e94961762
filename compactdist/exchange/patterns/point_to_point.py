"""Send and receive: one stream per directed pair, tag and ordinal. Every frame tells its own kind and size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from compactdist import _torch
from compactdist.codecs import Codec
from compactdist.errors import UnforeseenSizeError
from compactdist.exchange.arrivals import Arrival
from compactdist.exchange.engine import Engine, Flight
from compactdist.exchange.patterns.base import OneMessage
from compactdist.exchange.patterns.messages import commit_messages, stage_message
from compactdist.exchange.plan import Call, CallPlan, Incoming, Outgoing
from compactdist.exchange.work import Job, drain
from compactdist.kernels.spec import MatrixView
from compactdist.observe.stats import PassReason
from compactdist.state import blocks
from compactdist.wire import HEADER_NBYTES, STATELESS, frame_in, from_raw, raw_nbytes

__all__ = ["RECEIVE", "RECEIVE_EXACTLY", "SEND", "receive_any", "stream_name"]


def stream_name(source: int, target: int, tag: int) -> str:
    """The part of a site key that both ends of a directed pair share."""
    return f"send/{source}>{target}/t{tag}"


class Send(OneMessage):
    """One stream per directed pair, tag and ordinal. A receiver on the CPU takes kind and size from the frame itself.

    A differentiable tensor, or one for which there is no state budget, travels as it is in a frame that touches no
    history: the receiver cannot foresee either. Where it must, and a keyframe of the tensor's own bytes is due, a
    differentiable tensor is that keyframe. Signature: (numel, dtype, device, source, target).
    """

    op = "send"
    collective = False
    no_room = PassReason.BUDGET_OF_PAIR
    waits_for_earlier_calls = False
    forwards = True
    sends_only = True

    @staticmethod
    def histories(size: int) -> tuple[int, int, int]:
        return 1, 1, 0

    def ends(self, engine: Engine, signature: tuple[Any, ...]) -> tuple[int | None, int | None]:
        return signature[3], signature[4]

    def plan(self, engine: Engine, call: Call, signature: tuple[Any, ...]) -> CallPlan:
        plan, codec = self.choose(engine, call, signature)
        numel, peer = signature[0], signature[4]
        plan.raw_numel, plan.raw_nbytes = numel, numel * plan.dtype.itemsize
        if codec is not None:
            plan.outgoing = [Outgoing(peer, numel, codec, plan.site.encoder(peer))]
        return plan

    def arrival(self, engine: Engine, flight: Flight) -> Arrival | None:
        return engine.arrivals.hold(engine.arrivals.found(flight.inputs[0]), engine.store)

    def stage(self, engine: Engine, flight: Flight, part: Outgoing, x: Tensor, keyframe: bool) -> None:
        accepts = not engine.link.needs_exact_sizes(x)
        assert part.codec is not None
        own_bytes = keyframe and engine.config.keyframe_for(part.codec, part.numel, flight.plan.dtype) is None
        is_expected = own_bytes and not accepts and engine.devices_take_keyframes
        if flight.passed is None or is_expected:
            stage_message(engine, flight, part, x, keyframe, accepts_unannounced_keyframe=accepts, reserve=True)
        if flight.passed is not None and not is_expected:
            assert part.stream is not None
            staged = part.stream.stage_stateless(x, part.codec, step=flight.call.step, epoch=flight.call.epoch)
            if not accepts:
                self._check_size(engine, flight, staged.frame.numel(), part.expected_nbytes(flight.call.warm))
            flight.staged.append(staged)

    @staticmethod
    def _check_size(engine: Engine, flight: Flight, nbytes: int, expected: int) -> None:
        """Refuse to send a tensor as it is to a receiver that expects a coded one."""
        if nbytes != expected:
            assert flight.passed is not None
            raise UnforeseenSizeError(
                f"{engine.label}, site '{flight.call.site}': this message cannot be compressed ({flight.passed.text}) "
                f"and would take {nbytes} bytes, but group rank {flight.plan.outgoing[0].peer} cannot know that and "
                f"expects {expected}; nothing was sent. Send under no_grad() what needs no gradients, raise "
                "state_budget_bytes, or let the site pass through by the policy on both ranks"
            )

    def transfer(self, engine: Engine, flight: Flight) -> None:
        staged = flight.staged[0]
        assert staged is not None
        flight.work = engine.link.send(staged.frame, flight.plan.outgoing[0].peer, flight.tag)
        flight.keep, flight.wire_nbytes = (staged.frame,), staged.frame.numel()

    def commit(self, engine: Engine, flight: Flight) -> None:
        commit_messages(flight)
        for peer in flight.refusing:  # its next message passes through, which may be sent before this one is waited for
            engine.store.refuse(flight.plan.site, peer)
        stream = flight.plan.outgoing[0].stream
        if stream is not None and stream.relay is not None and stream.relay.shared:
            engine.store.reserve(flight.plan.site, flight.plan.outgoing[0].peer, "shared", 0)


class Receive(OneMessage):
    """The other end of :class:`Send`. Signature: (numel, dtype, device, source, target).

    On the CPU a receive is posted at the upper bound of the frame's size (gloo takes a shorter message, and kills the
    process on a longer one), so that the sender alone decides what it sends.
    """

    op = "send"  # both ends ask the policy about the one message
    collective = False
    no_room = PassReason.BUDGET_OF_PAIR
    waits_for_earlier_calls = False
    forwards = True
    receives_only = True

    @staticmethod
    def histories(size: int) -> tuple[int, int, int]:
        return 0, 0, 1

    def ends(self, engine: Engine, signature: tuple[Any, ...]) -> tuple[int | None, int | None]:
        return signature[3], signature[4]

    def plan(self, engine: Engine, call: Call, signature: tuple[Any, ...]) -> CallPlan:
        plan, codec = self.choose(engine, call, signature)
        numel, source = signature[0], signature[3]
        if codec is not None:
            plan.incoming = [Incoming(source, numel, codec, plan.site.decoder(source))]
            plan.detail = _frame_bound(codec, numel, plan.dtype, None)
        return plan

    def ask_hints(self, engine: Engine, call: Call, plan: CallPlan) -> None:
        super().ask_hints(engine, call, plan)
        for part in plan.incoming:
            if part.codec is not None:
                plan.detail = _frame_bound(part.codec, part.numel, plan.dtype, part.hint)

    def frame_nbytes(self, flight: Flight) -> int:
        """Bytes of the buffer that the receive is posted with."""
        return int(flight.plan.detail)

    def transfer(self, engine: Engine, flight: Flight) -> None:
        nbytes, device = self.frame_nbytes(flight), flight.plan.signature[2]
        frame = torch.empty(nbytes, dtype=torch.uint8, device=device)
        flight.arrived = flight.keep = (frame,)
        flight.work = engine.link.receive(frame, flight.plan.incoming[0].peer, flight.tag)

    def taken(self, engine: Engine, flight: Flight, part: Incoming) -> None:
        plan, decoder = flight.plan, part.stream
        assert decoder is not None
        assert part.codec is not None
        header = decoder.header
        assert header is not None
        if header.flags & STATELESS:
            return
        if header.is_keyframe:
            # a receiver cannot refuse: it follows the sender, even beyond its cap
            what = (part.numel, plan.dtype)
            engine.store.reserve(plan.site, part.peer, what, decoder.state_bytes, force=True)
        raw, wire = part.numel * plan.dtype.itemsize, header.nbytes + header.payload_nbytes
        engine.stats.received(flight.call.site, flight.call.op, part.codec.codec_id, raw=raw, wire=wire)


class ReceiveExactly(Receive):
    """A receive whose size must equal the sent one (NCCL): the frame's kind and size follow from what both know."""

    waits_for_earlier_calls = True

    def frame_nbytes(self, flight: Flight) -> int:
        return flight.plan.incoming[0].expected_nbytes(flight.call.warm)


def _frame_bound(codec: Codec, numel: int, dtype: torch.dtype, hint: MatrixView | None) -> int:
    """The most bytes a frame of this message can have: a keyframe's, or a residual's with room for more scales.

    A matrix view found later may need more scales than the views known here: ``numel // 8 + 64`` bytes are set aside.
    """
    shapes = [blocks(numel).shape] + ([hint.shape] if hint is not None else [])
    coded = max(codec.payload_nbytes(shape, torch.float32) for shape in shapes)
    return HEADER_NBYTES + max(raw_nbytes(numel, dtype), coded + numel // 8 + 64)


def receive_any(engine: Engine, call_from: Callable[[int], Call], x: Tensor, tag: int) -> Job:
    """Receive from whichever rank sends first (CPU only).

    Args:
        engine: engine of the group.
        call_from: makes the call from the sender's group rank, which is known once the message has arrived.
        x: output tensor.
        tag: tag of the message.

    Returns:
        The job that waits, decodes and writes ``x``.
    """
    numel, dtype = x.numel(), x.dtype
    frame = torch.empty(HEADER_NBYTES + raw_nbytes(numel, dtype) + numel + 4096, dtype=torch.uint8, device=x.device)
    work = engine.link.receive_any(frame, tag)

    def finish(may_write: bool) -> None:
        source = int(work._source_rank())
        if frame_in(frame) is None:  # the sender let the message pass through
            engine.stats.passed("recv", PassReason.PEER, 0)
            if may_write:
                with _torch.without_autograd():
                    x.copy_(from_raw(frame, numel, dtype).view(x.shape))
            return
        call = call_from(source)
        drain(engine.store.site(call.site))
        plan = engine.plan(RECEIVE, call, (numel, dtype, x.device, source, engine.rank))
        if not plan.incoming:  # this rank would let the message pass through, but the sender compressed it
            codec, site = engine.chooser.codec, plan.site
            plan = replace(plan, incoming=[Incoming(source, numel, codec, site.decoder(source))])
        with plan.site.lock:
            engine.finish(Flight(plan, call, (), (x,), None, arrived=(frame,)), may_write)

    return Job(work, finish, None, (frame,))


SEND, RECEIVE, RECEIVE_EXACTLY = Send(), Receive(), ReceiveExactly()
