"""The sending end of a stream: residual, payload, frame, and the same state change the receiver will make."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from compactdist.codecs.base import Codec, residual_of
from compactdist.errors import LayoutError, NonFiniteError
from compactdist.kernels.spec import MatrixView
from compactdist.state.find_view import find_view
from compactdist.state.relay import Relay, stop_sharing
from compactdist.state.stream import Changes, Spares, Staged, StreamConfig, StreamState
from compactdist.wire import (
    KEY,
    NO_STATE,
    NONFINITE,
    STATELESS,
    Header,
    header_bytes,
    pack,
    raw_payload,
    write_head,
)

__all__ = ["StreamEncoder"]


def _own(flat: Tensor) -> Tensor:
    """A contiguous copy of the caller's values."""
    return flat.clone(memory_format=torch.contiguous_format)


def _bounded(residual: Tensor) -> Tensor:
    """The residual with infinities replaced by the largest float32; a copy, as the residual may be the caller's."""
    limit = torch.finfo(torch.float32).max
    return residual.clamp(-limit, limit)


class StreamEncoder(StreamState):
    """Encoder of one directed stream inside a group: stages a frame, and commits once it is on its way.

    Callers switch gradients off.

    Attributes:
        relay: relation to the incoming stream whose frames this one passes on; ``None`` if it never passed one on.
    """

    __slots__ = ("_own_predictor", "_remembers", "_searched", "_spares", "relay")

    def __init__(
        self,
        config: StreamConfig,
        key: int,
        where: str,
        spares: Spares | None = None,
        changes: Changes | None = None,
    ) -> None:
        super().__init__(config, key, where, changes)
        self._searched = not config.find_layout
        self.relay: Relay | None = None
        self._spares = spares
        self._remembers = config.remembers
        self._own_predictor = config.new_predictor() if config.open_loop else None

    @property
    def state_bytes(self) -> int:
        """Bytes of tensors held, an open-loop sender's true values and the codec's memory included.

        A predictor shared with an incoming stream counts as that stream's.
        """
        shared = self.relay is not None and self.relay.shared
        held = (0 if shared else self.predictor.held_bytes) + self.session_bytes
        return held + (self._own_predictor.held_bytes if self._own_predictor else 0)

    def drop(self) -> None:
        """Forget the history: the next frame is a keyframe."""
        if self.relay is not None:
            stop_sharing(self, self.relay)
            self.relay.source, self.relay.owes_key = None, False
        super().drop()
        self._searched = not self.config.find_layout
        if self._own_predictor is not None:
            self._own_predictor.clear()

    def stage(
        self,
        x: Tensor,
        codec: Codec,
        *,
        keyframe: bool,
        epoch: int = 0,
        frame_nbytes: int | None = None,
        refuse_state: bool = False,
        want_value: bool = False,
        shape: tuple[int, ...] | None = None,
        row_weights: Tensor | None = None,
    ) -> Staged:
        """Make the next frame without changing any state.

        Args:
            x: any shape, a compressible dtype (any dtype the frame knows for a lossless codec).
            codec: how to code a residual.
            keyframe: send the tensor itself.
            epoch: resets of the group so far.
            frame_nbytes: agreed frame size, padded with zeros; ``None``: no padding.
            refuse_state: say in the frame that this end keeps no history for the site.
            want_value: fill ``Staged.value`` even where the stream keeps no history.
            shape: put this shape into the frame.
            row_weights: how much errors in each row matter, float ``(R,)`` or ``(G, R)``; for a codec that takes them.

        Returns:
            The frame; :meth:`commit` or :meth:`withdraw` it.

        Raises:
            NonFiniteError: ``x`` holds NaN or Inf and a residual was asked for.
            LayoutError: a residual was asked for, and no keyframe of this size and dtype came before it.
        """
        flat = x.detach().reshape(-1)
        if keyframe or codec.lossless:
            header = self._header(flat, codec, epoch, shape)
            return self._stage_key(flat, header, frame_nbytes, refuse_state, want_value)
        return self._stage_residual(flat, codec, epoch, frame_nbytes, want_value, shape, row_weights)

    def _header(
        self,
        flat: Tensor,
        codec: Codec,
        epoch: int,
        shape: tuple[int, ...] | None = None,
        *,
        flags: int = 0,
        payload_nbytes: int = 0,
    ) -> Header:
        return Header(
            codec=codec.fingerprint(),
            key=self.key,
            epoch=epoch,
            sequence=self.sequence,
            payload_nbytes=payload_nbytes,
            numel=flat.numel(),
            dtype=flat.dtype,
            flags=flags,
            shape=shape,
        )

    def _stage_key(
        self, flat: Tensor, header: Header, frame_nbytes: int | None, refuse_state: bool, want_value: bool
    ) -> Staged:
        flags = KEY | (NO_STATE if refuse_state else 0)
        keeps = self.config.remembers and not refuse_state
        if keeps and not bool(torch.isfinite(flat).all()):
            flags |= NONFINITE
            keeps = False
        payload = raw_payload(flat)
        header = replace(header, flags=flags, payload_nbytes=payload.numel())
        value = _own(flat) if keeps or want_value else None
        exact = _own(flat) if keeps and self._own_predictor is not None else None
        return Staged(pack(header, payload, frame_nbytes), header, value, (), exact)

    def _stage_residual(
        self,
        flat: Tensor,
        codec: Codec,
        epoch: int,
        frame_nbytes: int | None,
        want_value: bool,
        shape: tuple[int, ...] | None,
        row_weights: Tensor | None,
    ) -> Staged:
        if self.live != (flat.numel(), flat.dtype):
            raise LayoutError(f"{self.where}: a residual needs a keyframe of the same size and dtype before it")
        form = self._form
        if form is None or form.codec is not codec:
            form = self.form(codec, flat.device)
        session, header, own = form.session, form.head.header, self._own_predictor
        if shape is None:
            head = form.head.filled(epoch, self.sequence)
        else:
            header = replace(header, epoch=epoch, sequence=self.sequence, shape=shape)
            head = header_bytes(header)
        start, end = len(head), len(head) + session.payload_nbytes
        frame = torch.empty(frame_nbytes or end, dtype=torch.uint8, device=flat.device)
        payload = frame[start:end]
        if frame_nbytes is not None and frame_nbytes > end:
            frame[end:].zero_()
        terms = self.predictor.terms()
        value = None
        if want_value or self._remembers:
            spares = self._spares or Spares()
            value = spares.take(flat)
        # an open-loop sender's prediction is not the receiver's: encode against its own, decode with the receiver's
        expected, out = (terms, value) if own is None else (own.terms(), None)
        try:
            session.encode(flat, expected, out, payload, row_weights=row_weights)
        except NonFiniteError as error:
            session.rollback()
            if not bool(torch.isfinite(flat).all()):
                raise NonFiniteError(f"{self.where}: {error}") from None
            # the difference of huge finite values left float32: send what float32 holds, the next frame sends the rest
            out = None
            session.encode(_bounded(residual_of(flat, expected)), (), None, payload, row_weights=row_weights)
        except BaseException:
            session.rollback()
            raise
        if value is not None and out is None:
            session.decode(payload, terms, value)
        staged = Staged(frame, header, value, terms, None if own is None else _own(flat), session=session)
        if not self._searched and not header.layout:
            self._search(staged, residual_of(flat, expected), epoch)
        else:
            write_head(frame, head)
        return staged

    def _search(self, staged: Staged, residual: Tensor, epoch: int) -> None:
        """Look for a better matrix view in the first residual, and announce it in its frame."""
        found = find_view(_bounded(residual))
        assert self.view is not None
        staged.searched = True
        header = replace(staged.header, epoch=epoch, sequence=self.sequence)
        if found.shape != self.view.shape:
            staged.next_view = found
            header = replace(header, next_groups=found.groups, next_channels=found.channels)
        staged.header = header
        write_head(staged.frame, header_bytes(header))

    def stage_or_flag(
        self,
        x: Tensor,
        codec: Codec,
        *,
        keyframe: bool,
        epoch: int,
        frame_nbytes: int,
        refuse_state: bool = False,
        want_value: bool = False,
    ) -> tuple[Staged, NonFiniteError | None]:
        """As ``stage``, but a tensor that is not finite gives a flagged frame: peers wait for one of the agreed size.

        Returns:
            The frame, and the error to raise once the frame is on its way, or ``None``.
        """
        flat = x.detach().reshape(-1)
        if keyframe or codec.lossless:
            header = self._header(flat, codec, epoch)
            return self._stage_key(flat, header, frame_nbytes, refuse_state, want_value), None
        try:
            return self._stage_residual(flat, codec, epoch, frame_nbytes, want_value, None, None), None
        except NonFiniteError as error:
            # a traceback would keep the caller's tensors and works alive
            error.__context__ = error.__cause__ = None
            failure = error.with_traceback(None)
        header = self._header(flat, codec, epoch, flags=NONFINITE)
        return Staged(pack(header, flat.new_empty(0, dtype=torch.uint8), frame_nbytes), header), failure

    def stage_stateless(self, x: Tensor, codec: Codec, *, epoch: int) -> Staged:
        """A frame of the tensor itself that touches no history (a pass-through the receiver cannot foresee)."""
        payload = raw_payload(x)
        header = self._header(x, codec, epoch, flags=STATELESS, payload_nbytes=payload.numel())
        return Staged(pack(header, payload), header)

    def withdraw(self, staged: Staged) -> None:
        """Undo ``stage``: the frame will not be sent and leaves no trace in the stream."""
        if staged.session is not None:
            staged.session.rollback()

    def commit(self, staged: Staged, hint: MatrixView | None = None) -> None:
        """Make the state change that the receiver makes when it decodes the frame.

        Args:
            staged: the frame, which is on its way.
            hint: matrix view that a layout hint gives the stream when it starts.
        """
        header = staged.header
        flags = header.flags
        if flags & STATELESS:
            return
        self.sequence += 1
        if flags & (NONFINITE | NO_STATE):
            self.drop()
            return
        if flags & KEY:
            self.start(header.numel, header.dtype, hint)
            if self.relay is not None:
                self.relay.owes_key = False
        if staged.searched:
            self._searched = True
        if staged.value is not None:
            unused = self.predictor.advance(staged.value, staged.terms)
            if unused is not None and self._spares is not None:
                self._spares.give(unused)
        if self._own_predictor is not None and staged.exact is not None:
            self._own_predictor.advance(staged.exact, ())
        if staged.session is not None and staged.session.remembers:
            staged.session.commit()
            staged.session.prepare()
        if staged.next_view is not None:
            self._use(staged.next_view)
