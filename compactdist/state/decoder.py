"""The receiving end of a stream: check the frame, decode, and keep the reconstruction."""

from __future__ import annotations

import torch
from torch import Tensor

from compactdist.codecs.base import Codec, Session
from compactdist.errors import FrameError, NonFiniteError
from compactdist.kernels.spec import MatrixView
from compactdist.state.matrix_view import blocks
from compactdist.state.stream import Changes, StreamConfig, StreamState
from compactdist.wire import (
    KEY,
    NO_STATE,
    NONFINITE,
    STATELESS,
    Header,
    from_raw,
    payload_of,
    raw_nbytes,
    starts_with,
    unpack,
)

__all__ = ["StreamDecoder"]

_RESET = "call reset() on all ranks to start again from keyframes"


class StreamDecoder(StreamState):
    """Decoder of one directed stream inside a group. Callers switch gradients off.

    Attributes:
        refused: the last keyframe said that the sender keeps no history.
        header: of the last frame decoded; in that of a residual, ``epoch`` and ``sequence`` mean nothing.
    """

    __slots__ = ("_torn", "header", "refused")

    def __init__(self, config: StreamConfig, key: int, where: str, changes: Changes | None = None) -> None:
        super().__init__(config, key, where, changes)
        self.refused = False
        self.header: Header | None = None
        self._torn = False

    def decode(
        self,
        frame: Tensor,
        codec: Codec,
        numel: int,
        dtype: torch.dtype,
        *,
        epoch: int = 0,
        hint: MatrixView | None = None,
        refuse_state: bool = False,
    ) -> Tensor:
        """Check a frame against what this stream expects, decode it and move the state on.

        Args:
            frame: 1-D uint8; bytes behind the end of the frame are ignored.
            codec: codes the sender's residuals.
            numel: elements that the frame must hold.
            dtype: of the elements.
            epoch: resets of the group so far.
            hint: matrix view that a layout hint gives the stream when it starts.
            refuse_state: this end keeps no history for the site.

        Returns:
            Flat ``[numel]`` tensor of ``dtype``; it may share memory with ``frame`` or the history: copy it out.

        Raises:
            FrameError: the frame is not the expected one; nothing was applied.
            NonFiniteError: the sender's tensor held NaN or Inf; the stream restarts with a keyframe.
        """
        form = self._form
        if form is not None and form.codec is codec and self.live == (numel, dtype):
            # an expected residual without an announcement: this end can make every byte of its header, and compare
            head = form.head.filled(epoch, self.sequence)
            if form.frame_nbytes <= frame.numel() and frame.stride(0) == 1 and starts_with(frame, head):
                self.header = form.head.header
                payload = frame[len(head) : form.frame_nbytes]
                if payload.storage_offset() % 16:
                    payload = payload.clone()
                return self._take_residual(payload, form.session)
        header = unpack(frame, self.where)
        self._check(header, codec, numel, dtype, epoch, hint)
        self.header = header
        if header.flags & STATELESS:
            return from_raw(payload_of(frame, header), numel, dtype)
        if header.flags & KEY:
            return self._take_key(frame, header, hint, refuse_state)
        if header.flags & NONFINITE:
            self.sequence += 1
            self.drop()
            raise NonFiniteError(
                f"{self.where}: the sender's tensor held NaN or Inf, which a residual cannot carry; no output was "
                "written and this stream restarts with a keyframe. Find the source of the NaN, or let the site pass "
                "through"
            )
        value = self._take_residual(payload_of(frame, header), self.form(codec, frame.device).session)
        self.follow(header.next_groups, header.next_channels)
        return value

    def drop(self) -> None:
        """Forget the history: the next frame is a keyframe."""
        super().drop()
        self._torn = False

    def _take_residual(self, payload: Tensor, session: Session) -> Tensor:
        if self._torn:
            raise FrameError(
                f"{self.where}: an earlier frame was interrupted while it was decoded, so what this end holds is not "
                f"what the sender expects. Nothing was applied; {_RESET}"
            )
        assert self.live is not None
        predictor, (numel, dtype) = self.predictor, self.live
        terms = predictor.terms()
        if terms and predictor.decodes_in_place:
            value = terms[0]
        else:
            value = torch.empty(numel, dtype=dtype, device=payload.device)
        self._torn = True
        session.decode(payload, terms, value)
        predictor.advance(value, terms)
        self.sequence += 1
        self._torn = False
        if session.remembers:
            session.commit()
            session.prepare()
        return value

    def _take_key(self, frame: Tensor, header: Header, hint: MatrixView | None, refuse_state: bool) -> Tensor:
        value = from_raw(payload_of(frame, header), header.numel, header.dtype)
        self.sequence += 1
        self.refused = bool(header.flags & NO_STATE)
        if header.flags & (NONFINITE | NO_STATE) or refuse_state:
            self.drop()
            return value
        self.start(header.numel, header.dtype, hint)
        if self.config.remembers:
            self.predictor.advance(value.clone(), ())
        self._torn = False
        self.follow(header.next_groups, header.next_channels)
        return value

    def _check(
        self,
        header: Header,
        codec: Codec,
        numel: int,
        dtype: torch.dtype,
        epoch: int,
        hint: MatrixView | None,
    ) -> None:
        def wrong(what: str, got: object, expected: object, remedy: str = _RESET) -> FrameError:
            return FrameError(
                f"{self.where}: wrong {what}: the frame says {got}, expected {expected}. Nothing was applied; "
                f"{remedy}. The frame: {header.describe()}"
            )

        same_config = "wrap the group with the same configuration on every rank"
        if header.key != self.key:
            same_order = (
                "make the calls of a step in the same order on both ends, or name them with key(); then " + _RESET
            )
            raise wrong("key", f"{header.key:016x}", f"{self.key:016x}", same_order)
        if header.epoch != epoch:
            raise wrong("epoch", header.epoch, epoch)
        if (header.numel, header.dtype) != (numel, dtype):
            same_tensor = "send and receive tensors of the same size and dtype"
            raise wrong("size", f"{header.numel} x {header.dtype}", f"{numel} x {dtype}", same_tensor)
        if header.codec != codec.fingerprint():
            raise wrong("codec", f"{header.codec:08x}", f"{codec.fingerprint():08x} ({codec!r})", same_config)
        if not header.flags & STATELESS and header.sequence != self.sequence:
            raise wrong("sequence", header.sequence, self.sequence)
        if header.flags & (STATELESS | KEY):
            size = raw_nbytes(numel, dtype)
        elif header.flags & NONFINITE:
            size = 0
        else:
            if self.is_fresh(numel, dtype):
                raise wrong("kind", "a residual", "a keyframe, for this end holds no history")
            view = self.view or hint or blocks(numel)
            got = (header.groups, header.rows, header.channels, header.layout)
            expected = (*view.shape, view.hint)
            if got != expected:
                raise wrong("layout", got, expected, same_config)
            size = codec.payload_nbytes(view.shape, torch.float32)
        if header.payload_nbytes != size:
            raise wrong("payload size", header.payload_nbytes, size, same_config)
        if header.flags & NO_STATE and not header.flags & KEY:
            raise wrong("flags", "no-state without key", "no-state on keyframes only", same_config)
        per_row = header.next_groups * header.next_channels
        announces = bool(header.next_groups or header.next_channels)
        if announces and (per_row == 0 or numel % per_row):
            next_view = f"{header.next_groups} groups of rows of {header.next_channels}"
            raise wrong("announced view", next_view, f"a divisor of {numel} elements", same_config)
