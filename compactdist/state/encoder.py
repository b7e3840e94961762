"""The sending end of a stream: residual, payload, frame, and the same state change the receiver will make."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from compactdist.codecs import Codec
from compactdist.errors import LayoutError, NonFiniteError
from compactdist.state.find_view import find_view
from compactdist.state.matrix_view import MatrixView
from compactdist.state.quantized_history import make_history
from compactdist.state.relay import Relay, stop_sharing
from compactdist.state.staged import Staged
from compactdist.state.stream import Memory, Spares, StreamConfig, StreamState
from compactdist.wire import KEY, NO_STATE, NONFINITE, STATELESS, Header, empty_frame, pack, raw_payload, seal

__all__ = ["Staged", "StreamEncoder"]


def _references_of_a_fresh_object() -> int:
    """What ``getrefcount`` says of a local that nobody else holds: 2, or less where calls borrow (Python 3.14)."""
    fresh = object()
    return sys.getrefcount(fresh)


_UNSHARED = _references_of_a_fresh_object()


def _own(flat: Tensor) -> Tensor:
    """A copy of the caller's values with plain strides."""
    return flat.clone(memory_format=torch.contiguous_format)


def _bounded(residual: Tensor) -> Tensor:
    """The residual with infinity cut to the largest float32; a copy, for without prediction it is the caller's."""
    limit = torch.finfo(torch.float32).max
    return residual.clamp(-limit, limit)


class StreamEncoder(StreamState):
    """Encoder of one directed stream inside a group: stages a frame, and commits once it is on its way."""

    __slots__ = ("_memory", "_open_loop", "_searched", "_spares", "relay")

    def __init__(self, config: StreamConfig, key: int, where: str, spares: Spares | None = None) -> None:
        super().__init__(config, key, where)
        self._searched = False
        self._memory: Memory | None = None
        self.relay: Relay | None = None
        self._spares = spares
        open_loop = config.order > 0 and not config.closed_loop
        self._open_loop = make_history(config.order, config.damping, config.state) if open_loop else None

    @property
    def state_bytes(self) -> int:
        """Bytes of tensors held; an open-loop sender's true values and the codec's memory included.

        A history that is another stream's counts there.
        """
        shared = self.relay is not None and self.relay.shared
        held = (0 if shared else self.history.state_bytes) + (self._memory.nbytes if self._memory else 0)
        return held + (self._open_loop.state_bytes if self._open_loop else 0)

    def drop(self) -> None:
        """Forget the history: the next frame is a keyframe."""
        if self.relay is not None:
            stop_sharing(self, self.relay)
            self.relay.source, self.relay.owes_key = None, False
        super().drop()
        self._searched = False
        self._memory = None
        if self._open_loop is not None:
            self._open_loop.clear()

    @torch.no_grad()
    def stage(
        self,
        x: Tensor,
        codec: Codec,
        *,
        keyframe: bool,
        epoch: int = 0,
        hint: MatrixView | None = None,
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
            hint: view to start with, from a layout hint.
            frame_nbytes: agreed frame size; ``None`` for the natural one.
            refuse_state: say in the frame that this end keeps no history for the site.
            want_value: fill ``Staged.value`` even where the stream keeps no history.
            shape: put this shape into the frame.
            row_weights: for a codec that takes them.

        Raises:
            NonFiniteError: ``x`` holds NaN or Inf and a residual was asked for.
        """
        flat = x.detach().reshape(-1)
        numel, dtype = flat.numel(), flat.dtype
        header = Header(
            codec=codec.fingerprint(),
            key=self.key,
            epoch=epoch,
            sequence=self.sequence,
            payload_nbytes=0,
            numel=numel,
            dtype=dtype,
            shape=shape,
        )
        if keyframe or codec.lossless:
            return self._stage_key(flat, header, frame_nbytes, refuse_state, want_value)
        if self.is_fresh(numel, dtype) or self.view is None:
            raise LayoutError(f"{self.where}: a residual needs a keyframe of the same size and dtype before it")
        extra: dict[str, Any] = {} if row_weights is None else {"row_weights": row_weights}
        return self._stage_residual(flat, codec, header, frame_nbytes, want_value, extra)

    def _stage_key(
        self, flat: Tensor, header: Header, frame_nbytes: int | None, refuse_state: bool, want_value: bool
    ) -> Staged:
        flags = KEY | (NO_STATE if refuse_state else 0)
        keeps = self.config.order > 0 and not refuse_state
        if keeps and not bool(torch.isfinite(flat).all()):
            flags |= NONFINITE
            keeps = False
        payload = raw_payload(flat)
        header = replace(header, flags=flags, payload_nbytes=payload.numel())
        value = _own(flat) if keeps or want_value else None
        exact = _own(flat) if keeps and self._open_loop is not None else None
        return Staged(pack(header, payload, frame_nbytes), value, header, exact)

    def _stage_residual(
        self,
        flat: Tensor,
        codec: Codec,
        header: Header,
        frame_nbytes: int | None,
        want_value: bool,
        extra: dict[str, Any],
    ) -> Staged:
        view = self.view
        assert view is not None
        # an open-loop sender predicts from other values than the receiver, and has two steps to take
        source, closed = (self.history, True) if self._open_loop is None else (self._open_loop, False)
        nbytes = codec.payload_nbytes(view.shape, torch.float32)
        frame, payload = empty_frame(header.nbytes, nbytes, frame_nbytes, flat.device)
        spares = self._spares or Spares()
        scratch = spares.take(flat) if source.needs_scratch else None
        value = None
        if self.config.order > 0 or want_value:
            value = spares.take(flat)
        reconstructed = value if closed else None
        memory = self._recall(codec, view)
        extra.update(payload_out=payload, memory=memory.entries)
        try:
            base = source.read(scratch)
            codec.encode_residual(flat, base, view, reconstructed, velocity=source.velocity, **extra)
        except NonFiniteError as error:
            if not bool(torch.isfinite(flat).all()):
                raise NonFiniteError(f"{self.where}: {error}") from None
            # two huge finite values: send as much of the change as float32 holds, the next frame brings the rest
            memory, reconstructed = self._recall(codec, view), None
            extra.update(memory=memory.entries)
            codec.encode_residual(_bounded(source.residual(flat)), None, view, **extra)
        finally:
            if scratch is not None:
                spares.give(scratch)
        if value is not None and reconstructed is None:
            self.history.reconstruct(payload, codec, view, value)
        found = None
        search = self.config.find_layout and not view.hint and not self._searched
        if search:
            found = find_view(_bounded(source.residual(flat)))
            if found.shape == view.shape:
                found = None
        header = replace(
            header,
            payload_nbytes=nbytes,
            layout=view.hint,
            groups=view.groups,
            rows=view.rows,
            channels=view.channels,
            next_groups=found.groups if found else 0,
            next_channels=found.channels if found else 0,
        )
        exact = _own(flat) if self._open_loop is not None else None
        return Staged(seal(frame, header), value, header, exact, found, search, memory)

    def _recall(self, codec: Codec, view: MatrixView) -> Memory:
        """What the codec may change: a copy, for a frame that was only staged must change nothing."""
        held = self._memory
        known = held is not None and held.codec == codec and held.view == view
        return Memory(codec, view, dict(held.entries) if held is not None and known else {})

    def stage_or_flag(
        self,
        x: Tensor,
        codec: Codec,
        *,
        keyframe: bool,
        epoch: int,
        frame_nbytes: int,
        hint: MatrixView | None = None,
        refuse_state: bool = False,
        want_value: bool = False,
    ) -> tuple[Staged, NonFiniteError | None]:
        """As ``stage``, but a tensor that is not finite still gives a frame: others wait for one of the agreed size.

        Returns:
            The frame, and the error to raise once it is on its way.
        """
        try:
            return self.stage(
                x,
                codec,
                keyframe=keyframe,
                epoch=epoch,
                hint=hint,
                frame_nbytes=frame_nbytes,
                refuse_state=refuse_state,
                want_value=want_value,
            ), None
        except NonFiniteError as error:
            # the frames it came through would keep the caller's tensors and works alive
            error.__context__ = error.__cause__ = None
            failure = error.with_traceback(None)
        return self._flag(x, codec, epoch, frame_nbytes), failure

    @torch.no_grad()
    def _flag(self, x: Tensor, codec: Codec, epoch: int, frame_nbytes: int) -> Staged:
        """A frame of the agreed size that says: the tensor was not finite, forget this stream."""
        flat = x.detach().reshape(-1)
        header = Header(
            codec=codec.fingerprint(),
            key=self.key,
            epoch=epoch,
            sequence=self.sequence,
            payload_nbytes=0,
            numel=flat.numel(),
            dtype=flat.dtype,
            flags=NONFINITE,
        )
        frame = pack(header, torch.empty(0, dtype=torch.uint8, device=flat.device), frame_nbytes)
        return Staged(frame, None, header)

    @torch.no_grad()
    def stage_stateless(self, x: Tensor, codec: Codec, *, epoch: int) -> Staged:
        """A frame of the tensor itself that touches no history (a pass-through the receiver cannot foresee)."""
        payload = raw_payload(x)
        header = Header(
            codec=codec.fingerprint(),
            key=self.key,
            epoch=epoch,
            sequence=self.sequence,
            payload_nbytes=payload.numel(),
            numel=x.numel(),
            dtype=x.dtype,
            flags=STATELESS,
        )
        return Staged(pack(header, payload), None, header)

    @torch.no_grad()
    def commit(self, staged: Staged, hint: MatrixView | None = None) -> None:
        """Make the state change that the receiver makes when it decodes the frame."""
        header = staged.header
        if header.flags & STATELESS:
            return
        self.sequence += 1
        if header.flags & (NONFINITE | NO_STATE):
            self.drop()
            return
        if header.flags & KEY:
            self.start(header.numel, header.dtype, hint)
            if self.relay is not None:
                self.relay.owes_key = False
        self._searched = self._searched or staged.searched
        if staged.value is not None:
            last = self.history.advance(staged.value)
            # with more references than a fresh object has, someone still reads the old reconstruction
            if self._spares is not None and last is not None and sys.getrefcount(last) <= _UNSHARED:
                self._spares.give(last)
        if self._open_loop is not None and staged.exact is not None:
            self._open_loop.advance(staged.exact)
        if staged.memory is not None:
            self._memory = staged.memory
        if staged.next_view is not None:
            self.view, self._memory = staged.next_view, None
