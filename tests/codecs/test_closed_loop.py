"""Every codec inside the residual loop: both ends equal, everything finite, and better than coding the values."""

from __future__ import annotations

import pytest
import torch

from compactdist import codecs
from compactdist.state import ResidualDecoder, ResidualEncoder
from tests.codecs import kit

LOSSY = [codec_id for codec_id in codecs.list() if not codecs.get(codec_id).lossless]
STEPS = 20


def walk() -> list[torch.Tensor]:
    """A tensor that moves a little in each step, part of it at a steady speed."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(96, 128, generator=g)
    speed = 0.02 * torch.randn(96, 128, generator=g)
    values = []
    for _ in range(STEPS):
        x = x + speed + 0.02 * torch.randn(96, 128, generator=g)
        values.append(x)
    return values


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("codec_id", LOSSY)
def test_closed_loop(codec_id, order):
    encoder = ResidualEncoder(codec_id, order=order, damping=0.5)
    decoder = ResidualDecoder(codec_id, order=order, damping=0.5)
    values = walk()
    ratios = []
    for x in values:
        y = decoder.decode(encoder.encode(x))
        assert bool(torch.isfinite(y).all())
        if order:
            assert torch.equal(kit.as_bytes(encoder.state), kit.as_bytes(decoder.state))
        ratios.append(float((y - x).square().sum() / x.square().sum()))
    direct = kit.nmse(codecs.get(codec_id), values[-1])
    if order:
        assert ratios[-1] < direct
    assert max(ratios) < 1
