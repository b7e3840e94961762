"""``compactdist plan``: what encoding and decoding of one message take on this machine."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compactdist.cli.common import now
from compactdist.cli.evaluate import Setting
from compactdist.kernels.spec import MatrixView
from compactdist.state import StreamDecoder, StreamEncoder, Wanted

__all__ = ["Times", "time_messages"]

_WARM, _ROUNDS = 2, 7
_SECONDS = 2.0
"""No residual of a stream is begun after this time, except the first three."""


@dataclass(frozen=True)
class Times:
    """Seconds of one message. The time that a codec takes to learn from a frame is part of both ends' times.

    Attributes:
        encode, decode: of a residual, the smallest, as other work on a machine only adds time.
        keyframe_encode, keyframe_decode: of a keyframe, once.
    """

    encode: float = 0.0
    decode: float = 0.0
    keyframe_encode: float = 0.0
    keyframe_decode: float = 0.0


@torch.no_grad()
def time_messages(setting: Setting, tensors: Sequence[Tensor], hint: MatrixView) -> Times:
    """Send tensors through both ends of a stream, forth and back so that each is a small change of the one before.

    Args:
        setting: codec and configuration of the stream.
        tensors: flat, at least two, all alike.
        hint: their matrix view.
    """
    for _ in _frames(setting, tensors, hint, 1 + _WARM):
        pass  # compiles, loads, and lets codecs learn what they keep
    began = time.monotonic()
    timed: list[tuple[float, float]] = []
    for pair in _frames(setting, tensors, hint, 1 + _WARM + _ROUNDS):
        timed.append(pair)
        if len(timed) >= 4 + _WARM and time.monotonic() - began > _SECONDS:
            break
    encode, decode = zip(*timed[1 + _WARM :], strict=True)
    return Times(min(encode), min(decode), *timed[0])


def _frames(setting: Setting, tensors: Sequence[Tensor], hint: MatrixView, count: int) -> Iterator[tuple[float, float]]:
    """Seconds of encoding and of decoding, frame by frame of a new stream."""
    encoder = StreamEncoder(setting.config, 0, "plan")
    decoder = StreamDecoder(setting.config, 0, "plan")
    order = [*range(len(tensors)), *range(len(tensors) - 2, 0, -1)]
    for step in range(count):
        x = tensors[order[step % len(order)]]
        keyframe = step == 0 or encoder.is_fresh(x.numel(), x.dtype)
        began = now(x.device)
        staged = encoder.stage(x, setting.codec, Wanted(step=step, hint=hint), keyframe=keyframe)
        encoder.commit(staged)
        between = now(x.device)
        decoder.decode(staged.frame, setting.codec, x.numel(), x.dtype, step=step, hint=hint)
        yield between - began, now(x.device) - between
