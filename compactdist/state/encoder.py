"""The sending end of a stream: residual, payload, frame, and the same state change the receiver will make."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from compactdist import kernels
from compactdist.codecs.base import Codec, Session, Terms, residual_of
from compactdist.errors import ConfigError, LayoutError, NonFiniteError
from compactdist.kernels import Frames
from compactdist.kernels.spec import FROM_HOST
from compactdist.state.announcements import announce, say_coefficient
from compactdist.state.board import Board
from compactdist.state.device_keyframes import finite
from compactdist.state.find_view import find_view
from compactdist.state.history import Predictor
from compactdist.state.host_copy import HostCopy
from compactdist.state.matrix_view import blocks
from compactdist.state.rate import Choice, Measured, StreamRate
from compactdist.state.relay import Relay, stop_sharing
from compactdist.state.staged import Staged, Wanted
from compactdist.state.stand_in import put_behind
from compactdist.state.stream import Changes, Form, Room, Spares, StreamState
from compactdist.state.stream_config import StreamConfig
from compactdist.state.unprepared import Unprepared
from compactdist.wire import (
    HEADER_NBYTES,
    KEYFRAME,
    NO_STATE,
    NONFINITE,
    RESTART,
    SHAPE_NBYTES,
    STATELESS,
    empty_frame,
    raw_payload,
    seal,
    write_head,
)

__all__ = ["StreamEncoder"]

_ANY = Wanted()


def _own(flat: Tensor) -> Tensor:
    """A contiguous copy of the caller's values."""
    return flat.clone(memory_format=torch.contiguous_format)


def _bounded(residual: Tensor) -> Tensor:
    """The residual with infinities replaced by the largest float32; a copy, as the residual may be the caller's."""
    limit = torch.finfo(torch.float32).max
    return residual.clamp(-limit, limit)


def _room_for_frame(place: tuple[Any, ...], device: torch.device) -> Room:
    """A frame whose bytes are yet to be written; ``place``: how many there are, where the payload begins and ends."""
    nbytes, start, end = place[:3]
    frame = torch.empty(nbytes, dtype=torch.uint8, device=device)
    if nbytes > end:
        frame[end:].zero_()
    return Room(place, frame, (frame[start:end],))


class StreamEncoder(StreamState):
    """Encoder of one directed stream inside a group: stages a frame, and commits once it is on its way.

    Callers switch gradients off.

    Attributes:
        relay: relation to the incoming stream whose frames this one passes on; ``None`` if it never passed one on.
        steers: chooses the rates of a codec with several; ``None``: they stay as they are.
        announce_keyframe: the next residual announces that a keyframe follows it. Set by whoever wants one; both ends
            then expect it.
    """

    lasting = (*StreamState.lasting, "_keyframe_at", "_searched", "announce_keyframe")

    __slots__ = (
        "_keyframe_at",
        "_own_predictor",
        "_remembers",
        "_searched",
        "_spares",
        "announce_keyframe",
        "relay",
        "steers",
    )

    def __init__(
        self,
        config: StreamConfig,
        fingerprint: int,
        where: str,
        spares: Spares | None = None,
        changes: Changes | None = None,
        board: Board | None = None,
        unprepared: Unprepared | None = None,
    ) -> None:
        super().__init__(config, fingerprint, where, changes, board, unprepared)
        self.announce_keyframe = False
        self._keyframe_at = 0
        self._searched = not config.find_layout
        self.relay: Relay | None = None
        self.steers: StreamRate | None = None
        self._spares = spares
        self._remembers = config.remembers
        self._own_predictor = config.new_predictor() if config.open_loop else None

    @property
    def predictors(self) -> tuple[Predictor, ...]:
        """As for any stream; an open-loop sender's own prediction last."""
        return (self.predictor,) if self._own_predictor is None else (self.predictor, self._own_predictor)

    @predictors.setter
    def predictors(self, given: tuple[Predictor, ...]) -> None:
        self.predictor = given[0]
        if self._own_predictor is not None:
            self._own_predictor = given[1]

    @property
    def state_bytes(self) -> int:
        """Bytes of tensors held, an open-loop sender's true values and the codec's memory included.

        A predictor shared with an incoming stream counts as that stream's.
        """
        shared = self.relay is not None and self.relay.shared
        held = (0 if shared else self.predictor.held_bytes) + self.session_bytes
        return held + (self._own_predictor.held_bytes if self._own_predictor else 0)

    @property
    def codec_memory(self) -> tuple[Tensor, ...]:
        """As for any stream; an encoder that shares the predictor of an incoming stream has that stream's."""
        if self.relay is not None and self.relay.shared and self.relay.source is not None:
            return self.relay.source.codec_memory
        return super().codec_memory

    def move(self, to: Callable[[Tensor], Tensor]) -> None:
        """As for any stream; a predictor shared with an incoming stream stays with that one."""
        if self._own_predictor is not None:
            self._own_predictor.move(to)
        if self.relay is not None and self.relay.shared:
            self._move_codec_memory(to)
        else:
            super().move(to)

    def drop(self) -> None:
        """Forget the history: the next frame is a keyframe."""
        if self.relay is not None:
            stop_sharing(self, self.relay)
            self.relay.source, self.relay.owes_keyframe = None, False
        super().drop()
        self._searched = not self.config.find_layout
        if self._own_predictor is not None:
            self._own_predictor.clear()

    def stage(self, x: Tensor, codec: Codec, wanted: Wanted = _ANY, *, keyframe: bool) -> Staged:
        """Make the next frame without changing any state.

        Args:
            x: any shape, a compressible dtype (any dtype the frame knows for a lossless codec).
            codec: how to code a residual.
            wanted: what else the frame is to be.
            keyframe: send the tensor itself.

        Returns:
            The frame; :meth:`commit` or :meth:`withdraw` it.

        Raises:
            NonFiniteError: ``x`` holds NaN or Inf and is to be coded.
            LayoutError: a residual was asked for, and no keyframe of this size and dtype came before it.
        """
        flat = x.detach().reshape(-1)
        if keyframe or codec.lossless:
            return self._stage_keyframe(flat, codec, wanted)
        staged = self._stage_residual(flat, codec, self._form_for(flat, codec), wanted)
        return self._or_surprise(staged, flat, codec, wanted) if wanted.may_surprise else staged

    def _stage_payload(
        self, x: Tensor, codec: Codec, payload: Tensor, frame_nbytes: int | None = None, **fields: Any
    ) -> Staged:
        """The frame of a payload that exists; ``fields``: what its header says besides what all frames of ``x`` do."""
        nbytes = payload.numel()
        header = self.header_of(codec, x.numel(), x.dtype, payload_nbytes=nbytes, **fields)
        frame, room = empty_frame(header.nbytes, nbytes, frame_nbytes, payload.device)
        header = replace(header, checksum=kernels.checksum_for(nbytes, payload.device)(payload, room))
        return Staged(seal(frame, header), header, header.checksum)

    def _stage_keyframe(self, flat: Tensor, codec: Codec, wanted: Wanted, *, restarts: bool = False) -> Staged:
        flags = KEYFRAME | (NO_STATE if wanted.refuse_state else 0) | (RESTART if restarts else 0)
        keeps = self.config.remembers and not wanted.refuse_state
        coded = None if wanted.own_bytes else self.config.keyframe_for(codec, flat.numel(), flat.dtype)
        fields: dict[str, Any] = {"step": wanted.step, "epoch": wanted.epoch, "shape": wanted.shape}
        value: Tensor | None = None
        if coded is None:
            if keeps and not bool(torch.isfinite(flat).all()):
                flags |= NONFINITE
                keeps = False
            payload = raw_payload(flat)
            value = _own(flat) if keeps or wanted.value else None
            fields["keyframe_codec"] = 0
        else:
            view = self.keyframe_view(coded, flat.numel(), flat.dtype, wanted.hint)
            session = coded.open(view, flat.dtype, flat.device)
            payload = torch.empty(session.payload_nbytes, dtype=torch.uint8, device=flat.device)
            value = torch.empty(flat.numel(), dtype=flat.dtype, device=flat.device) if keeps or wanted.value else None
            try:
                session.encode(flat, (), value, payload)
            except NonFiniteError as error:
                raise NonFiniteError(f"{self.where}: {error}") from None
            fields |= {"groups": view.groups, "rows": view.rows, "channels": view.channels, "layout": view.hint}
        exact = _own(flat) if keeps and self._own_predictor is not None else None
        if codec.rates and not flags & (NONFINITE | NO_STATE):
            fields["next_rate"] = self._first_rate(codec, flat, wanted)
        staged = self._stage_payload(flat, codec, payload, wanted.frame_nbytes, flags=flags, **fields)
        staged.value, staged.exact, staged.hint = value, exact, wanted.hint
        return staged

    def _stage_keyframe_on_device(self, flat: Tensor, codec: Codec, wanted: Wanted) -> Staged | None:
        """The keyframe, made by the device without the host's waiting; ``None``: it has to be made here."""
        device, hint = flat.device, wanted.hint
        keyframes, clock = self._device_keyframes_of(codec, flat.numel(), flat.dtype, device, hint), self.clock
        steps = None if keyframes is None else keyframes.steps
        if keyframes is None or steps is None or clock is None or (keyframes.own_bytes and not wanted.foreseen):
            return None
        queue = kernels.queue_of(device) if wanted.queue is None else wanted.queue
        if queue != clock.queue:
            clock.follow(self.predictor, queue)
        frame, payload = empty_frame(HEADER_NBYTES, keyframes.nbytes - HEADER_NBYTES, wanted.frame_nbytes, device)
        header = keyframes.head.header
        if codec.rates:
            header = replace(header, next_rate=self._first_rate(codec, flat, wanted))
            announce(keyframes.frames, header.next_rate, keyframe=False)
        keeps = wanted.value or self._remembers
        value = torch.empty(flat.numel(), dtype=flat.dtype, device=device) if keeps else None
        call = wanted.step, wanted.epoch, self.sequence, FROM_HOST, 0
        if not keyframes.frames.send(steps, flat, (), value, None, frame, payload, clock.next_words, call, queue):
            return None
        return Staged(frame, header, 0, value, on_device=True, lends=not wanted.value, hint=hint)

    def _form_for(self, flat: Tensor, codec: Codec) -> Form:
        """What a residual of the tensor shares with those before it.

        Raises:
            LayoutError: no keyframe of this size and dtype came before it.
        """
        if self.live != (flat.numel(), flat.dtype):
            raise LayoutError(f"{self.where}: a residual needs a keyframe of the same size and dtype before it")
        form = self._form
        return self.form(codec, flat.device) if form is None or form.codec is not codec else form

    def _stage_residual(self, flat: Tensor, codec: Codec, form: Form, wanted: Wanted) -> Staged:
        if self.clock is not None:
            self.known_digest()
        session, own = form.session, self._own_predictor
        head, coefficient = form.head, 0.0
        if self.predictor.adapts:
            coefficient = float((own or self.predictor).choose(flat, codec.at(self.rate_of(codec)).velocity_share))
            head = form.head_for(coefficient)
        header = head.header
        start = HEADER_NBYTES if wanted.shape is None else HEADER_NBYTES + SHAPE_NBYTES
        end = start + session.payload_nbytes
        spares, place = self._spares or Spares(), (wanted.frame_nbytes or end, start, end, self.part)
        room = (spares.rooms.pop(place, None) if flat.is_cpu else None) or _room_for_frame(place, flat.device)
        frame, (payload,) = room.whole, room.views
        terms = self.predictor.terms() if self._plain else self.terms_for(session, coefficient)
        if terms and flat.is_cpu and form.is_far_larger(flat, terms if own is None else own.terms(coefficient)):
            terms, header = (), replace(form.head.header, flags=RESTART)
        value = None
        steers = self.steers if codec.rates else None
        if wanted.value or self._remembers or steers is not None:
            value = spares.take(flat, None, self.part)
        # an open-loop sender's prediction is not the receiver's: encode against its own, decode with the receiver's
        expected, out = (terms, value) if own is None or not terms else (own.terms(coefficient), None)
        if not self._encoded(session, flat, expected, out, payload, wanted):
            out = None
        copied = out is not None and wanted.copy is not None
        if value is not None and out is None:
            session.decode(payload, terms, value)
        checksum = form.checksum(payload) if session.checksum is None else session.checksum
        exact = None if own is None else _own(flat)
        staged = Staged(
            frame, header, checksum, value, terms, exact,
            session=session, room=room if flat.is_cpu else None, copied=copied, lends=copied or not wanted.value,
        )  # fmt: skip
        searches = not self._searched and not header.layout
        if searches:
            self._search(staged, residual_of(flat, expected))
        announces = steers is not None and self._announces_rate(staged, steers, codec, flat, wanted)
        if wanted.shape is None and header is head.header and not (searches or announces or self.announce_keyframe):
            write_head(frame, head.filled(wanted.step, wanted.epoch, self.sequence, checksum, self.digest))
        else:
            self._seal(staged, wanted)
        return staged

    def _or_surprise(self, staged: Staged, flat: Tensor, codec: Codec, wanted: Wanted) -> Staged:
        """A residual's frame or, where it would miss the target by far, a keyframe in its place.

        The rate of a residual is announced one frame ahead, so its size cannot follow from a tensor that changed
        entirely since. Not right after a keyframe: tensors that have nothing to do with those before are better sent at
        a higher rate, which is learnt from a residual.
        """
        steers, measured, session = self.steers, staged.measured, staged.session
        if steers is None or not isinstance(measured, Measured) or self.sequence == self._keyframe_at + 1:
            return staged
        if not steers.is_hopeless(measured):
            return staged
        assert session is not None
        agreed = wanted.frame_nbytes
        nbytes = staged.header.nbytes + self.keyframe_nbytes(codec, flat.numel(), flat.dtype)
        fits = agreed is None or nbytes <= agreed
        instead = wanted._replace(frame_nbytes=agreed if fits else None, value=True)
        try:
            keyframe = self._stage_keyframe(flat, codec, instead, restarts=True)
        except BaseException:
            session.rollback()
            raise
        assert keyframe.value is not None
        if not Measured.of(flat, (), keyframe.value).error < measured.error:
            steers.rate = self.rate_of(codec)  # the residual's, not that of one after a keyframe
            return staged
        session.rollback()
        keyframe.surprises = True
        if not fits:
            assert agreed is not None
            put_behind(keyframe, agreed)
        return keyframe

    def _encoded(
        self, session: Session, flat: Tensor, expected: Terms, out: Tensor | None, payload: Tensor, wanted: Wanted
    ) -> bool:
        """Write the payload, ``out`` and ``wanted.copy``; returns whether the last two were written.

        They are not where the residual left float32: the payload then codes what float32 holds of it.
        """
        copy, row_weights = wanted.copy, wanted.row_weights
        try:
            if copy is None or out is None:
                session.encode(flat, expected, out, payload, row_weights=row_weights)
            else:
                session.encode_twice(flat, expected, out, copy, payload)
        except NonFiniteError as error:
            session.rollback()
            if not bool(torch.isfinite(flat).all()):
                raise NonFiniteError(f"{self.where}: {error}") from None
            # the difference of huge finite values left float32: send what float32 holds, the next frame sends the rest
            session.encode(_bounded(residual_of(flat, expected)), (), None, payload, row_weights=row_weights)
            return False
        except BaseException:
            session.rollback()
            raise
        return True

    def _stage_on_device(self, flat: Tensor, form: Form, frames: Frames, queue: int, wanted: Wanted) -> Staged | None:
        """The residual's frame, made by the device without the host's waiting; ``None``: it has to be made here.

        Its receiver need not look into it; what it announces under a target, the receiver's host reads later.
        """
        steps, clock = form.session.device_steps, self.clock
        if steps is None or clock is None or self._own_predictor is not None:
            return None
        if not (self._searched or form.head.header.layout):
            return None
        if self.announce_keyframe:
            raise ConfigError(
                f"{self.where}: a keyframe cannot be announced in a frame that is made on {flat.device}, for its "
                "receiver does not look into it: call reset() on all ranks instead"
            )
        spares, device = self._spares or Spares(), flat.device
        place = wanted.frame_nbytes or form.frame_nbytes, HEADER_NBYTES, form.frame_nbytes, self.part, device, queue
        room = spares.rooms.pop(place, None) or _room_for_frame(place, device)
        if queue != clock.queue:
            clock.follow(self.predictor, queue, form.session)
        codec, header, steers = form.codec, form.head.header, self.steers if form.codec.rates else None
        if steers is not None:
            choice = self._steered(steers, codec, flat, wanted, self.rate_of(codec))
            header = replace(header, next_rate=choice.rate, next_kind=int(choice.keyframe))
            announce(frames, choice.rate, choice.keyframe)
        coefficient: float | Tensor = 0.0
        if self.predictor.adapts:
            coefficient = say_coefficient(frames, flat, self.predictor, codec.at(self.rate_of(codec)), queue)
        terms = self.predictor.terms() if self._plain else self.terms_for(form.session, coefficient)
        value = None
        if wanted.value or self._remembers or steers is not None:
            value = spares.take(flat, queue, self.part)
        copy = None if value is None else wanted.copy
        call = wanted.step, wanted.epoch, self.sequence, clock.source, self.digest
        if not frames.send(steps, flat, terms, value, copy, room.whole, room.views[0], clock.words, call, queue):
            return None
        measured = None if steers is None or value is None else HostCopy(kernels.energies(flat, terms, value))
        return Staged(
            room.whole, header, 0, value, terms,
            session=form.session, on_device=True, measured=measured, room=room, copied=copy is not None,
            lends=copy is not None or not wanted.value,
        )  # fmt: skip

    def _announces_rate(self, staged: Staged, steers: StreamRate, codec: Codec, flat: Tensor, wanted: Wanted) -> bool:
        """Let a residual's frame announce the rate that its tensor asks for; returns whether it announces anything."""
        assert staged.value is not None
        staged.measured = Measured.of(flat, staged.terms, staged.value)
        choice = self._steered(steers, codec, flat, wanted, self.rate_of(codec), staged.measured)
        if choice == Choice():
            return False
        staged.header = replace(staged.header, next_rate=choice.rate, next_kind=int(choice.keyframe))
        return True

    def _steered(
        self,
        steers: StreamRate,
        codec: Codec,
        flat: Tensor,
        wanted: Wanted,
        rate: int,
        measured: Measured | None = None,
        *,
        keyframe: bool = False,
    ) -> Choice:
        """What the frame of a tensor announces: ``rate`` is in use; ``measured``, if that is known by now."""
        numel, hint, step = flat.numel(), wanted.hint, wanted.step
        view = (self.view if self.live == (numel, flat.dtype) else hint) or blocks(numel)
        rungs = [codec.at(1 + index) for index in range(codec.rates)]
        sizes = [HEADER_NBYTES + rung.payload_nbytes(view.shape, torch.float32) for rung in rungs]
        steers.begin(step if step >= 0 else self.sequence, wanted.epoch, numel, sizes, rate)
        keyframe_nbytes = HEADER_NBYTES + self.keyframe_nbytes(codec, numel, flat.dtype, hint)
        return steers.choose(measured, keyframe_nbytes, keyframe=keyframe)

    def _first_rate(self, codec: Codec, flat: Tensor, wanted: Wanted) -> int:
        """The rate that a tensor's keyframe announces; 0: none."""
        if self.steers is None:
            return 0
        return self._steered(self.steers, codec, flat, wanted, codec.start_rate, keyframe=True).rate

    def energies(self, x: Tensor, staged: Staged) -> Tensor:
        """Sums of squares of a tensor, its residual and its frame's error, as ``kernels.energies`` has them.

        A frame that is no residual has the tensor's own sum in the residual's place.
        """
        assert staged.value is not None
        own = self._own_predictor
        terms = own.terms() if own is not None and staged.terms else staged.terms
        return kernels.energies(x.detach().reshape(-1), terms, staged.value)

    def _search(self, staged: Staged, residual: Tensor) -> None:
        """Look for a better matrix view in the first residual; its frame announces what was found."""
        found = find_view(_bounded(residual))
        assert self.view is not None
        staged.searched = True
        if found.shape != self.view.shape:
            staged.next_view = found
            staged.header = replace(staged.header, next_groups=found.groups, next_channels=found.channels)

    def _seal(self, staged: Staged, wanted: Wanted) -> None:
        """Write the header of a residual frame that says more than its form: a shape, a restart, announcements."""
        staged.header = replace(
            staged.header,
            step=wanted.step,
            epoch=wanted.epoch,
            sequence=self.sequence,
            shape=wanted.shape,
            checksum=staged.checksum,
            digest=self.known_digest(),
            next_kind=int(self.announce_keyframe) or staged.header.next_kind,
        )
        seal(staged.frame, staged.header)

    def stage_or_flag(
        self, x: Tensor, codec: Codec, wanted: Wanted, *, keyframe: bool
    ) -> tuple[Staged, NonFiniteError | None]:
        """As ``stage``, but a tensor that is not finite gives a flagged frame: peers wait for one of the agreed size.

        Frames are made on the tensor's device where that is possible.

        Returns:
            The frame, and the error to raise once the frame is on its way, or ``None``.
        """
        flat, keyframe = x if x.dim() == 1 else x.reshape(-1), keyframe or codec.lossless
        try:
            staged = None
            if keyframe:
                if not (wanted.refuse_state or wanted.own_bytes):
                    staged = self._stage_keyframe_on_device(flat, codec, wanted)
                return self._stage_keyframe(flat, codec, wanted) if staged is None else staged, None
            form = self._form
            if form is None or form.codec is not codec or self.live != (flat.numel(), flat.dtype):
                form = self._form_for(flat, codec)
            if form.frames is not None:
                queue = kernels.queue_of(flat.device) if wanted.queue is None else wanted.queue
                staged = self._stage_on_device(flat, form, form.frames, queue, wanted)
            if staged is None:
                staged = self._stage_residual(flat, codec, form, wanted)
                if wanted.may_surprise and form.frames is None:  # else a device checks what arrives, and nobody looks
                    staged = self._or_surprise(staged, flat, codec, wanted)
            return staged, None
        except NonFiniteError as error:
            # a traceback would keep the caller's tensors and works alive
            error.__context__ = error.__cause__ = None
            failure = error.with_traceback(None)
        nothing, flags = flat.new_empty(0, dtype=torch.uint8), NONFINITE | (KEYFRAME if keyframe else 0)
        digest = 0 if keyframe else self.known_digest()
        fields = {"step": wanted.step, "epoch": wanted.epoch, "flags": flags, "digest": digest}
        return self._stage_payload(flat, codec, nothing, wanted.frame_nbytes, **fields), failure

    def stage_stateless(self, x: Tensor, codec: Codec, *, step: int, epoch: int) -> Staged:
        """A frame of the tensor itself that touches no history (a pass-through the receiver cannot foresee)."""
        fields = {"step": step, "epoch": epoch, "flags": STATELESS, "digest": self.known_digest()}
        return self._stage_payload(x, codec, raw_payload(x), **fields)

    def withdraw(self, staged: Staged) -> None:
        """Undo ``stage``: the frame will not be sent and leaves no trace in the stream."""
        if staged.session is not None:
            staged.session.rollback()
            if staged.on_device and self.clock is not None:
                self.clock.stop()  # the device has moved it on

    def commit(self, staged: Staged, queue: int | None = None) -> None:
        """Make the state change that the receiver makes when it decodes the frame.

        Args:
            staged: the frame, which is on its way.
            queue: ``kernels.queue_of`` the frame's device, where the caller has asked.
        """
        header = staged.header
        flags = header.flags
        if self.steers is not None and self.steers.is_known and (staged.measured is not None or flags & KEYFRAME):
            self.steers.sent(staged.measured, staged.wire_nbytes, header.next_rate)
        if flags & STATELESS:
            self.sequence += 1
            return
        if flags & (NONFINITE | NO_STATE):
            self.sequence += 1
            self.drop()
            return
        if flags & KEYFRAME:
            self.start(header.numel, header.dtype, staged.hint)
            self.digest, self._keyframe_at = 0, self.sequence
            if staged.on_device and self.clock is not None:
                self.clock.begin()
            if self.relay is not None:
                self.relay.owes_keyframe = False
        clock = self.clock
        if staged.on_device and clock is not None:
            self.sequence += 1
            clock.source, clock.right = 1 if clock.source == 0 else 0, True  # the next frame reads what this one wrote
        else:
            self.moved_on(staged.checksum)
        if staged.searched:
            self._searched = True
        if staged.value is not None:
            if flags & RESTART:
                self.predictor.clear()
            kept = staged.value
            if staged.on_device and flags & KEYFRAME and header.is_raw_keyframe:
                kept = finite(kept)
            unused = self.predictor.advance(kept, staged.terms)
            if unused is staged.value and not staged.lends:  # the history has a copy
                staged.spare = unused
            elif unused is not None and self._spares is not None:
                self._spares.give(unused, queue, self.part)
        if self._own_predictor is not None and staged.exact is not None:
            if flags & RESTART:
                self._own_predictor.clear()
            self._own_predictor.advance(staged.exact, ())
        if staged.session is not None and staged.session.remembers:
            self._commit(staged.session)
        if staged.next_view is not None:
            self._use(staged.next_view)
        if header.next_rate:
            self._change_rate(header.next_rate)
        if header.next_kind:
            self.announce_keyframe = False
            self.keyframe_announced = True
            self._changes.count += 1
