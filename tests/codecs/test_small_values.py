"""Tensors of very small values are coded as well as others, down to where ``docs/guarantees.md`` says."""

from __future__ import annotations

import pytest
import torch

from compactdist.state import ResidualDecoder, ResidualEncoder

CODECS = (
    "binary",
    "ternary",
    "int2",
    "int3",
    "int4",
    "int8",
    "fp8",
    "lowrank_int4",
    "topk",
    "topk_int4",
    "transform:bits=2",
)
NORMAL = 2.0**-15


def errors(codec, keyframe, scale):
    """Relative errors of a keyframe and of two residuals."""
    sender, receiver = (end(codec, keyframe=keyframe) for end in (ResidualEncoder, ResidualDecoder))
    g, found = torch.Generator().manual_seed(0), []
    x = torch.randn(256, 256, generator=g)
    for _ in range(3):
        x = x + 0.1 * torch.randn(256, 256, generator=g)
        decoded = receiver.decode(sender.encode(x * scale)).double() / scale
        found.append(float((decoded - x).norm() / x.norm()))
    return found


@pytest.mark.parametrize("codec", CODECS)
def test_small_values(codec):
    smallest = 2.0**-46 if "transform" in codec else 2.0**-60  # 1.4e-14, 8.7e-19
    usual = errors(codec, "int8", NORMAL)
    assert errors(codec, "int8", smallest) == pytest.approx(usual, rel=0.02)
