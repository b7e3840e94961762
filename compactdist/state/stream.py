"""What encoder and decoder of one directed stream share: history, matrix view, frame sizes, spare buffers.

Both ends move through the same sequence of :class:`StreamState` values. Everything a frame's size depends on is here,
so that either end can tell the size of the next frame before it arrives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor

from compactdist import kernels
from compactdist.codecs.base import Codec, Session, Terms
from compactdist.errors import ConfigError
from compactdist.kernels.spec import DIGEST_FACTOR, FROM_HOST, MatrixView
from compactdist.state.board import Board
from compactdist.state.device_clock import DeviceClock
from compactdist.state.device_keyframes import DeviceKeyframes, device_keyframes_of
from compactdist.state.history import Predictor
from compactdist.state.matrix_view import blocks, plain
from compactdist.state.stream_config import COMPRESSIBLE_DTYPES, StreamConfig, saves
from compactdist.state.unprepared import Unprepared
from compactdist.wire import HEAD_PLACES, HEADER_NBYTES, MASK64, Header, HeadTemplate, raw_nbytes

__all__ = ["Changes", "Form", "Room", "Spares", "StreamState"]


class Room(NamedTuple):
    """Memory for frames.

    Attributes:
        place: key in ``Spares.rooms``. On a GPU it names the device and the CUDA stream, whose work may still use it.
        whole: 1-D uint8.
        views: of the whole.
    """

    place: tuple[Any, ...]
    whole: Tensor
    views: tuple[Tensor, ...]


class Spares:
    """Buffers that reconstructions are written to: at most one of each size, shared by the streams of a group.

    A sender writes the next reconstruction beside the last one, since a staged frame must not change the history; when
    the frame is committed, the last one becomes the spare buffer. The parts of a tensor are all staged before the first
    is committed, so each has a buffer of its own. On a GPU a buffer stays with its CUDA stream, whose work may still
    read it.

    Attributes:
        rooms: memory for frames, by ``Room.place``. A call removes the room that it uses, and puts it back once it is
            done.
    """

    def __init__(self) -> None:
        self._held: dict[tuple[int, torch.dtype, torch.device, int, int], Tensor] = {}
        self.rooms: dict[tuple[Any, ...], Room] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers that lie ready; those for frames are not among them."""
        return sum(held.nbytes for held in tuple(self._held.values()))

    def take(self, like: Tensor, queue: int | None = None, part: int = 0) -> Tensor:
        """A flat buffer of as many elements as ``like``, same dtype and device, its contents undefined.

        ``queue``: ``kernels.queue_of`` the device, where the caller has asked. ``part``: number of the stream's part.
        """
        if queue is None:
            queue = 0 if like.is_cpu else kernels.queue_of(like.device)
        held = self._held.pop((like.numel(), like.dtype, like.device, queue, part), None)
        return torch.empty(like.numel(), dtype=like.dtype, device=like.device) if held is None else held

    def give(self, buffer: Tensor, queue: int | None = None, part: int = 0) -> None:
        """Take back a buffer that nobody reads any more; ``queue`` and ``part`` as in :meth:`take`."""
        if queue is None:
            queue = 0 if buffer.is_cpu else kernels.queue_of(buffer.device)
        self._held[buffer.numel(), buffer.dtype, buffer.device, queue, part] = buffer

    def clear(self) -> None:
        """Let go of all buffers."""
        self._held.clear()
        self.rooms.clear()


class Form:
    """What the residual frames of a live stream share: worked out at the first of them, used again by all others.

    Attributes:
        codec: codes the residuals.
        session: this end of the stream under that codec.
        head: the bytes before the payload; what differs from frame to frame is filled in.
        frame_nbytes: bytes of every frame, header included, padding excluded.
        checksum: sums up a payload.
        is_far_larger: whether a residual is so large beside its tensor that it is not worth coding.
        frames: seals or checks frames on the device; ``None`` where the host does it.
    """

    __slots__ = ("_heads", "checksum", "codec", "frame_nbytes", "frames", "head", "is_far_larger", "session")

    def __init__(self, codec: Codec, session: Session, head: HeadTemplate, frames: kernels.Frames | None) -> None:
        self.codec = codec
        self.session = session
        self.head = head
        self._heads = {head.header.coefficient: head}
        self.frame_nbytes = head.header.nbytes + session.payload_nbytes
        self.frames = frames
        self.checksum = kernels.checksum_for(session.payload_nbytes, session.device)
        self.is_far_larger = kernels.far_larger_for(session.view.numel, session.dtype, session.device)

    def head_for(self, coefficient: float) -> HeadTemplate:
        """The same bytes, but for the coefficient that this frame is predicted with."""
        head = self._heads.get(coefficient)
        if head is None:
            head = self._heads[coefficient] = HeadTemplate(replace(self.head.header, coefficient=coefficient))
        return head


class Changes:
    """Counts the events that change kind or size of a next frame, for all streams of a call site.

    Attributes:
        count: such events so far; a plan made at one count holds until the count changes.
        unread: streams whose last frame a device looked at, and that may have announced such an event.
    """

    __slots__ = ("count", "unread")

    def __init__(self) -> None:
        self.count = 0
        self.unread: list[StreamState] = []

    def read(self) -> int:
        """Let streams do what their last frames announced; returns how many of these had not come so far."""
        unread, self.unread = self.unread, []
        return sum([stream.read_announcement() for stream in unread])


class StreamState:
    """One end of a directed stream.

    Attributes:
        config: how the stream predicts.
        fingerprint: names the stream in frames (:func:`compactdist.wire.stream_fingerprint`).
        predictor: holds the history, whose bytes are equal on both ends.
        live: (numel, dtype) of the history; ``None`` while the stream is empty.
        sequence: frames so far in this epoch; counts on when the history is dropped, so that a repeated or lost
            keyframe is noticed as well.
        digest: of all payloads that made the history, in order; 0 while the stream is empty. Ends that have applied the
            same frames have the same digest. Ask :meth:`known_digest` where frames may have been made on a device.
        keyframe_announced: the last frame said that the next one is a keyframe.
        view: matrix view of the residuals; ``None`` until the stream is live.
        clock: of frames that are made or checked on a device; ``None``: there were none yet.
        rate: number of the rate announced last; 0: none since the last keyframe, so the codec's start rate holds.
        part, parts: the stream carries this part, from 0, of tensors that travel in so many.
        where: call site and ranks, for error messages.
    """

    lasting: ClassVar[tuple[str, ...]] = ("keyframe_announced", "live", "rate", "sequence", "view")
    """What outlasts a call besides history, digest and the codec's memory: a snapshot takes it as it is."""

    __slots__ = (
        "_board",
        "_changes",
        "_device_keyframes",
        "_form",
        "_forms",
        "_keeps_copies",
        "_number",
        "_plain",
        "_unprepared",
        "clock",
        "config",
        "digest",
        "fingerprint",
        "keyframe_announced",
        "live",
        "part",
        "parts",
        "predictor",
        "rate",
        "sequence",
        "view",
        "where",
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
        self.config = config
        self.fingerprint = fingerprint
        self.where = where
        self.part, self.parts = 0, 1
        self.predictor = config.new_predictor()
        self._plain = config.predictor.copies == 0 or (config.predictor.copies == 1 and config.state == "exact")
        self._keeps_copies = config.state != "exact" and config.remembers
        self.live: tuple[int, torch.dtype] | None = None
        self.sequence = 0
        self.digest = 0
        self.keyframe_announced = False
        self.view: MatrixView | None = None
        self.rate = 0
        self._form: Form | None = None
        self._forms: dict[int, Form] = {}
        self._changes = changes or Changes()
        self._board = board
        self._unprepared = unprepared
        self._device_keyframes: DeviceKeyframes | None = None
        self._number: int | None = None
        self.clock: DeviceClock | None = None

    @property
    def predictors(self) -> tuple[Predictor, ...]:
        """All that this end predicts from, in a lasting order."""
        return (self.predictor,)

    @predictors.setter
    def predictors(self, given: tuple[Predictor, ...]) -> None:
        (self.predictor,) = given

    @property
    def state_bytes(self) -> int:
        """Bytes of tensors held by this end."""
        return self.predictor.held_bytes + self.session_bytes

    @property
    def session_bytes(self) -> int:
        """Bytes of tensors that the codec remembers."""
        return 0 if self._form is None else self._form.session.held_bytes

    @property
    def codec_memory(self) -> tuple[Tensor, ...]:
        """What the codec remembers that decoding depends on; the stream's other end holds the same."""
        return () if self._form is None else self._form.session.shared_memory

    @property
    def known_form(self) -> Form | None:
        """The form of the last residual; ``None``: none was made or read since the stream began or its view changed."""
        return self._form

    def terms_for(self, session: Session, coefficient: float | Tensor = 0.0) -> Terms:
        """The prediction of the next residual, in the form that the session takes."""
        predictor = self.predictor
        if predictor.copies > 1 and not session.takes_velocity:
            return predictor.terms(coefficient)
        return cast(Terms, predictor.kept_terms(coefficient, rounded=session.takes_rounded))

    def move(self, to: Callable[[Tensor], Tensor]) -> None:
        """Keep what ``to`` makes of each tensor held by this end: the same bytes on another device."""
        self.predictor.move(to)
        self._move_codec_memory(to)

    def _move_codec_memory(self, to: Callable[[Tensor], Tensor]) -> None:
        if self._form is not None:
            self._form.session.move(to)

    def _commit(self, session: Session) -> None:
        """Let a session remember the last frame. It prepares for the next at once, or in ``Unprepared`` later."""
        session.commit()
        if session.prepares:
            if self._unprepared is None:
                session.prepare()
            else:
                self._unprepared.add(session)

    def divide(self, part: int, parts: int, where: str) -> None:
        """Carry this part of tensors from now on. The history, of tensors that were divided otherwise, is forgotten."""
        self.drop()
        self.part, self.parts, self.where = part, parts, where

    def is_fresh(self, numel: int, dtype: torch.dtype) -> bool:
        """Whether the stream holds no history for such a tensor, so that its next frame must be a keyframe."""
        return self.live != (numel, dtype) or self.keyframe_announced

    def frame_nbytes(
        self,
        codec: Codec,
        numel: int,
        dtype: torch.dtype,
        *,
        keyframe: bool,
        hint: MatrixView | None = None,
    ) -> int:
        """Bytes of the next frame, header included.

        Args:
            codec: codes residuals.
            numel: elements of the tensor.
            dtype: of the elements.
            keyframe: the frame is a keyframe.
            hint: matrix view of the layout hint, for a stream that starts with this frame.

        Raises:
            ConfigError: The codec learns from a history that the ends of this stream do not share.
        """
        self._check_sharing(codec)
        if keyframe or codec.lossless:
            return HEADER_NBYTES + self.keyframe_nbytes(codec, numel, dtype, hint)
        view = self.view if self.live == (numel, dtype) else hint
        return HEADER_NBYTES + self.residual_nbytes(codec, view or blocks(numel))

    def residual_nbytes(self, codec: Codec, view: MatrixView) -> int:
        """Bytes of a residual's payload at the rate in use."""
        return codec.at(self.rate_of(codec)).payload_nbytes(view.shape, torch.float32)

    def rate_of(self, codec: Codec) -> int:
        """The rate at which the codec codes the next residual, as frames say it: 0 where it has just one."""
        return min(self.rate or codec.start_rate, codec.rates)

    def _check_sharing(self, codec: Codec) -> None:
        if codec.needs_shared_history and self.config.open_loop:
            raise ConfigError(
                f"{self.where}: codec {codec.codec_id!r} learns from the history, which the two ends do not share with "
                "error_feedback=False; leave error feedback on, or use another codec"
            )

    def keyframe_nbytes(self, codec: Codec, numel: int, dtype: torch.dtype, hint: MatrixView | None = None) -> int:
        """Bytes of a keyframe's payload; ``hint`` as for :meth:`keyframe_view`."""
        coded = self.config.keyframe_for(codec, numel, dtype)
        if coded is None:
            return raw_nbytes(numel, dtype)
        return coded.payload_nbytes(self.keyframe_view(coded, numel, dtype, hint).shape, torch.float32)

    def keyframe_view(self, coded: Codec, numel: int, dtype: torch.dtype, hint: MatrixView | None) -> MatrixView:
        """The matrix view that a keyframe is coded in: that of the layout hint; without one, blocks.

        A view whose scales would make the payload as large as the tensor's own bytes is left aside. A view that was
        found counts for residuals only: it was found in one.

        Args:
            coded: codes the keyframe.
            numel: elements of the tensor.
            dtype: of the elements.
            hint: what a stream begins with that is not live for such tensors; one that is live keeps its own.
        """
        view = self.view if self.live == (numel, dtype) else hint
        return view if view is not None and view.hint and saves(coded, view, dtype) else blocks(numel)

    def form(self, codec: Codec, device: torch.device) -> Form:
        """What the next residual frame shares with those before it. The stream must be live."""
        form = self._form
        if form is not None and form.codec == codec:
            form.codec = codec  # callers compare identities first, which is cheaper
            return form
        self._check_sharing(codec)
        self._end_graphs()
        assert self.live is not None
        assert self.view is not None
        session, self._forms = codec.open(self.view, self.live[1], device), {}
        if codec.rates:
            session.set_rate(self.rate_of(codec))
        self._form = self._form_of(codec, session)
        return self._form

    def _form_of(self, codec: Codec, session: Session) -> Form:
        """What residual frames share that the session makes, at its rate."""
        assert self.live is not None
        view, (numel, dtype) = session.view, self.live
        rate = self.rate_of(codec)
        header = self.header_of(
            codec,
            numel,
            dtype,
            payload_nbytes=session.payload_nbytes,
            layout=view.hint,
            groups=view.groups,
            rows=view.rows,
            channels=view.channels,
            rate=rate,
        )
        head = HeadTemplate(header)
        made = self._forms[rate] = Form(codec, session, head, self._frames_on(session.device, session, head))
        return made

    def _frames_on(self, device: torch.device, session: Session, head: HeadTemplate) -> kernels.Frames | None:
        """The device's maker or checker of the form's frames; ``None``: the host makes or checks them."""
        made, board = kernels.frames_for(device), self._board
        if made is None or board is None or self.config.open_loop:  # open-loop frames are made by the sender's host
            return None
        if session.payload_nbytes % 4 or session.device_steps is None:
            return None
        if self.clock is None:
            self.clock = DeviceClock(device)
        return made(head.raw, HEAD_PLACES, session.payload_nbytes, board.on(device), self._number_on(board))

    def _number_on(self, board: Board) -> int:
        if self._number is None:
            self._number = board.enter(self.where)
        return self._number

    def _device_keyframes_of(
        self, codec: Codec, numel: int, dtype: torch.dtype, device: torch.device, hint: MatrixView | None
    ) -> DeviceKeyframes | None:
        """What seals or checks the keyframes of such tensors on a device; ``None``: the host does it.

        Both ends must come to the same answer, for a device goes on from a tensor that is not finite where a host
        forgets the history.
        """
        board, keyframes = self._board, self._device_keyframes
        if board is None or (device.type == "cpu" and kernels.choice.forced != "gpu"):
            return None
        hint = self.view if self.live == (numel, dtype) else hint
        if keyframes is None or not keyframes.suit(codec, numel, dtype, device, hint):
            if not numel or dtype not in COMPRESSIBLE_DTYPES or self.config.open_loop:
                return None
            keyframes = device_keyframes_of(
                self, codec, numel, dtype, device, hint, board.on(device), self._number_on(board)
            )
            if keyframes is None:
                return None
            self._device_keyframes = keyframes
        if self.clock is None:
            self.clock = DeviceClock(device)
        return keyframes

    def header_of(self, codec: Codec, numel: int, dtype: torch.dtype, **fields: Any) -> Header:
        """A header with what all frames of the stream say, and the ``fields`` given."""
        coded = self.config.keyframe_for(codec, numel, dtype)
        fields = {
            "step": 0,
            "epoch": 0,
            "sequence": self.sequence,
            "payload_nbytes": 0,
            "keyframe_codec": 0 if coded is None else coded.fingerprint(),
            "coefficient": self.config.coefficient,
        } | fields
        return Header(
            stream=self.fingerprint,
            part=self.part,
            parts=self.parts,
            codec=codec.fingerprint(),
            numel=numel,
            dtype=dtype,
            predictor=self.config.predictor.number,
            **fields,
        )

    def moved_on(self, checksum: int) -> None:
        """Count a frame whose payload has become part of the history."""
        self.sequence += 1
        self.digest = ((self.digest ^ checksum) * DIGEST_FACTOR + 1) & MASK64
        if self.clock is not None:
            self.clock.stop()

    def known_digest(self) -> int:
        """The digest on the host; waits for the device if only that knows it."""
        clock = self.clock
        if clock is not None and clock.on_device:
            self.digest, clock.source = clock.read(), FROM_HOST
        return self.digest

    def _end_graphs(self) -> None:
        """Refuse replays of CUDA graphs from now on: the stream is about to use memory that they do not know."""
        clock = self.clock
        if clock is not None and clock.captured:
            self.known_digest()
            clock.leave((self._form, *self.predictor.held))

    def start(self, numel: int, dtype: torch.dtype, hint: MatrixView | None) -> None:
        """Make the stream live for tensors of this size, as its first keyframe does.

        What decoding depends on begins with a keyframe, as the digest does.
        """
        if self.clock is not None:
            self._end_graphs()
            self.clock.source, self.clock.right = FROM_HOST, False
        if self._form is not None:
            self._form.session.forget()
        self._change_rate(0)
        if self.live != (numel, dtype):
            self.drop()
            self.live = (numel, dtype)
            self._use(hint or blocks(numel))
            return
        if self.keyframe_announced:
            self.keyframe_announced = False
            self._changes.count += 1

    def read_announcement(self) -> bool:
        """Do what the last frame announced, if that is known on its device only so far: nothing at a sender.

        Returns:
            Whether the host waited.
        """
        return False

    def follow(self, header: Header) -> None:
        """Do what a frame announced for the next one: another matrix view or rate, a keyframe."""
        if self.live is None:
            return
        if header.next_channels:
            self._use(plain(self.live[0], header.next_groups, header.next_channels))
        self.obey(header.next_rate, bool(header.next_kind))

    def obey(self, rate: int, keyframe: bool) -> None:
        """Change to the rate that a frame announced, 0: none, and expect a keyframe if it announced one."""
        if rate:
            self._change_rate(rate)
        if keyframe:
            self.keyframe_announced = True
            self._changes.count += 1

    def _change_rate(self, rate: int) -> None:
        if rate == self.rate:
            return
        self.rate, form = rate, self._form
        if form is not None and form.codec.rates:
            form.session.set_rate(self.rate_of(form.codec))
            known = self._forms.get(self.rate_of(form.codec))
            self._form = self._form_of(form.codec, form.session) if known is None else known
        self._changes.count += 1

    def _use(self, view: MatrixView | None) -> None:
        self._end_graphs()
        self.view = view
        self._form = None
        self._forms = {}
        self._changes.count += 1

    def drop(self) -> None:
        """Forget the history: the next frame is a keyframe."""
        self._end_graphs()
        self.predictor.clear()
        self.live = None
        self.digest = 0
        if self.clock is not None:
            self.clock.source, self.clock.right = FROM_HOST, False
        self.keyframe_announced = False
        self.rate = 0
        self._use(None)
