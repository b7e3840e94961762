"""What is sent without a memory: formats that code every step by itself, for ``compactdist evaluate --baselines``.

Formulas, not wire formats: each gives what its receiver would hold, and the bytes of its codes and scales. No header is
counted, as peers that send such formats have none. Written from the formats' descriptions.

* ``stateless int4``: the codec ``int4`` of this library, scales for rows and channels, on the tensor itself.
* ``stateless fp4``: four bits (E2M1) in groups of 16 channels, each with a scale in E4M3: 4.5 bits, and for each
  matrix a float32 that brings the largest scale to the top of E4M3.
* ``stateless fp8``: E4M3 with a float32 scale for each row (token).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from compactdist import codecs
from compactdist.cli.evaluate import recorded
from compactdist.cli.score import Score
from compactdist.observe.trace import Trace

__all__ = ["BASELINES", "play_baselines"]

_FP4_GROUP = 16
_FP4_LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_FP4_MAX = 6.0
_E4M3_MAX = 448.0


def _int4(x: Tensor) -> tuple[Tensor, float]:
    codec = codecs.get("int4")
    payload = codec.encode(x[None])
    return codec.decode(payload, (1, *x.shape), torch.float32)[0], payload.numel()


def _e4m3(x: Tensor) -> Tensor:
    return x.to(torch.float8_e4m3fn).float()


def _over(x: Tensor, scale: Tensor) -> Tensor:
    """``x / scale``; 0 where the scale is 0."""
    return torch.where(scale > 0, x / scale, 0.0)


def _fp4(x: Tensor) -> tuple[Tensor, float]:
    rows, channels = x.shape
    grouped = pad(x, (0, -channels % _FP4_GROUP)).unflatten(1, (-1, _FP4_GROUP))
    largest = grouped.abs().amax(2, keepdim=True)
    unit = largest.amax() / (_FP4_MAX * _E4M3_MAX)
    scale = _e4m3(_over(largest / _FP4_MAX, unit).clamp(max=_E4M3_MAX)) * unit
    levels = torch.tensor(_FP4_LEVELS, dtype=torch.float32, device="cpu")
    code = torch.bucketize(_over(grouped.abs(), scale), (levels[1:] + levels[:-1]) / 2)
    x_hat = (levels[code] * scale).copysign(grouped).flatten(1)[:, :channels]
    return x_hat, rows * channels / 2 + scale.numel() + unit.element_size()


def _fp8(x: Tensor) -> tuple[Tensor, float]:
    scale = x.abs().amax(1, keepdim=True) / _E4M3_MAX
    return _e4m3(_over(x, scale).clamp(-_E4M3_MAX, _E4M3_MAX)) * scale, x.numel() + scale.nbytes


BASELINES: tuple[tuple[str, Callable[[Tensor], tuple[Tensor, float]]], ...] = (
    ("stateless int4", _int4),
    ("stateless fp4", _fp4),
    ("stateless fp8", _fp8),
)
"""Name, and a function of a matrix ``[N, C]``, float32: its reconstruction, and the bytes sent."""


@torch.no_grad()
def play_baselines(trace: Trace, keyframes: int, steps: int | None = None) -> dict[str, Score]:
    """Send every step of a trace by itself.

    Args:
        trace: the trace.
        keyframes: steps that the other rows of the table send as keyframes: left out of the same sums.
        steps: as for :func:`compactdist.cli.evaluate.play_settings`.

    Returns:
        A score by the baseline's name; reconstructions are rounded to the trace's dtype, as a receiver's are.

    Raises:
        TraceError: as for :func:`compactdist.cli.evaluate.play_settings`.
    """
    scores = {name: Score() for name, _ in BASELINES}
    for entry in recorded(trace, steps, keyframes):
        for step, value in enumerate(entry.x):
            for name, round_trip in BASELINES:
                parts = [round_trip(part) for part in value.float().chunk(entry.groups)]
                x_hat = torch.cat([part for part, _ in parts]).to(value.dtype)
                nbytes = sum(sent for _, sent in parts)
                scores[name].count(entry.site, step, value, x_hat, nbytes, keyframe=step < keyframes)
    return scores
