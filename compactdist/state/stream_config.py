"""How a stream predicts and corrects, and what codes its keyframes."""

from __future__ import annotations

import struct
from dataclasses import dataclass, fields
from typing import Any

import torch

from compactdist import codecs
from compactdist.codecs.base import Codec
from compactdist.errors import ConfigError, UnknownCodecError
from compactdist.kernels.spec import MatrixView
from compactdist.state.history import Order, Predictor, predictor_class
from compactdist.state.matrix_view import blocks
from compactdist.state.quantized_history import STATE_FORMS, StateForm, make_predictor, state_copy_nbytes
from compactdist.wire import raw_nbytes

__all__ = ["COMPRESSIBLE_DTYPES", "DEFAULT_KEYFRAME", "StreamConfig", "keyframe_codec", "saves", "state_nbytes"]

_DAMPING = 0.5
_FLOAT32 = struct.Struct("<f")

DEFAULT_KEYFRAME = "int8"
"""Id of the codec of keyframes, wherever none is named."""

_DEFAULT_KEYFRAME = codecs.get(DEFAULT_KEYFRAME)

COMPRESSIBLE_DTYPES = frozenset({torch.float32, torch.float16, torch.bfloat16})


@dataclass(frozen=True, slots=True)
class StreamConfig:
    """How a stream predicts and corrects. Part of the group's fingerprint.

    Attributes:
        order: 0 no prediction, 1 last value, 2 last value plus damped velocity; ``"auto"``: last value plus a share of
            the last change that the sender chooses for every frame (:mod:`compactdist.state.adaptive`).
        damping: factor of the velocity for order 2, 0.5 if ``None``. At one bit the loop is stable only below about
            0.56 (q * ((1 + g)^2 + g^2) < 1 with the codec's error ratio q). ``None`` for the other orders.
        error_feedback: residuals are taken against what the receiver holds, so that errors are corrected by the next
            frame. ``None``: on wherever there is a prediction. Off is the open loop of the method's ablation, which
            drifts.
        warmup_steps: steps after a reset during which every frame is a keyframe.
        find_layout: search the matrix view of buffers without a layout hint on the first residual.
        state: what both ends keep of the last reconstruction (and velocity): ``"exact"``, in the tensor's dtype;
            ``"int8"`` or ``"fp8"`` (E4M3), one byte for each element and a bfloat16 scale for every 128. What the
            rounding loses is part of the next residual. Without effect at order 0, which keeps nothing.
        keyframe: codes keyframes, in the matrix view of the layout hint or, without one, in blocks of consecutive
            elements; ``None``: they carry the tensor's own bytes. Those of tensors too small to gain by it, and of a
            lossless codec's streams, do so in any case.

    Raises:
        ConfigError: a value is out of range, error feedback is asked for without prediction, or damping without
            velocity.
    """

    order: Order = 1
    damping: float | None = None
    error_feedback: bool | None = None
    warmup_steps: int = 1
    find_layout: bool = True
    state: StateForm = "exact"
    keyframe: Codec | None = _DEFAULT_KEYFRAME

    def __repr__(self) -> str:
        later = ("damping", "state")  # shown where they differ from the default
        shown = [f.name for f in fields(self) if f.name not in later or getattr(self, f.name) != f.default]
        return f"StreamConfig({', '.join(f'{name}={getattr(self, name)!r}' for name in shown)})"

    def __post_init__(self) -> None:
        if self.state not in STATE_FORMS:
            raise ConfigError(f"state must be one of {', '.join(map(repr, STATE_FORMS))}, got {self.state!r}")
        if self.damping is None and self.predictor.damped:
            object.__setattr__(self, "damping", _DAMPING)
        if self.damping is not None:
            if not 0 <= self.damping <= 1:
                raise ConfigError(f"damping must lie in [0, 1], got {self.damping!r}")
            if not self.predictor.damped:
                raise ConfigError(
                    f"damping={self.damping!r} damps the velocity of order 2, and order={self.order!r} takes none: use "
                    "order=2, or leave damping out"
                )
            object.__setattr__(self, "damping", float(self.damping))
        if isinstance(self.warmup_steps, bool) or not isinstance(self.warmup_steps, int) or self.warmup_steps < 0:
            raise ConfigError(f"warmup_steps must be an integer >= 0, got {self.warmup_steps!r}")
        if self.keyframe is not None and self.keyframe.lossless:
            raise ConfigError(f"keyframe={self.keyframe!r} is lossless: leave it None for the tensor's own bytes")
        if self.error_feedback and not self.remembers:
            raise ConfigError("error_feedback=True needs a prediction to correct: use order=1 or 2, or leave it None")

    def keyframe_for(self, codec: Codec, numel: int, dtype: torch.dtype) -> Codec | None:
        """Codes the keyframes of such tensors on a stream with this codec; ``None``: they carry the tensors' own bytes.

        A keyframe is coded only where blocks of consecutive elements make it smaller, which scales can prevent in
        tensors of a few hundred elements. Both ends tell it from the size alone, whatever a layout hint says.
        """
        coded = self.keyframe
        if codec.lossless or coded is None:
            return None
        return coded if saves(coded, blocks(numel), dtype) else None

    @property
    def predictor(self) -> type[Predictor]:
        """The predictor class of ``order``."""
        return predictor_class(self.order)

    @property
    def remembers(self) -> bool:
        """Whether streams keep anything between two frames."""
        return self.predictor.copies > 0

    @property
    def open_loop(self) -> bool:
        """Whether the sender predicts from its own values, not from what the receiver holds."""
        return self.remembers and self.error_feedback is False

    @property
    def remembers_values(self) -> bool:
        """Whether a decoder's history holds the exact bytes of the tensor it decoded last."""
        return self.remembers and self.state == "exact"

    @property
    def coefficient(self) -> float:
        """The predictor's coefficient as frames carry it, a float32; 0 where it has none."""
        return float(_FLOAT32.unpack(_FLOAT32.pack(self.damping or 0.0))[0])

    def new_predictor(self) -> Predictor:
        """An empty predictor."""
        return make_predictor(self.order, self.damping or 0.0, self.state)


def saves(coded: Codec, view: MatrixView, dtype: torch.dtype) -> bool:
    """Whether a payload of such a tensor is smaller than the tensor's own bytes."""
    return coded.payload_nbytes(view.shape, torch.float32) < raw_nbytes(view.numel, dtype)


def keyframe_codec(keyframe: str | dict[str, Any] | Codec) -> Codec | None:
    """The codec of keyframes as :class:`StreamConfig` has it, from an id, a configuration or a codec.

    Raises:
        UnknownCodecError, CodecConfigError: there is no such codec.
    """
    try:
        codec = codecs.get(keyframe)
    except UnknownCodecError as error:
        raise UnknownCodecError(f"keyframe={keyframe!r}: {error}. With 'raw' keyframes are not coded") from None
    return None if codec.lossless else codec


def state_nbytes(config: StreamConfig, numel: int, dtype: torch.dtype, *, sender: bool) -> int:
    """Bytes of history that one end of a stream will hold for tensors of this size.

    The memory of the codec's session is not included, for it depends on the matrix view found later: a few hundredths
    of the history, or with ``transform`` 260 bytes for each channel (``Codec.memory_nbytes``). ``state_bytes`` includes
    it. An open-loop sender keeps the true values beside the receiver's reconstruction.
    """
    copies = config.predictor.copies * (2 if sender and config.open_loop else 1)
    return copies * state_copy_nbytes(config.state, numel, dtype)
