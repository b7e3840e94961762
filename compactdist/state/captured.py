"""Frames that a CUDA graph captures: each replay makes or checks the stream's next frame, by the clock on its device.

The host moves nothing when a frame is captured, for nothing runs. It counts replays later (:func:`catch_up`). Whatever
the frame needs only while it is made comes from the graph's own memory; the history, the clock, and what kernels were
told of the stream lie outside of it. A clock that has ended makes no frame: what it seals no receiver takes, nothing is
remembered, and outputs hold NaN.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compactdist.codecs.base import Codec, Terms
from compactdist.kernels import DeviceSteps, Frames
from compactdist.kernels.spec import FROM_CLOCK
from compactdist.state.announcements import expect_coefficient, say_coefficient
from compactdist.state.device_clock import DeviceClock
from compactdist.state.staged import Staged
from compactdist.wire import HEADER_NBYTES

if TYPE_CHECKING:
    from compactdist.state.decoder import StreamDecoder
    from compactdist.state.encoder import StreamEncoder
    from compactdist.state.history import Predictor
    from compactdist.state.stream import Form, StreamState
    from compactdist.state.stream_config import StreamConfig

__all__ = ["capture_check", "capture_seal", "catch_up", "not_captured", "unsuited"]

_BY_CLOCK = 0, 0, 0, FROM_CLOCK, 0
"""Step, epoch, sequence, source and digest as a captured launch is told them: the same in every replay."""


def unsuited(config: StreamConfig) -> str:
    """Why no frame of streams with this configuration can be captured; empty if some can."""
    if config.open_loop:
        return "with error_feedback=False the host makes every frame; leave error feedback on"
    return ""


def not_captured(stream: StreamState, codec: Codec) -> str:
    """Why the stream's next frame, a residual, cannot be captured; empty if it can."""
    if codec.rates:
        return f"codec {codec.codec_id!r} has several rates, which frames announce; take a codec of one rate"
    form, clock = stream.known_form, stream.clock
    if form is None or form.codec != codec or clock is None or not clock.right or form.frames is None:
        return "its last frame was not a residual that the device made; make the call uncaptured once more"
    steps = form.session.device_steps
    if form.session.remembers or steps is None or not form.frames.repeats(steps):
        return (
            f"codec {codec.codec_id!r} keeps a memory between two frames; take a scalar quantizer, not of token_history"
        )
    return ""


def _parts(stream: StreamState) -> tuple[Form, Frames, DeviceSteps, DeviceClock]:
    """What a frame of a stream is made or checked with, for which :func:`not_captured` is empty."""
    form, clock = stream.known_form, stream.clock
    assert form is not None
    assert clock is not None
    frames, steps = form.frames, form.session.device_steps
    assert frames is not None
    assert steps is not None
    if not clock.captured:
        clock.captured = True
        clock.kept.clear()  # graphs that have ended make room for this one
    stream.predictor.stay()
    return form, frames, steps, clock


def capture_seal(
    encoder: StreamEncoder, x: Tensor, frame_nbytes: int, queue: int, copy: Tensor | None, *, want_value: bool
) -> Staged:
    """Let the graph that is being captured make the frame of ``x``, and remember what its receivers will.

    Args:
        encoder: the stream; :func:`not_captured` is empty for it.
        x: any shape, the stream's numel and dtype.
        frame_nbytes: agreed frame size, padded with zeros.
        queue: ``kernels.queue_of`` the device.
        copy: as ``Wanted.copy``.
        want_value: fill ``Staged.value`` even where the stream keeps no history.
    """
    form, frames, steps, clock = _parts(encoder)
    head, nbytes = form.head, form.frame_nbytes
    flat, predictor = x.detach().reshape(-1), encoder.predictor
    coefficient = say_coefficient(frames, flat, predictor, form.codec, queue) if predictor.adapts else 0.0
    terms = encoder.terms_for(form.session, coefficient)
    frame = torch.empty(frame_nbytes, dtype=torch.uint8, device=x.device)
    if frame_nbytes > nbytes:
        frame[nbytes:].zero_()
    value = None
    if want_value or encoder.config.remembers:
        value = torch.empty(flat.numel(), dtype=flat.dtype, device=x.device)
    payload = frame[HEADER_NBYTES:nbytes]
    copies = copy is not None and value is not None
    if not frames.has_sent(steps, terms, value is not None, copies) and value is not None:
        # nothing can be compiled during a capture: the value is written twice if the calls before did that, else once
        copy, copies = torch.empty_like(value) if copy is None else None, False
    made = frames.send(steps, flat, terms, value, copy, frame, payload, clock.words, _BY_CLOCK, queue)
    assert made, "the steps take what their stream holds"
    goes_on = clock.goes_on()
    if terms and value is not None:
        _remember(predictor, value, terms, goes_on)
    return Staged(frame, head.header, 0, value, on_device=True, copied=copies, goes_on=goes_on)


def _remember(predictor: Predictor, value: Tensor, terms: Terms, goes_on: Tensor) -> None:
    """Let the graph write to a history what it will hold after a frame of this value, if ``goes_on``, bool ``[]``."""
    for kept, now in zip(predictor.held, predictor.following(value, terms), strict=True):
        torch.where(goes_on, now, kept, out=kept)


def capture_check(decoder: StreamDecoder, frame: Tensor, into: Tensor | None, queue: int) -> None:
    """Let the graph that is being captured check a frame, and decode it into the history and to ``into``.

    Args:
        decoder: the stream; :func:`not_captured` is empty for it.
        frame: 1-D uint8, aligned to 16 bytes; bytes behind the end of the frame are ignored.
        into: the stream's numel and dtype; gets NaN where the frame is not the expected one, or holds no values.
        queue: ``kernels.queue_of`` the device.
    """
    form, frames, steps, clock = _parts(decoder)
    nbytes = form.frame_nbytes
    assert decoder.live is not None
    (numel, dtype), predictor = decoder.live, decoder.predictor
    coefficient = expect_coefficient(frames, frame, predictor, queue) if predictor.adapts else 0.0
    terms = decoder.terms_for(form.session, coefficient)
    value = predictor.spare(terms) if decoder.config.state == "exact" else None
    in_place = value is not None
    if value is None:
        value = torch.empty(numel, dtype=dtype, device=frame.device)
    direct = into if into is not None and into.is_contiguous() else None
    made = frames.receive(steps, frame, nbytes, terms, value, direct, clock.words, _BY_CLOCK, queue)
    assert made, "frames that a device has checked are aligned"
    if terms and not in_place:
        _remember(predictor, value, terms, clock.goes_on() & (frames.accepted[0] != 0))
    if into is not None and direct is None:
        into.copy_(torch.where(frames.holds_values, value, math.nan).view(into.shape))


def catch_up(stream: StreamState) -> int:
    """Count the frames that graphs have made or checked since the host looked last; the device must be done with them.

    Returns:
        How many there were.
    """
    clock = stream.clock
    if clock is None or not (clock.captured and clock.right):
        return 0
    sequence, source = clock.turn()
    replayed = (sequence - stream.sequence) & 0xFFFFFFFF
    if replayed:
        stream.sequence += replayed
        clock.source = source
    return replayed
