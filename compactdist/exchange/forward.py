"""Encode a tensor, or pass on the frame it was decoded from: the decision, once for every message that is sent.

Passing on adds no error, so a chunk is the same on every rank it has visited. Where the receiver follows the frame
(point-to-point on the CPU) the outgoing stream shares the history of the incoming one, and a switch from one way to the
other is a keyframe. Where sizes are agreed beforehand (collectives, other devices) the sender keeps a history of its
own, which equals the receiver's whether it encodes or passes on: it may encode again at any time, and begins to pass on
where a keyframe is due anyway.
"""

from __future__ import annotations

from torch import Tensor

from compactdist.codecs import Codec
from compactdist.errors import NonFiniteError
from compactdist.exchange.arrivals import Arrival
from compactdist.exchange.context import Call, Context
from compactdist.state import MatrixView, Staged, StreamEncoder
from compactdist.state.relay import (
    Relay,
    announce,
    announced,
    can_announce,
    is_untouched,
    join,
    leave,
    pass_on,
    remembers_values,
    same_state,
)
from compactdist.wire import NO_STATE, NONFINITE

__all__ = ["Message"]


class Message:
    """A tensor on its way to one receiver: decide, :meth:`stage`, and :meth:`commit` once it is on its way.

    Args:
        ctx: the group, its lock held.
        call: the call.
        encoder: of the stream.
        x: the tensor.
        codec: for residuals.
        due: whether the receiver expects a keyframe.
        arrival: what may be passed on, held; ``None`` for nothing.
        follows: whether the receiver takes a keyframe it does not expect.

    Attributes:
        keyframe: what the frame will be, unless it is passed on.
        passes: the frame that arrived is passed on.
        forwarded: after ``commit``: the receiver gets, to the bit, what was received here.
    """

    def __init__(
        self,
        ctx: Context,
        call: Call,
        encoder: StreamEncoder,
        x: Tensor,
        codec: Codec,
        *,
        due: bool,
        arrival: Arrival | None = None,
        follows: bool = False,
    ) -> None:
        self._ctx, self._call, self._encoder, self._x, self._codec = ctx, call, encoder, x, codec
        order = ctx.config.order
        # a lossless codec without history has nothing to encode, and nothing to pass on
        self._arrival = None if codec.lossless and order == 0 else arrival
        self._share = follows and order == 1
        self._announce: MatrixView | None = None
        self.keyframe = due
        self.forwarded = False
        self.passes = False
        relay = encoder.relay
        if relay is not None and relay.source is not None:
            self.passes = self._may_pass(relay, due, follows) and self._is_untouched()
            if self.passes:
                return
            leave(encoder, relay)
        if relay is not None and relay.owes_key:
            self.keyframe = True
        if not self.keyframe and self._share and self._arrival is not None:
            self._switch_if_worth_it(self._arrival)

    def _is_untouched(self) -> bool:
        if self._ctx.arrivals.trusted:
            return True
        assert self._arrival is not None
        return self._x.device.type == "cpu" and is_untouched(self._arrival.received, self._x)

    def _may_pass(self, relay: Relay, due: bool, follows: bool) -> bool:
        """Whether this stream's receiver can take the frame: the next one for it, of a kind it can tell, as it cuts."""
        if self._arrival is None or not relay.expects(self._arrival.received):
            return False
        received, encoder = self._arrival.received, self._encoder
        header = received.header
        if not encoder.live == received.decoder.live == (self._x.numel(), self._x.dtype):
            return False
        if header.is_key != due and not (follows and header.is_key):
            return False
        kept = received.payload is not None and header.codec == self._codec.fingerprint()
        view = announced(header) or encoder.view
        return (header.is_key or kept) and view == received.decoder.view

    def _switch_if_worth_it(self, arrival: Arrival) -> None:
        """Make a keyframe of a residual, so that the frames after it can be passed on."""
        theirs = arrival.received.decoder.view
        fits = theirs == self._encoder.view
        relay = self._encoder.relay = self._encoder.relay or Relay()
        if not self._is_untouched() or not (fits or can_announce(theirs)):
            relay.streak = 0
            return
        relay.streak += 1
        if relay.streak >= relay.patience:
            self.keyframe = True
            self._announce = None if fits else theirs

    def stage(
        self, peer: int, hint: MatrixView | None, *, refuse_state: bool = False
    ) -> tuple[Staged, NonFiniteError | None]:
        """The frame, and the error to raise once it is on its way; see ``StreamEncoder.stage_or_flag``."""
        ctx, call, encoder, x, codec = self._ctx, self._call, self._encoder, self._x, self._codec
        if self.passes:
            assert self._arrival is not None
            if ctx.tap is not None:
                ctx.tap(call, peer, x, hint)
            return pass_on(encoder, self._arrival.received, x, codec, call.key.epoch), None
        staged, failure = ctx.stage(
            encoder,
            call,
            peer,
            x,
            codec,
            keyframe=self.keyframe,
            hint=hint,
            frame_nbytes=encoder.frame_nbytes(codec, x.numel(), x.dtype, keyframe=self.keyframe),
            refuse_state=refuse_state,
        )
        if self._announce is not None and not staged.header.flags & NONFINITE:
            announce(staged, self._announce)
        return staged, failure

    def commit(self, staged: Staged, hint: MatrixView | None) -> None:
        """Make the state change, and stand on the incoming stream from now on if both hold the same."""
        encoder, arrival = self._encoder, self._arrival
        encoder.commit(staged, hint)
        if arrival is None:
            return
        if self.passes:
            assert encoder.relay is not None
            encoder.relay.passed = arrival.received.sequence
            self.forwarded = True
            return
        order = self._ctx.config.order
        if staged.header.flags & (NONFINITE | NO_STATE) or not (staged.header.is_key or order == 0):
            return
        compare = self._x.device.type == "cpu"
        decoder = arrival.received.decoder
        # without a look at the bytes: a keyframe sets the last value, but only the first one the velocity
        if not compare and order > 1 and (encoder.sequence, decoder.sequence) != (1, 1):
            return
        if same_state(encoder, decoder, compare=compare):
            join(encoder, decoder, share=self._share)
            self._ctx.arrivals.relayed(arrival)
            self.forwarded = staged.header.is_key and remembers_values(self._ctx.config)
