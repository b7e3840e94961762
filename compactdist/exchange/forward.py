"""Encode a tensor, or pass on the frame it was decoded from: decided here for every message of a pattern that forwards.

Passing on adds no error, so a chunk is the same on every rank it has visited. Where the receiver follows the frame
(point-to-point on the CPU) the outgoing stream shares the predictor of the incoming one, and every switch between
encoding and passing on takes a keyframe. Where sizes are agreed beforehand (collectives, other devices) the sender
keeps a history of its own, which equals the receiver's whether it encodes or passes on: it may encode again at any
time, and begins to pass on where a keyframe is expected anyway.

Passing on begins with a keyframe after which the receivers of both streams hold the same history. A coded keyframe that
arrived is passed on itself, since coding its values again would change them. Where the receiver follows the frame, a
keyframe of the tensor's own bytes begins it as well.
"""

from __future__ import annotations

from torch import Tensor

from compactdist.codecs import Codec
from compactdist.exchange.arrivals import Arrival, Arrivals
from compactdist.kernels.spec import MatrixView
from compactdist.state import Staged, StreamEncoder
from compactdist.state.relay import (
    Relay,
    announce,
    announced,
    can_announce,
    is_untouched,
    join,
    leave,
    pass_on,
    same_state,
)
from compactdist.wire import NO_STATE, NONFINITE

__all__ = ["Message"]


class Message:
    """A tensor on its way to one receiver, and the decision what its frame will be.

    Args:
        arrivals: arrivals of the group.
        encoder: encoder of the outgoing stream.
        x: the tensor.
        codec: codes a residual.
        keyframe_expected: whether the receiver expects a keyframe.
        arrival: the arrival that may be passed on, held; ``None`` for none.
        accepts_unannounced_keyframe: whether the receiver takes a keyframe it does not expect, and one of the tensor's
            own bytes where it expects a coded one.
        may_surprise: whether a keyframe that arrived, and that nobody was told of, may be passed on as such.
        may_begin: whether a keyframe that arrived may start this stream.
        hint: matrix view of the stream's layout hint.

    Attributes:
        forwards: whether the frame that arrived is passed on.
        begins: whether that frame is a keyframe, and the first that this stream passes on.
        keyframe: whether the frame will be a keyframe.
        own_bytes: whether a keyframe has to carry the tensor's own bytes, although the stream codes its keyframes.
        forwarded: after ``commit``: whether the receiver gets, to the bit, the tensor that was received here.
    """

    __slots__ = (
        "_announce",
        "_arrival",
        "_arrivals",
        "_codec",
        "_encoder",
        "_hint",
        "_share",
        "_x",
        "begins",
        "forwarded",
        "forwards",
        "keyframe",
        "own_bytes",
    )

    def __init__(
        self,
        arrivals: Arrivals,
        encoder: StreamEncoder,
        x: Tensor,
        codec: Codec,
        *,
        keyframe_expected: bool,
        arrival: Arrival | None = None,
        accepts_unannounced_keyframe: bool = False,
        may_surprise: bool = False,
        may_begin: bool = True,
        hint: MatrixView | None = None,
    ) -> None:
        self._arrivals, self._encoder, self._x, self._codec, self._hint = arrivals, encoder, x, codec, hint
        config = encoder.config
        # a lossless codec without history makes every frame from the tensor alone: passing on would save nothing
        self._arrival = None if codec.lossless and not config.remembers else arrival
        self._share = accepts_unannounced_keyframe and config.predictor.can_share
        self._announce: MatrixView | None = None
        self.keyframe = keyframe_expected
        self.forwarded = self.forwards = self.begins = self.own_bytes = False
        relay = encoder.relay
        if relay is not None and relay.source is not None:
            may = self._may_forward(relay, keyframe_expected, accepts_unannounced_keyframe or may_surprise)
            self.forwards = may and self._is_untouched()
            if self.forwards:
                return
            leave(encoder, relay)
        if relay is not None and relay.owes_keyframe:
            self.keyframe = True
        if self._arrival is None:
            return
        if self.keyframe:
            self._begin(self._arrival, may_begin)
        elif self._share:
            self._switch_if_worth_it(self._arrival)

    def _begin(self, arrival: Arrival, may_begin: bool) -> None:
        """Decide whether a coded keyframe is the one that arrived, or carries the tensor's own bytes instead."""
        received, encoder = arrival.received, self._encoder
        header, theirs = received.header, received.decoder
        numel, dtype = self._x.numel(), self._x.dtype
        coded = encoder.config.keyframe_for(self._codec, numel, dtype)
        if coded is None:
            return
        view = encoder.keyframe_view(coded, numel, dtype, self._hint)
        same = may_begin and header.is_keyframe and header.keyframe_codec == coded.fingerprint()
        same = same and (header.groups, header.rows, header.channels, header.layout) == (*view.shape, view.hint)
        if same and received.payload is not None and self._is_untouched():
            self.forwards = self.begins = True
        elif self._share and (encoder.live, encoder.view) == (theirs.live, theirs.view):
            self.own_bytes = self._is_untouched()

    def _is_untouched(self) -> bool:
        assert self._arrival is not None
        if self._arrivals.trusted:
            decoder = self._arrival.received.decoder
            # what a device refused, or found not to be finite, is coded anew
            return decoder.holds_values is None or bool(decoder.holds_values)
        return self._x.device.type == "cpu" and is_untouched(self._arrival.received, self._x)

    def _may_forward(self, relay: Relay, keyframe_expected: bool, accepts_unannounced_keyframe: bool) -> bool:
        """Whether the arrival is the relayed stream's next frame, of the kind and matrix view the receiver expects."""
        if self._arrival is None or not relay.expects(self._arrival.received):
            return False
        received, encoder = self._arrival.received, self._encoder
        header = received.header
        if not encoder.live == received.decoder.live == (self._x.numel(), self._x.dtype):
            return False
        if header.is_keyframe != keyframe_expected and not (accepts_unannounced_keyframe and header.is_keyframe):
            return False
        kept = received.payload is not None and header.codec == self._codec.fingerprint()
        view = announced(header) or encoder.view
        return (header.is_raw_keyframe or kept) and view == received.decoder.view

    def _switch_if_worth_it(self, arrival: Arrival) -> None:
        """Send a keyframe in place of a residual where that pays, so that the frames after it can be passed on."""
        theirs = arrival.received.decoder.view
        fits = theirs == self._encoder.view
        relay = self._encoder.relay = self._encoder.relay or Relay()
        # a keyframe gives our receivers the history of that stream, but not what its codec remembers
        remembers = bool(arrival.received.decoder.codec_memory)
        if remembers or not self._is_untouched() or not (fits or can_announce(theirs)):
            relay.streak = 0
            return
        relay.streak += 1
        if relay.streak >= relay.patience:
            self.keyframe = self.own_bytes = True
            self._announce = None if fits else theirs

    def pass_on(self, step: int, epoch: int) -> Staged:
        """The frame that arrived, for this stream."""
        assert self._arrival is not None
        return pass_on(self._encoder, self._arrival.received, self._x, self._codec, step, epoch, self._hint)

    def announce(self, staged: Staged) -> None:
        """Announce the incoming stream's matrix view in the staged keyframe, if that was decided."""
        if self._announce is not None and not staged.header.flags & NONFINITE:
            announce(staged, self._announce)

    def commit(self, staged: Staged) -> None:
        """Commit the frame; if the receivers of both streams now hold the same state, relay the incoming stream."""
        encoder, arrival = self._encoder, self._arrival
        encoder.commit(staged)
        if arrival is None:
            return
        self.forwarded = self.forwards
        if self.forwards and not self.begins:
            assert encoder.relay is not None
            encoder.relay.passed = arrival.received.sequence
            return
        config, header = encoder.config, staged.header
        if header.flags & (NONFINITE | NO_STATE) or not (header.is_keyframe or not config.remembers):
            return
        compare = self._x.device.type == "cpu"
        decoder = arrival.received.decoder
        # where bytes are not compared: any keyframe makes last values equal, but only the first makes velocities equal
        if not compare and config.predictor.copies > 1 and (encoder.sequence, decoder.sequence) != (1, 1):
            return
        if not compare and config.remembers and not (header.is_raw_keyframe or self.begins):
            return  # a keyframe that was coded once more
        if same_state(encoder, decoder, compare=compare):
            join(encoder, decoder, share=self._share)
            self._arrivals.relayed(arrival.stream)
            self.forwarded |= header.is_raw_keyframe and config.remembers_values
