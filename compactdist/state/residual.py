"""The residual loop for one stream of tensors, without any process group."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from compactdist import codecs
from compactdist.codecs import Codec
from compactdist.codecs.base import undisturbed
from compactdist.errors import CodecConfigError, ConfigError, FrameError
from compactdist.state.decoder import StreamDecoder
from compactdist.state.encoder import StreamEncoder
from compactdist.state.history import Order
from compactdist.state.matrix_view import Layout
from compactdist.state.quantized_history import StateForm
from compactdist.state.rate import RateControl
from compactdist.state.staged import Wanted
from compactdist.state.stream_config import COMPRESSIBLE_DTYPES, DEFAULT_KEYFRAME, StreamConfig, keyframe_codec
from compactdist.state.target import STEERED, Met, Target, check_steered
from compactdist.wire import stream_fingerprint, unpack

__all__ = ["ResidualDecoder", "ResidualEncoder"]


_WHERE = "stand-alone stream"
_NO_STEP = -1


def codec_for(codec: str | dict[str, Any] | Codec | None, target: str | Target | None) -> Codec:
    """The codec of a stream with or without a target.

    Raises:
        ConfigError: a codec with just one rate cannot follow a target, or the target is none.
    """
    if target is None:
        return codecs.get("int2" if codec is None else codec)
    chosen, asked = codecs.get(STEERED if codec is None else codec), Target.parse(target)
    check_steered(chosen, asked)
    return chosen


def _fingerprint(config: StreamConfig) -> int:
    return stream_fingerprint("", _WHERE, repr(config))


class ResidualEncoder:
    """Encode successive values of one tensor into frames, without any process group.

    >>> enc, dec = ResidualEncoder("int4"), ResidualDecoder("int4")           # doctest: +SKIP
    >>> x_hat = dec.decode(enc.encode(x))                                     # doctest: +SKIP

    Args:
        codec: id, configuration dictionary or :class:`~compactdist.codecs.Codec`; ``None``: ``int2``, or ``rates`` with
            a target.
        order, damping, error_feedback, warmup_steps, find_layout, state: see :class:`StreamConfig`. The first
            ``warmup_steps`` frames, the first of all, and any frame of another size or dtype are keyframes.
        layout: hint for the matrix view of the flattened tensor; equal on both ends.
        keyframe: codes keyframes; ``"raw"``: they carry the tensor's own bytes, so the first value arrives exactly.
        target: ``"nmse_db=-32"``, ``"bits=1.5"`` or ``"bytes_per_step=2e6"`` (a frame is a step here): the error or the
            size of residual frames that the rates of the codec are chosen for; see
            :class:`~compactdist.state.target.Target`.

    Raises:
        ConfigError, UnknownCodecError: bad arguments.
    """

    def __init__(
        self,
        codec: str | dict[str, Any] | Codec | None = None,
        *,
        order: Order = 1,
        damping: float | None = None,
        error_feedback: bool | None = None,
        warmup_steps: int = 1,
        find_layout: bool = True,
        layout: Layout | None = None,
        state: StateForm = "exact",
        keyframe: str | dict[str, Any] | Codec = DEFAULT_KEYFRAME,
        target: str | Target | None = None,
    ) -> None:
        self.codec = codec_for(codec, target)
        coded = keyframe_codec(keyframe)
        self.config = StreamConfig(order, damping, error_feedback, warmup_steps, find_layout, state, coded)
        self.layout = layout
        self._stream = StreamEncoder(self.config, _fingerprint(self.config), _WHERE)
        self._control = None if target is None else RateControl(Target.parse(target))
        if self._control is not None:
            self._stream.steers = self._control.stream((_WHERE, 0))
        self._epoch = 0
        self._frames = 0

    @undisturbed
    def encode(self, x: Tensor, *, row_weights: Tensor | None = None) -> Tensor:
        """Frame for the next value.

        Args:
            x: any shape of at most eight dimensions; float32, float16 or bfloat16 (any dtype with codec ``raw``).
            row_weights: for a low-rank codec, how much errors in each row of the matrix view matter, ``(R,)`` or
                ``(G, R)``, positive; give a ``layout`` so that you know what the rows are. Keyframes ignore them.

        Returns:
            1-D uint8 frame on ``x``'s device.

        Raises:
            CodecConfigError: the codec does not take this dtype or these weights.
            ConfigError: ``x`` is no tensor, or has more than eight dimensions.
            LayoutError: ``layout`` does not describe a tensor of this size.
            NonFiniteError: ``x`` holds NaN or Inf and a residual is to be sent; nothing has changed.
        """
        if not isinstance(x, Tensor):
            raise ConfigError(f"{_WHERE}: encode() takes a tensor, got {type(x).__name__}")
        if x.dtype not in COMPRESSIBLE_DTYPES and not self.codec.lossless:
            raise CodecConfigError(f"codec {self.codec.codec_id} takes float32, float16 or bfloat16, got {x.dtype}")
        if row_weights is not None and not self.codec.takes_row_weights:
            raise CodecConfigError(
                f"codec {self.codec.codec_id} has no use for row_weights; lowrank and lowrank_int4 have"
            )
        fresh = self._stream.is_fresh(x.numel(), x.dtype)
        keyframe = fresh or self._frames < self.config.warmup_steps
        hint = self.layout.resolve(x.numel()) if self.layout is not None else None
        wanted = Wanted(
            step=_NO_STEP,
            epoch=self._epoch,
            shape=tuple(x.shape),
            row_weights=row_weights,
            hint=hint,
            may_surprise=True,
        )
        staged = self._stream.stage(x, self.codec, wanted, keyframe=keyframe)
        self._stream.commit(staged)
        self._frames += 1
        return staged.frame

    def reset(self) -> None:
        """Forget the history and start a new epoch; do the same on the other end."""
        self._stream.drop()
        self._stream.sequence = 0
        self._epoch += 1
        self._frames = 0
        if self._control is not None:
            self._control.restart()
            self._stream.steers = self._control.stream((_WHERE, 0))

    @property
    def met(self) -> Met | None:
        """What came of the target since the last reset; ``None`` without a target."""
        return None if self._control is None else self._control.met()

    @property
    def state(self) -> Tensor | None:
        """What the decoder holds after the last frame: flat ``[numel]``, or ``None``. Do not write to it.

        With a quantized ``state`` this is a new tensor: the last reconstruction, rounded.
        """
        return self._stream.predictor.base

    @property
    def state_bytes(self) -> int:
        """Bytes of tensors held."""
        return self._stream.state_bytes


class ResidualDecoder:
    """Decode what a :class:`~compactdist.state.ResidualEncoder` of the same configuration encoded, in the same order.

    Args:
        codec, order, damping, error_feedback, warmup_steps, find_layout, layout, state, keyframe, target: as given to
            the encoder. Of the target it matters here only whether there is one, where no codec is given.
    """

    def __init__(
        self,
        codec: str | dict[str, Any] | Codec | None = None,
        *,
        order: Order = 1,
        damping: float | None = None,
        error_feedback: bool | None = None,
        warmup_steps: int = 1,
        find_layout: bool = True,
        layout: Layout | None = None,
        state: StateForm = "exact",
        keyframe: str | dict[str, Any] | Codec = DEFAULT_KEYFRAME,
        target: str | Target | None = None,
    ) -> None:
        self.codec = codec_for(codec, target)
        coded = keyframe_codec(keyframe)
        self.config = StreamConfig(order, damping, error_feedback, warmup_steps, find_layout, state, coded)
        self.layout = layout
        self._stream = StreamDecoder(self.config, _fingerprint(self.config), _WHERE)
        self._epoch = 0

    @undisturbed
    def decode(self, frame: Tensor) -> Tensor:
        """The value in a frame, in the shape and dtype the encoder was given; yours to keep and to change.

        Raises:
            FrameError: not the frame that this end expects (lost, repeated, reordered, damaged, another configuration);
                nothing was applied.
            LayoutError: ``layout`` does not describe a tensor of this size.
        """
        header = unpack(frame, self._stream.where)
        if header.shape is None:
            raise FrameError(f"{self._stream.where}: the frame carries no shape; it was made for a process group")
        if math.prod(header.shape) != header.numel or header.numel >= 1 << 63:
            raise FrameError(
                f"{_WHERE}: the frame holds {header.numel} elements of shape {header.shape}; nothing was applied"
            )
        hint = self.layout.resolve(header.numel) if self.layout is not None else None
        value = self._stream.decode(
            frame,
            self.codec,
            header.numel,
            header.dtype,
            step=_NO_STEP,
            epoch=self._epoch,
            hint=hint,
            header=header,
        )
        return value.clone().view(header.shape)

    def reset(self) -> None:
        """Forget the history and start a new epoch; do the same on the other end."""
        self._stream.drop()
        self._stream.sequence = 0
        self._epoch += 1

    @property
    def state(self) -> Tensor | None:
        """The last reconstruction: flat ``[numel]``, or ``None``. Do not write to it; the next frame does.

        With a quantized ``state`` this is a new tensor: the last reconstruction, rounded.
        """
        return self._stream.predictor.base

    @property
    def state_bytes(self) -> int:
        """Bytes of tensors held."""
        return self._stream.state_bytes
