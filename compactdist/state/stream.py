"""What encoder and decoder of one directed stream share: configuration, history, view and frame sizes.

Both ends move through the same sequence of :class:`StreamState` values. Everything a frame's size depends on is here,
so that either end can tell the size of the next frame before it arrives.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from compactdist.codecs import Codec
from compactdist.errors import ConfigError
from compactdist.state.matrix_view import MatrixView, blocks, plain
from compactdist.state.quantized_history import STATE_FORMS, StateForm, make_history, state_copy_nbytes
from compactdist.wire import HEADER_NBYTES, SHAPE_NBYTES, raw_nbytes

__all__ = ["COMPRESSIBLE_DTYPES", "Memory", "Spares", "StreamConfig", "StreamState"]

COMPRESSIBLE_DTYPES = frozenset({torch.float32, torch.float16, torch.bfloat16})


@dataclass(frozen=True, slots=True)
class StreamConfig:
    """How a stream predicts and corrects. Part of the group's fingerprint.

    Attributes:
        order: 0 no prediction, 1 last value, 2 last value plus damped velocity.
        damping: factor of the velocity for order 2. At one bit the loop is stable only below about 0.56
            (q * ((1 + g)^2 + g^2) < 1 with the codec's error ratio q).
        error_feedback: residuals are taken against what the receiver holds, so that errors are corrected by the next
            frame. ``None``: on wherever there is a prediction. Off is the open loop of the method's ablation, which
            drifts.
        warmup_steps: steps after a reset during which every frame is a keyframe.
        find_layout: search the matrix view of buffers without a layout hint on the first residual.
        state: what both ends keep of the last reconstruction (and velocity): ``"exact"``, in the tensor's dtype;
            ``"int8"`` or ``"fp8"`` (E4M3), one byte for each element and a bfloat16 scale for every 128. What the
            rounding loses is part of the next residual. Without effect at order 0, which keeps nothing.

    Raises:
        ConfigError: a value is out of range, or error feedback is asked for without prediction.
    """

    order: int = 1
    damping: float = 0.5
    error_feedback: bool | None = None
    warmup_steps: int = 1
    find_layout: bool = True
    state: StateForm = "exact"

    def __repr__(self) -> str:
        # groups compare this text; without ``state`` it is that of versions that had no such option
        shown = [name for name in (f.name for f in fields(self)) if name != "state" or self.state != "exact"]
        return f"StreamConfig({', '.join(f'{name}={getattr(self, name)!r}' for name in shown)})"

    def __post_init__(self) -> None:
        if self.state not in STATE_FORMS:
            raise ConfigError(f"state must be one of {', '.join(map(repr, STATE_FORMS))}, got {self.state!r}")
        if self.order not in (0, 1, 2):
            raise ConfigError(f"order must be 0, 1 or 2, got {self.order!r}")
        if not 0 <= self.damping <= 1:
            raise ConfigError(f"damping must lie in [0, 1], got {self.damping!r}")
        if isinstance(self.warmup_steps, bool) or not isinstance(self.warmup_steps, int) or self.warmup_steps < 0:
            raise ConfigError(f"warmup_steps must be an integer >= 0, got {self.warmup_steps!r}")
        if self.error_feedback and self.order == 0:
            raise ConfigError("error_feedback=True needs a prediction to correct: use order=1 or 2, or leave it None")

    @property
    def closed_loop(self) -> bool:
        """Whether residuals are taken against the reconstruction."""
        return self.order > 0 and self.error_feedback is not False


@dataclass(frozen=True, slots=True)
class Memory:
    """What a codec wants to know again (``memory`` of ``Codec.encode_residual``), and about what."""

    codec: Codec
    view: MatrixView
    entries: dict[str, Any]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors in it."""
        return sum(entry.nbytes for entry in self.entries.values() if isinstance(entry, Tensor))


class Spares:
    """Buffers that reconstructions are written to: at most one of each size, shared by the streams of a group.

    A sender writes the next reconstruction beside the last one, for a frame that was only staged must change nothing;
    when the frame is committed the two change places.
    """

    def __init__(self) -> None:
        self._held: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers that lie ready."""
        return sum(held.nbytes for held in tuple(self._held.values()))

    def take(self, like: Tensor) -> Tensor:
        """A flat buffer as large as ``like``, with anything in it."""
        held = self._held.pop((like.numel(), like.dtype, like.device), None)
        return torch.empty(like.numel(), dtype=like.dtype, device=like.device) if held is None else held

    def give(self, buffer: Tensor) -> None:
        """Take back a buffer that nobody reads any more."""
        self._held[buffer.numel(), buffer.dtype, buffer.device] = buffer

    def clear(self) -> None:
        """Let go of all buffers."""
        self._held.clear()


class StreamState:
    """One end of a directed stream.

    Attributes:
        history: what the receiving end holds; the sending end keeps the same.
        live: (numel, dtype) the history is about; ``None`` while the stream is empty.
        sequence: frames so far in this epoch; counts on when the history is dropped, so that a repeated or lost
            keyframe is noticed as well.
        view: how residuals are cut; ``None`` until the stream is live.
        where: call site and ranks, for error messages.
    """

    __slots__ = ("config", "history", "key", "live", "sequence", "view", "where")

    def __init__(self, config: StreamConfig, key: int, where: str) -> None:
        self.config = config
        self.key = key
        self.where = where
        self.history = make_history(config.order, config.damping, config.state)
        self.live: tuple[int, torch.dtype] | None = None
        self.sequence = 0
        self.view: MatrixView | None = None

    @property
    def state_bytes(self) -> int:
        """Bytes of tensors held by this end."""
        return self.history.state_bytes

    def is_fresh(self, numel: int, dtype: torch.dtype) -> bool:
        """Whether the next frame of such a tensor has nothing to refer to and must be a keyframe."""
        return self.live != (numel, dtype)

    def frame_nbytes(
        self, codec: Codec, numel: int, dtype: torch.dtype, *, keyframe: bool, with_shape: bool = False
    ) -> int:
        """Bytes of the next frame, header included."""
        head = HEADER_NBYTES + (SHAPE_NBYTES if with_shape else 0)
        if keyframe or codec.lossless:
            return head + raw_nbytes(numel, dtype)
        view = self.view if not self.is_fresh(numel, dtype) else None
        shape = (view or blocks(numel)).shape
        return head + codec.payload_nbytes(shape, torch.float32)

    def start(self, numel: int, dtype: torch.dtype, hint: MatrixView | None) -> None:
        """Make the stream live for tensors of this size, as its first keyframe does."""
        if self.is_fresh(numel, dtype):
            self.drop()
            self.live = (numel, dtype)
            self.view = hint or blocks(numel)

    def follow(self, groups: int, channels: int) -> None:
        """Use an announced matrix view from the next frame on (0, 0: no change)."""
        if channels and self.live is not None:
            self.view = plain(self.live[0], groups, channels)

    def drop(self) -> None:
        """Forget the history: the next frame is a keyframe."""
        self.history.clear()
        self.live = None
        self.view = None


def state_nbytes(config: StreamConfig, numel: int, dtype: torch.dtype, *, sender: bool) -> int:
    """Bytes of history one end of a stream will hold for tensors of this size.

    What a codec's encoder remembers for itself is not in it: it is a few hundredths of the history, depends on the
    view found later, and budgets are about what both ends have to agree to keep. ``state_bytes`` counts it.
    An open-loop sender keeps the true values beside the receiver's reconstruction.
    """
    copies = config.order
    if sender and config.order > 0 and not config.closed_loop:
        copies *= 2
    return copies * state_copy_nbytes(config.state, numel, dtype)
