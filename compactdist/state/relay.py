"""Forward once: a frame that arrived on one stream goes on in another as it is, under a new header.

That is right if and only if two things hold: before the frame, the two streams' receivers held the same state; and the
tensor to be sent is what the frame was decoded to. The first is an invariant that begins where both states are seen to
be equal (:func:`same_state`) and lasts as long as every frame of the one stream is passed on in the other. The second
is proved for each tensor (:func:`is_untouched`).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compactdist.codecs.base import Codec
from compactdist.kernels.spec import MatrixView
from compactdist.state.device_keyframes import remembered
from compactdist.state.matrix_view import plain
from compactdist.state.staged import Staged
from compactdist.wire import RESTART, Header, pack, raw_payload, seal, unpack_head

if TYPE_CHECKING:
    from compactdist.state.decoder import StreamDecoder
    from compactdist.state.encoder import StreamEncoder

__all__ = [
    "Received",
    "Relay",
    "announce",
    "can_announce",
    "digest_of",
    "is_untouched",
    "join",
    "leave",
    "pass_on",
    "same_state",
    "stop_sharing",
]


@dataclass(slots=True)
class Received:
    """The last frame of an incoming stream.

    Attributes:
        decoder: decoder of the stream, which has applied the frame.
        sequence: ``decoder.sequence`` after the frame; once they differ, the frame can no longer be passed on.
        header: header of the frame. Where only a device looked at it, its announcements and the predictor's coefficient
            mean nothing: :meth:`whole_header` reads them.
        checksum: of its payload; ``None``: only a device looked at the frame.
        payload: of a coded keyframe, or of a residual where an outgoing stream relays this one: 1-D uint8.
        digest: of the decoded tensor's bytes; kept only where the payload might be and the decoder's history does not
            hold those bytes.
        head: bytes of the header that only a device looked at, of a frame that may be passed on.
    """

    decoder: StreamDecoder
    sequence: int
    header: Header
    checksum: int | None
    payload: Tensor | None = None
    digest: bytes | None = None
    head: Tensor | None = None

    def whole_header(self) -> Header:
        """The header as it arrived; waits for the device if only that has looked at it, and found it right."""
        return self.header if self.head is None else unpack_head(self.head, self.decoder.where)


@dataclass(slots=True)
class Relay:
    """Relation of an outgoing stream to the incoming one whose frames it passes on.

    Attributes:
        source: the incoming stream; ``None`` while this one encodes by itself.
        passed: sequence of ``source`` after the last frame that was passed on.
        shared: the encoder shares the decoder's predictor and has none of its own; encoding again takes a keyframe.
        owes_keyframe: the encoder gave up its history; the next frame must be a keyframe.
        streak: residuals encoded in a row although they could have been passed on after a keyframe.
        patience: the streak that is worth a keyframe. It doubles each time the stream encodes by itself again, so that
            a call site that alternates pays for few keyframes.
    """

    source: StreamDecoder | None = None
    passed: int = 0
    shared: bool = False
    owes_keyframe: bool = False
    streak: int = 0
    patience: int = 1

    def expects(self, received: Received) -> bool:
        """Whether this is the frame that follows the last one passed on, of the same stream."""
        return self.source is received.decoder and self.passed + 1 == received.sequence


def _copy(x: Tensor) -> Tensor:
    return x.detach().reshape(-1).clone(memory_format=torch.contiguous_format)


_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def _words(x: Tensor) -> Tensor:
    """The bytes of a tensor as integers of its elements' size, which compare faster than bytes: flat, contiguous."""
    flat = x.detach().reshape(-1)
    if flat.stride(0) != 1:  # contiguous() leaves the strides of tensors with at most one element as they are
        flat = _copy(flat)
    return flat.view(_WORDS[flat.element_size()])


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same bytes, in order; -0 is not 0 here."""
    return a.dtype == b.dtype and torch.equal(_words(a), _words(b))


def digest_of(x: Tensor) -> bytes:
    """128 bits that two tensors with different bytes do not share (CPU)."""
    return hashlib.blake2b(_words(x).numpy().data, digest_size=16).digest()


def is_untouched(received: Received, x: Tensor) -> bool:
    """Whether a CPU tensor has the bytes the frame was decoded to.

    The comparison is with the decoder's history where that holds the bytes, else with the digest taken on arrival.
    """
    if received.decoder.config.remembers_values:
        base = received.decoder.predictor.base
        return base is not None and _equal(x, base)
    return received.digest is not None and received.digest == digest_of(x)


def same_state(encoder: StreamEncoder, decoder: StreamDecoder, *, compare: bool = True) -> bool:
    """Whether the receiver of the outgoing stream holds the same as the decoder of the incoming one: the same history,
    and the same that its codec remembers.

    Args:
        encoder: of the outgoing stream, with a history of its own.
        decoder: of the incoming stream.
        compare: compare the bytes; ``False``: only size, dtype, matrix view and number of tensors, which the host knows
            without waiting for a device. Codecs must remember nothing then.
    """
    theirs_now = decoder.live, decoder.view, decoder.rate
    if encoder.live is None or (encoder.live, encoder.view, encoder.rate) != theirs_now:
        return False
    ours, theirs = encoder.predictor.held, decoder.predictor.held
    if not compare:
        return len(ours) == len(theirs) and not encoder.codec_memory and not decoder.codec_memory
    ours, theirs = (*ours, *encoder.codec_memory), (*theirs, *decoder.codec_memory)
    return len(ours) == len(theirs) and all(map(_equal, ours, theirs))


def pass_on(
    encoder: StreamEncoder,
    received: Received,
    x: Tensor,
    codec: Codec,
    step: int,
    epoch: int,
    hint: MatrixView | None = None,
) -> Staged:
    """Make the outgoing stream's frame of the payload that arrived on another stream.

    Args:
        encoder: of the outgoing stream; it must commit the result.
        received: the frame that arrived; all but a keyframe of the tensor's own bytes need its ``payload``.
        x: the tensor that the frame was decoded to.
        codec: codec of the outgoing stream.
        step: of the call, since the last reset.
        epoch: resets of the group so far.
        hint: matrix view that a layout hint gives the outgoing stream when it starts.
    """
    arrived = received.whole_header()
    checksum = arrived.checksum if received.checksum is None else received.checksum
    header = replace(
        arrived,
        stream=encoder.fingerprint,
        step=step,
        epoch=epoch,
        sequence=encoder.sequence,
        codec=codec.fingerprint(),
        checksum=checksum,
        digest=0 if arrived.is_keyframe else encoder.known_digest(),
    )
    payload = raw_payload(x) if header.is_raw_keyframe else received.payload
    assert payload is not None
    value = exact = session = None
    config, shared = encoder.config, encoder.relay is not None and encoder.relay.shared
    if config.remembers and not shared:
        value = _copy(x)
        if header.is_raw_keyframe:
            value = remembered(value, header.flags)
        exact = _copy(x) if config.open_loop else None
    # under another codec than before both ends begin a session anew, also where that one remembers nothing
    form = None if shared or header.is_keyframe else encoder.form(codec, x.device)
    if form is not None and received.decoder.codec_memory:
        session = form.session
        session.rollback()  # of what a frame before would have changed
        session.learn(payload, () if header.flags & RESTART else encoder.predictor.terms(header.coefficient))
    frame, view = pack(header, payload), announced(header)
    return Staged(frame, header, checksum, value, (), exact, hint, view, session=session)


def join(encoder: StreamEncoder, decoder: StreamDecoder, *, share: bool) -> Relay:
    """Let an outgoing stream pass on the next frame of an incoming stream with the same state.

    Args:
        encoder: of the outgoing stream.
        decoder: of the incoming one.
        share: use the decoder's predictor from now on and give up the encoder's own.
    """
    relay = encoder.relay = encoder.relay or Relay()
    if share and not relay.shared:
        live, view, rate, digest = encoder.live, encoder.view, encoder.rate, encoder.known_digest()
        encoder.drop()  # also frees what only encoding needs, such as the codec's memory
        encoder.live, encoder.view, encoder.rate = live, view, rate
        encoder.digest, encoder.predictor = digest, decoder.predictor
    relay.source, relay.passed, relay.shared, relay.owes_keyframe = decoder, decoder.sequence, share, False
    return relay


def leave(encoder: StreamEncoder, relay: Relay) -> None:
    """Let a stream encode by itself again; if it shared a predictor, from a keyframe on."""
    if relay.shared:
        stop_sharing(encoder, relay)
        relay.owes_keyframe = True
        relay.patience *= 2
    relay.source, relay.streak = None, 0


def stop_sharing(encoder: StreamEncoder, relay: Relay) -> None:
    """Give an encoder an empty history of its own, if it has none."""
    if relay.shared:
        relay.shared = False
        encoder.predictor = encoder.config.new_predictor()


def announced(header: Header) -> MatrixView | None:
    """The matrix view that a frame announces; ``None`` if it announces none."""
    return plain(header.numel, header.next_groups, header.next_channels) if header.next_channels else None


def can_announce(view: MatrixView | None) -> bool:
    """Whether a header can announce the matrix view: consecutive rows without padding, no hint."""
    return (
        view is not None
        and not view.hint
        and view.axes is None
        and view.groups * view.rows * view.channels == view.numel
    )


def announce(staged: Staged, view: MatrixView) -> None:
    """Let a keyframe announce a matrix view for the frames after it."""
    staged.header = replace(staged.header, next_groups=view.groups, next_channels=view.channels)
    staged.next_view = view
    seal(staged.frame, staged.header)
