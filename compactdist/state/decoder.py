"""The receiving end of a stream: check the frame, decode, and keep the reconstruction."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from compactdist import kernels
from compactdist.codecs.base import Codec, Session, Terms
from compactdist.errors import FrameError, NonFiniteError, PayloadError
from compactdist.kernels import Frames
from compactdist.kernels.spec import FROM_HOST, MatrixView
from compactdist.state.announcements import announced, expect_announcement, expect_coefficient
from compactdist.state.board import Board
from compactdist.state.device_keyframes import remembered
from compactdist.state.host_copy import HostCopy
from compactdist.state.matrix_view import blocks
from compactdist.state.remedies import RESET, SAME_CONFIG, SAME_ORDER, SAME_STEPS
from compactdist.state.stand_in import FrameFollows
from compactdist.state.stream import Changes, Form, StreamState
from compactdist.state.stream_config import COMPRESSIBLE_DTYPES, StreamConfig
from compactdist.state.unprepared import Unprepared
from compactdist.wire import (
    CHECKSUM_PLACE,
    CHECKSUM_WEIGHTED_SUM,
    HEADER_NBYTES,
    KEYFRAME,
    NO_STATE,
    NONFINITE,
    RESTART,
    STAND_IN,
    STATELESS,
    Header,
    HeadTemplate,
    bytes_at,
    coefficient_in,
    from_raw,
    payload_of,
    raw_nbytes,
    unpack,
)

__all__ = ["StreamDecoder"]

_FLAGGED = (
    ": what the sender's tensor changed by held NaN or Inf; no output was written, and both ends keep their history. "
    "Find the source of the NaN, or let the site pass through"
)

_FLAGGED_KEYFRAME = (
    ": the sender's tensor held NaN or Inf, which a coded keyframe cannot carry; no output was written, and both ends "
    "remember zero where it could not be coded. Find the source of the NaN, or let the site pass through"
)

_KINDS = KEYFRAME | STATELESS | RESTART
_FLAGS_OF_KINDS = {0: NONFINITE, KEYFRAME: NONFINITE | NO_STATE, STATELESS: 0, RESTART: 0, KEYFRAME | RESTART: 0}
"""The kinds of frames, and the other flags that each may have; any other combination is refused."""


class _Expected(NamedTuple):
    """What a frame is checked against; names as in :meth:`StreamDecoder.decode`."""

    codec: Codec
    numel: int
    dtype: torch.dtype
    step: int
    epoch: int
    hint: MatrixView | None


class StreamDecoder(StreamState):
    """Decoder of one directed stream inside a group. Callers switch gradients off.

    Attributes:
        refused: the last keyframe said that the sender keeps no history.
        header: of the last frame decoded; in that of a residual, ``step``, ``epoch``, ``sequence``, ``checksum`` and
            ``digest`` mean nothing.
        checksum: of the last frame's payload; ``None``: only the device knows it.
        holds_values: bool ``[1]`` on the device: whether the last frame was the expected one and held values; ``None``:
            the host made sure of it.
        wrote: the last ``decode`` wrote to its ``into``: the value, or NaN where a device found that the frame holds
            none.
        missed: a frame was refused that the size of the next one depends on: a first keyframe, or one that may have
            announced a rate or a matrix view.
    """

    lasting = (*StreamState.lasting, "_coefficient", "_looked", "_torn", "checksum", "header", "missed", "refused")

    __slots__ = (
        "_announced",
        "_coefficient",
        "_looked",
        "_torn",
        "checksum",
        "header",
        "holds_values",
        "missed",
        "refused",
        "wrote",
    )

    def __init__(
        self,
        config: StreamConfig,
        fingerprint: int,
        where: str,
        changes: Changes | None = None,
        board: Board | None = None,
        unprepared: Unprepared | None = None,
    ) -> None:
        super().__init__(config, fingerprint, where, changes, board, unprepared)
        self.refused = False
        self.checksum: int | None = 0
        self.header: Header | None = None
        self.holds_values: Tensor | None = None
        self._looked = not config.find_layout
        self._torn = False
        self._announced: HostCopy | None = None
        self._coefficient: Tensor | None = None
        self.missed = False
        self.wrote = False

    def decode(
        self,
        frame: Tensor,
        codec: Codec,
        numel: int,
        dtype: torch.dtype,
        *,
        step: int = 0,
        epoch: int = 0,
        hint: MatrixView | None = None,
        refuse_state: bool = False,
        header: Header | None = None,
        foreseen: bool = False,
        keyframe: bool = False,
        devices_take_keyframes: bool = False,
        into: Tensor | None = None,
        queue: int | None = None,
    ) -> Tensor:
        """Check a frame against what this stream expects, decode it and move the state on.

        Args:
            frame: 1-D uint8; bytes behind the end of the frame are ignored.
            codec: codes the sender's residuals.
            numel: elements that the frame must hold.
            dtype: of the elements.
            step: of the call, since the last reset.
            epoch: resets of the group so far.
            hint: matrix view that a layout hint gives the stream when it starts.
            refuse_state: this end keeps no history for the site.
            header: of the frame, if the caller has read it.
            foreseen: kind and size of the frame are agreed, so a GPU may check it; :attr:`holds_values` is its result.
            keyframe: the foreseen frame is a keyframe.
            devices_take_keyframes: a device may check keyframes, because no sender can lack room for a history.
            into: place for the value, ``numel`` x ``dtype`` and contiguous; :attr:`wrote` says if it was written to.
            queue: ``kernels.queue_of`` the frame's device, where the caller has asked.

        Returns:
            Flat ``[numel]`` tensor of ``dtype``; it may share memory with ``frame`` or the history: copy it out.

        Raises:
            FrameError, FrameFollows: the frame is not the expected one, or a stand-in for it; nothing was applied.
            NonFiniteError: the sender's tensor held NaN or Inf.
        """
        if self._announced is not None:
            self.read_announcement()
        self.holds_values, self.wrote, value, form = None, False, None, self._form
        if header is None:
            if keyframe or self.live != (numel, dtype) or self.keyframe_announced or form is None:
                expected = _Expected(codec, numel, dtype, step, epoch, hint)
                on_device = devices_take_keyframes and not refuse_state
                value = self._take_first(frame, expected, keyframe, foreseen, on_device, into, queue)
            elif form.codec is codec and form.frame_nbytes <= frame.numel():
                if form.frames is not None and foreseen and (self._looked or form.head.header.layout):
                    value = self._take_on_device(frame, form, form.frames, step, epoch, into, queue)
                if value is None:
                    value = self._take_expected(frame, form, step, epoch, into)
            if value is not None:
                return value
        header, payload = self._checked(frame, header, _Expected(codec, numel, dtype, step, epoch, hint))
        return self._taken(payload, header, codec, hint, refuse_state, into)

    def _checked(self, frame: Tensor, header: Header | None, expected: _Expected) -> tuple[Header, Tensor]:
        """Header and payload of a correct frame. A wrong one sets ``missed`` if sizes of later frames depend on it.

        Raises:
            FrameError: as ``_check``.
            FrameFollows: it is a stand-in for one.
        """
        try:
            header = header or unpack(frame, self.where)
            if header.flags & STAND_IN and header.shape is None and frame.is_cpu:
                raise FrameFollows(header)
            return header, self._check(frame, header, expected)
        except FrameError:
            codec, tells_view = (
                expected.codec,
                not (self._looked or expected.hint) and (header is None or header.next_groups > 0),
            )
            if (codec.rates or tells_view or self.is_fresh(expected.numel, expected.dtype)) and not codec.lossless:
                self.missed = True
                self._changes.count += 1
            raise

    def _take_first(
        self,
        frame: Tensor,
        expected: _Expected,
        keyframe: bool,
        foreseen: bool,
        devices_take_keyframes: bool,
        into: Tensor | None,
        queue: int | None,
    ) -> Tensor | None:
        """Let the device decode a keyframe, or a residual for which this end has no form yet.

        Returns:
            The value; ``None``: the host has to decode the frame.
        """
        if keyframe:
            return self._take_keyframe_on_device(frame, expected, into, queue) if devices_take_keyframes else None
        codec = expected.codec
        if not foreseen or self.clock is None or codec.lossless or self.is_fresh(expected.numel, expected.dtype):
            return None
        if not self._looked and (self.view is None or not self.view.hint):
            return None  # it may announce a matrix view
        form = self.form(codec, frame.device)
        if form.frames is None or form.frame_nbytes > frame.numel():
            return None
        return self._take_on_device(frame, form, form.frames, expected.step, expected.epoch, into, queue)

    def _taken(
        self,
        payload: Tensor,
        header: Header,
        codec: Codec,
        hint: MatrixView | None,
        refuse_state: bool,
        into: Tensor | None,
    ) -> Tensor:
        """The value of a frame that was checked; raises where it holds none."""
        value = self._take(payload, header, codec, hint, refuse_state, into)
        self.header, self.checksum = header, header.checksum
        if value is None:
            raise self._restarted()
        self.follow(header)
        if header.flags & NONFINITE and not header.is_raw_keyframe:
            raise NonFiniteError(self.where + (_FLAGGED_KEYFRAME if header.is_keyframe else _FLAGGED))
        return value

    def _take(
        self,
        payload: Tensor,
        header: Header,
        codec: Codec,
        hint: MatrixView | None,
        refuse_state: bool,
        into: Tensor | None,
    ) -> Tensor | None:
        """The value of a frame that was checked; ``None`` if its sender could not code it."""
        flags = header.flags
        if flags & STATELESS:
            self.sequence += 1
            return from_raw(payload, header.numel, header.dtype)
        if flags & KEYFRAME:
            return self._take_keyframe(payload, header, codec, hint, refuse_state, into)
        if flags & NONFINITE and not header.payload_nbytes:
            return None
        session = self.form(codec, payload.device).session
        restarts, target = bool(flags & RESTART), None if flags & NONFINITE else into
        value = self._take_residual(payload, header.checksum, session, restarts, header.coefficient, target)
        self._looked = True
        return value

    def predict(self, out: Tensor) -> None:
        """Write the prediction of the next tensor to ``out``, which has that tensor's size, dtype and device.

        The stream must be live. Where the sender chooses a coefficient for each frame, the last frame's is used, for
        the next frame's is not known yet.
        """
        predictor, coefficient = self.predictor, self._said_last() if self.predictor.adapts else 0.0
        there = out.is_cpu and self.clock is None
        terms = predictor.kept_terms(coefficient, rounded=True) if there else predictor.terms(coefficient)
        if out.is_contiguous():
            kernels.write_sum(terms, out.view(-1))
        else:
            made = torch.empty(out.shape, dtype=out.dtype, device=out.device)
            kernels.write_sum(terms, made.view(-1))
            out.copy_(made)

    def _said_last(self) -> float | Tensor:
        """The coefficient in the last frame; 0 where that was a keyframe, or said one that no longer holds."""
        header = self.header
        if header is None or header.is_keyframe:
            return 0.0
        if self.checksum is None and self._coefficient is not None:
            return self._coefficient  # of that frame's form, which is another one than the next frame's at a new rate
        return header.coefficient if self.predictor.accepts(header.coefficient) else 0.0

    def _restarted(self) -> NonFiniteError:
        """Forget the history, as the sender of a tensor that is not finite did."""
        self.sequence += 1
        self.drop()
        return NonFiniteError(
            f"{self.where}: the sender's tensor held NaN or Inf, which a coded frame cannot carry; no output was "
            "written and this stream restarts with a keyframe. Find the source of the NaN, or let the site pass through"
        )

    def _take_expected(self, frame: Tensor, form: Form, step: int, epoch: int, into: Tensor | None) -> Tensor | None:
        """The value of an expected residual that announces nothing: this end can make every byte of its header.

        ``None``: the frame is another one, or needs a closer look.
        """
        payload = frame[HEADER_NBYTES : form.frame_nbytes]
        if frame.stride(0) != 1 or payload.storage_offset() % 16:
            return None
        if self.clock is not None:
            self.known_digest()
        head = bytes_at(frame.data_ptr()).raw if frame.is_cpu else frame[:HEADER_NBYTES].cpu().numpy().tobytes()
        session = form.session
        checksum = int.from_bytes(head[CHECKSUM_PLACE], "little")
        said = self._said(head, form)
        if said is None or head != said.filled(step, epoch, self.sequence, checksum, self.digest):
            return None
        coefficient = said.header.coefficient
        if form.checksum(payload) != checksum:
            return None
        value = self._take_residual(payload, checksum, session, False, coefficient, into)
        self.header, self.checksum = said.header, checksum
        return value

    def _said(self, head: bytes, form: Form) -> HeadTemplate | None:
        """The expected header with the coefficient of ``head``; ``None``: the predictor accepts no such coefficient."""
        if not self.predictor.adapts:
            return form.head
        coefficient = coefficient_in(head)
        return form.head_for(coefficient) if self.predictor.accepts(coefficient) else None

    def _take_on_device(
        self,
        frame: Tensor,
        form: Form,
        frames: Frames,
        step: int,
        epoch: int,
        into: Tensor | None,
        queue: int | None,
    ) -> Tensor | None:
        """The value of a residual that the device checks and decodes; ``None``: the host has to."""
        steps, clock = form.session.device_steps, self.clock
        if steps is None or clock is None or self._torn:
            return None
        assert self.live is not None
        predictor = self.predictor
        if queue is None:
            queue = kernels.queue_of(frame.device)
        if queue != clock.queue:
            clock.follow(predictor, queue, form.session)
        numel, dtype = self.live
        if predictor.adapts:  # a coefficient that no frame may say now is not expected, so that the frame is refused
            self._coefficient = expect_coefficient(frames, frame, predictor, queue)
            terms = self.terms_for(form.session, self._coefficient)
        else:
            terms = predictor.terms() if self._plain else self.terms_for(form.session)
        room = terms[0] if self._plain and terms else predictor.spare(terms)
        if room is not None:
            value = room
        elif terms and isinstance(terms[0], Tensor):  # a frame that is refused leaves the prediction in its place
            value = terms[0].clone()
        elif terms:  # and what is kept in eight bits stays as it is
            value = torch.empty(numel, dtype=dtype, device=frame.device)
        else:
            value = torch.zeros(numel, dtype=dtype, device=frame.device)
        rates = form.codec.rates
        if rates:
            expect_announcement(frames, frame, rates)
        call = step, epoch, self.sequence, clock.source, self.digest
        if not frames.receive(steps, frame, form.frame_nbytes, terms, value, into, clock.words, call, queue):
            return None
        self.header, self.checksum = form.head.header, None
        self.holds_values, self.wrote = frames.holds_values, into is not None
        predictor.advance(value, terms, frames.accepted)
        if form.session.remembers:
            self._commit(form.session)
        self.sequence += 1
        clock.source, clock.right = 1 if clock.source == 0 else 0, True
        if rates:
            self._ask_announcement(frames)
        return value

    def _take_keyframe_on_device(
        self, frame: Tensor, expected: _Expected, into: Tensor | None, queue: int | None
    ) -> Tensor | None:
        """The value of a keyframe that the device checks and decodes; ``None``: the host has to."""
        codec, numel, dtype, step, epoch, hint = expected
        keyframes, clock = self._device_keyframes_of(codec, numel, dtype, frame.device, hint), self.clock
        steps = None if keyframes is None else keyframes.steps
        if keyframes is None or steps is None or clock is None or frame.numel() < keyframes.nbytes:
            return None
        self._end_graphs()
        queue = kernels.queue_of(frame.device) if queue is None else queue
        predictor = self.predictor
        if queue != clock.queue:
            clock.follow(predictor, queue)
        terms = predictor.terms() if self.live == (numel, dtype) else ()
        kept = predictor.spare(terms)
        if kept is None:  # a frame that is refused leaves what was remembered in its place
            kept = terms[0].clone() if terms else torch.zeros(numel, dtype=dtype, device=frame.device)
        copy = into
        if keyframes.own_bytes and into is None:  # what is remembered is not what is handed out
            copy = torch.empty_like(kept)
        if codec.rates:
            expect_announcement(keyframes.frames, frame, codec.rates)
        call = step, epoch, self.sequence, FROM_HOST, 0
        if not keyframes.frames.receive(steps, frame, keyframes.nbytes, (), kept, copy, clock.words, call, queue):
            return None
        self.header, self.checksum, self.refused = keyframes.head.header, None, False
        self.holds_values, self.wrote = keyframes.frames.holds_values, into is not None
        self.start(numel, dtype, hint)
        if self.config.remembers:
            predictor.advance(kept, ())
        self._torn, self.digest = False, 0
        self.sequence += 1
        clock.source, clock.right = 0, True
        if codec.rates:
            self._ask_announcement(keyframes.frames)
        return kept if copy is None else copy

    def _ask_announcement(self, frames: Frames) -> None:
        """Let the host know later what the frame announced that the device has checked."""
        self._announced = announced(frames)
        self._changes.unread.append(self)

    def read_announcement(self) -> bool:
        """Do what the last frame announced, which a device has checked.

        It waits for that device, which has had the time from one frame to the next.

        Returns:
            Whether that time was too short.
        """
        asked, self._announced = self._announced, None
        if asked is None:
            return False
        late = not asked.is_there
        accepted, rate, keyframe = asked.read()
        if not accepted:  # nobody knows how large the next frame is
            self.missed = True
            self._changes.count += 1
        else:
            self.obey(int(rate), bool(keyframe))
        return late

    def drop(self) -> None:
        """Forget the history: the next frame is a keyframe."""
        super().drop()
        self._torn = self.missed = False
        self._announced = None
        self._looked = not self.config.find_layout

    def _take_residual(
        self,
        payload: Tensor,
        checksum: int,
        session: Session,
        restarts: bool,
        coefficient: float,
        into: Tensor | None,
    ) -> Tensor:
        if self._torn:
            raise FrameError(
                f"{self.where}: an earlier frame was interrupted while it was decoded, so what this end holds is not "
                f"what the sender expects. Nothing was applied; {RESET}"
            )
        assert self.live is not None
        predictor, (numel, dtype) = self.predictor, self.live
        users, plain = into, self._plain
        terms = () if restarts else predictor.terms() if plain else self.terms_for(session, coefficient)
        if self._keeps_copies and into is not None:  # what is remembered is made from the user's tensor
            value, into = into.view(-1), None
        else:
            spare = terms[0] if plain and terms else predictor.spare(terms)
            value = torch.empty(numel, dtype=dtype, device=payload.device) if spare is None else spare
        self._torn = True
        try:
            self._decode(session, payload, terms, value, into)
        except FrameError:
            self._torn = False  # nothing was written
            raise
        self.wrote = users is not None
        if restarts:
            predictor.clear()
        predictor.advance(value, terms)
        self.moved_on(checksum)
        self._torn = False
        if session.remembers:
            self._commit(session)
        return value

    def _decode(self, session: Session, payload: Tensor, terms: Terms, value: Tensor, into: Tensor | None) -> None:
        """Decode a payload whose bytes are right to ``value`` and, where that is asked for, to ``into``."""
        try:
            if into is None:
                session.decode(payload, terms, value)
            else:
                session.decode_twice(payload, terms, value, into)
        except PayloadError as error:
            raise FrameError(f"{self.where}: {error}. Nothing was applied; {RESET}") from None

    def _take_keyframe(
        self,
        payload: Tensor,
        header: Header,
        codec: Codec,
        hint: MatrixView | None,
        refuse_state: bool,
        into: Tensor | None,
    ) -> Tensor | None:
        """The value of a keyframe, now the history; ``None`` if its sender could not code it."""
        numel, dtype = header.numel, header.dtype
        coded = None if header.is_raw_keyframe else self.config.keyframe_for(codec, numel, dtype)
        if coded is None:
            value = from_raw(payload, numel, dtype)
            kept = remembered(value, header.flags)
        elif header.flags & NONFINITE and not header.payload_nbytes:
            return None
        else:
            value = torch.empty(numel, dtype=dtype, device=payload.device)
            target = None if header.flags & NONFINITE else into
            view = self.keyframe_view(coded, numel, dtype, hint)
            self._decode(coded.open(view, dtype, payload.device), payload, (), value, target)
            self.wrote = target is not None
            kept = value
        self.refused = bool(header.flags & NO_STATE)
        forgets = NO_STATE | (NONFINITE if coded is None else 0)
        if header.flags & forgets or refuse_state:
            self.sequence += 1
            self.drop()
            return value
        self.start(numel, dtype, hint)
        if self.config.remembers:
            if header.flags & RESTART:
                self.predictor.clear()
            self.predictor.advance(kept, ())
        self._torn = False
        self.digest = 0
        self.moved_on(header.checksum)
        return value

    def _check(self, frame: Tensor, header: Header, expected: _Expected) -> Tensor:
        """The payload, 1-D uint8, once everything about the frame is known to be right; nothing has changed.

        The payload of a raw keyframe is copied while its checksum is computed; the copy may become the history. Where
        frame sizes are not agreed beforehand, a sender may send a raw keyframe in place of a coded one.

        Raises:
            FrameError: something is not right.
        """
        codec, numel, dtype, step, epoch, _ = expected
        ours = self.header_of(codec, numel, dtype)
        compare = partial(self._compare, header)
        compare("epoch", header.epoch, epoch)
        compare("stream", f"{header.stream:016x}", f"{self.fingerprint:016x}", SAME_ORDER)
        compare("part", f"{header.part + 1} of {header.parts}", f"{self.part + 1} of {self.parts}", SAME_CONFIG)
        compare("step", header.step, step, SAME_STEPS)
        size = f"{header.numel} x {header.dtype}", f"{numel} x {dtype}"
        compare("size", *size, "send and receive tensors of the same size and dtype; then " + RESET)
        if not codec.lossless and dtype not in COMPRESSIBLE_DTYPES:  # a stand-alone stream's dtype is what frames say
            compare("dtype", dtype, "float32, float16 or bfloat16, as this codec takes no other", SAME_CONFIG)
        keyframe_coding = 0 if header.is_raw_keyframe else ours.keyframe_codec
        if (header.codec, header.keyframe_codec) != (ours.codec, keyframe_coding):
            coding = f"{header.codec:08x}, keyframes {header.keyframe_codec:08x}"
            compare("codec", coding, f"{ours.codec:08x} ({codec!r}), keyframes {ours.keyframe_codec:08x}", SAME_CONFIG)
        predictor = header.predictor, header.coefficient, header.coefficient_2
        coefficient = ours.coefficient
        if self.predictor.adapts and not header.flags and self.predictor.accepts(header.coefficient):
            coefficient = header.coefficient
        compare("predictor", predictor, (ours.predictor, coefficient, ours.coefficient_2), SAME_CONFIG)
        compare("sequence", header.sequence, self.sequence)
        codes = not header.flags & (KEYFRAME | STATELESS) and bool(header.payload_nbytes)
        compare("rate", header.rate, self.rate_of(codec) if codes else 0, SAME_CONFIG)
        compare("kind of checksum", header.checksum_kind, CHECKSUM_WEIGHTED_SUM, SAME_CONFIG)
        view, nbytes = self._expected_payload(header, expected)
        shape = (0, 0, 0, 0) if view is None else (*view.shape, view.hint)
        compare("layout", (header.groups, header.rows, header.channels, header.layout), shape, SAME_CONFIG)
        compare("payload size", header.payload_nbytes, nbytes, SAME_CONFIG)
        compare(
            "digest of the history", f"{header.digest:016x}", f"{0 if header.is_keyframe else self.known_digest():016x}"
        )
        self._check_announcements(header, codec)
        payload = payload_of(frame, header)
        copy = torch.empty_like(payload) if header.is_raw_keyframe and self.config.remembers else None
        if kernels.checksum_for(nbytes, payload.device)(payload, copy) != header.checksum:
            raise FrameError(
                f"{self.where}: the payload is damaged (its checksum does not match). Nothing was applied; {RESET}. "
                f"The frame: {header.describe()}"
            )
        return payload if copy is None else copy

    def _compare(self, header: Header, what: str, got: object, expected: object, remedy: str = RESET) -> None:
        if got != expected:
            error = FrameError(
                f"{self.where}: wrong {what}: the frame says {got}, expected {expected}. Nothing was applied; "
                f"{remedy}. The frame: {header.describe()}"
            )
            error.epoch = header.epoch if what == "epoch" else None
            raise error

    def _expected_payload(self, header: Header, expected: _Expected) -> tuple[MatrixView | None, int]:
        """Matrix view and bytes of the payload of a frame of this kind.

        Raises:
            FrameError: there are no frames of this kind, or not now.
        """
        codec, numel, dtype, _, _, hint = expected
        flags, kind = header.flags, header.flags & _KINDS
        if kind not in _FLAGS_OF_KINDS or flags & ~kind & ~_FLAGS_OF_KINDS[kind]:
            self._compare(header, "flags", f"{flags:#04x}", "one kind of frame, and what it may say", SAME_CONFIG)
        if kind == STATELESS or header.is_raw_keyframe:
            return None, raw_nbytes(numel, dtype)
        if flags & NONFINITE and not header.payload_nbytes:
            return None, 0
        if kind & KEYFRAME:
            coded = self.config.keyframe_for(codec, numel, dtype)
            view = blocks(numel) if coded is None else self.keyframe_view(coded, numel, dtype, hint)
            return view, self.keyframe_nbytes(codec, numel, dtype, hint)
        if codec.lossless or self.is_fresh(numel, dtype):
            self._compare(header, "kind", "a residual", "a keyframe, for this end holds no history or was told of one")
        view = self.view or hint or blocks(numel)
        return view, self.residual_nbytes(codec, view)

    def _check_announcements(self, header: Header, codec: Codec) -> None:
        per_row, numel = header.next_groups * header.next_channels, header.numel
        announces_view = bool(header.next_groups or header.next_channels)
        if announces_view and (per_row == 0 or numel % per_row):
            next_view = f"{header.next_groups} groups of rows of {header.next_channels}"
            self._compare(header, "announced view", next_view, f"a divisor of {numel} elements", SAME_CONFIG)
        said = header.next_rate, header.next_kind
        # a device announces before it knows that a tensor is not finite; a frame that ends the history must be silent
        forgets = bool(header.flags & NONFINITE) and (header.is_raw_keyframe or not header.payload_nbytes)
        silent = forgets or header.flags & (STATELESS | NO_STATE)
        if said[0] > codec.rates or said[1] > 1 or (silent and (announces_view or any(said))):
            text = f"rate {said[0]}, kind {said[1]}{', a view' if announces_view else ''}"
            self._compare(header, "announcement", text, "nothing that this kind of frame does not say", SAME_CONFIG)
