"""Random sequences for one stream, and the facts that must hold after every frame."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st

from compactdist.state import ResidualDecoder, ResidualEncoder

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LOSSY = ("binary", "int2", "int4", "int8")

codec_ids = st.sampled_from((*LOSSY, "raw"))


@st.composite
def stream_options(draw: Any) -> dict[str, Any]:
    order = draw(st.sampled_from([0, 1, 2, "auto"]))
    return {
        "codec": draw(codec_ids),
        "order": order,
        "damping": draw(st.sampled_from([None, 0.0, 0.3, 0.5, 1.0] if order == 2 else [None])),
        "error_feedback": draw(st.sampled_from([None, False, True] if order else [None, False])),
        "warmup_steps": draw(st.integers(0, 3)),
        "find_layout": draw(st.booleans()),
        "state": draw(st.sampled_from(["exact", "exact", "int8", "fp8"])),
        "keyframe": draw(st.sampled_from(["int8", "int8", "int4", "raw"])),
    }


def pair(**options: Any) -> tuple[ResidualEncoder, ResidualDecoder]:
    return ResidualEncoder(**options), ResidualDecoder(**options)


def same_bytes(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    """Equal shape, dtype and bits (NaN payloads and signs of zero included)."""
    if a is None or b is None:
        return a is b
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    raw = [t.detach().reshape(-1).contiguous().view(torch.uint8) for t in (a, b)]
    return torch.equal(*raw)


def check_in_step(encoder: ResidualEncoder, decoder: ResidualDecoder) -> None:
    """Both ends hold the same, to the bit."""
    ours, theirs = encoder._stream, decoder._stream
    assert same_bytes(encoder.state, decoder.state)
    assert len(ours.predictor.held) == len(theirs.predictor.held)
    assert all(map(same_bytes, ours.predictor.held, theirs.predictor.held))
    assert ours.sequence == theirs.sequence
    assert ours.live == theirs.live
    assert ours.view == theirs.view


def strided(x: torch.Tensor, how: str) -> torch.Tensor:
    """The same values behind other strides."""
    if how == "transposed" and x.dim() >= 2:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if how == "every second":
        wide = x.new_zeros((*x.shape, 2))
        wide[..., 1] = x
        return wide[..., 1]
    return x


strides = st.sampled_from(["contiguous", "transposed", "every second"])
shapes = st.sampled_from([(), (0,), (1,), (3, 0), (17,), (128,), (300,), (7, 3), (2, 3, 5), (33, 65), (1, 2, 3, 2, 40)])
