"""The receiving end of a stream: check the frame, decode, and keep the reconstruction."""

from __future__ import annotations

import torch
from torch import Tensor

from compactdist.codecs import Codec
from compactdist.errors import FrameError, NonFiniteError
from compactdist.state.matrix_view import MatrixView, blocks
from compactdist.state.stream import StreamConfig, StreamState
from compactdist.wire import KEY, NO_STATE, NONFINITE, STATELESS, Header, from_raw, payload_of, raw_nbytes, unpack

__all__ = ["StreamDecoder"]

_RESET = "call reset() on all ranks to start again from keyframes"


class StreamDecoder(StreamState):
    """Decoder of one directed stream inside a group.

    Attributes:
        refused: the last keyframe said that the sender keeps no history.
        header: of the last frame decoded.
    """

    __slots__ = ("header", "refused")

    def __init__(self, config: StreamConfig, key: int, where: str) -> None:
        super().__init__(config, key, where)
        self.refused = False
        self.header: Header | None = None

    @torch.no_grad()
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
            frame: 1-D uint8; may be longer than the frame in it.
            codec: how the sender codes residuals.
            numel: elements to come.
            dtype: of the elements.
            epoch: resets of the group so far.
            hint: view to start with, from a layout hint.
            refuse_state: this end keeps no history for the site.

        Returns:
            Flat ``[numel]`` tensor of ``dtype``; it may share memory with ``frame`` or the history: copy it out.

        Raises:
            FrameError: the frame is not the expected one; nothing was applied.
            NonFiniteError: the sender's tensor held NaN or Inf; the stream restarts with a keyframe.
        """
        header = unpack(frame, self.where)
        self._check(header, codec, numel, dtype, epoch, hint)
        payload = payload_of(frame, header)
        self.header = header
        if header.flags & STATELESS:
            return from_raw(payload, numel, dtype)
        if header.flags & KEY:
            return self._take_key(header, payload, numel, dtype, hint, refuse_state)
        if header.flags & NONFINITE:
            self.sequence += 1
            self.drop()
            raise NonFiniteError(
                f"{self.where}: the sender's tensor held NaN or Inf, which a residual cannot carry; no output was "
                "written and this stream restarts with a keyframe. Find the source of the NaN, or let the site pass "
                "through"
            )
        view = self.view
        assert view is not None
        base = self.history.read(None)
        # in place, unless the last value is needed for the velocity
        value = torch.empty(numel, dtype=dtype, device=frame.device) if base is None or self.config.order > 1 else base
        self.history.reconstruct(payload, codec, view, value, base)
        self.history.advance(value)
        self.sequence += 1
        self.follow(header.next_groups, header.next_channels)
        return value

    def _take_key(
        self,
        header: Header,
        payload: Tensor,
        numel: int,
        dtype: torch.dtype,
        hint: MatrixView | None,
        refuse_state: bool,
    ) -> Tensor:
        value = from_raw(payload, numel, dtype)
        self.sequence += 1
        self.refused = bool(header.flags & NO_STATE)
        if header.flags & (NONFINITE | NO_STATE) or refuse_state:
            self.drop()
            return value
        self.start(numel, dtype, hint)
        if self.config.order > 0:
            self.history.advance(value.clone())
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
