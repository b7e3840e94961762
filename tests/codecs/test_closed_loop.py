"""Every codec inside the residual loop: both ends equal, everything finite, and better than coding the values."""

from __future__ import annotations

import pytest
import torch

from compactdist import codecs
from compactdist.state import ResidualDecoder, ResidualEncoder
from tests.codecs import kit, make_fixtures
from tests.quick import quick_for

LOSSY = [codec_id for codec_id in codecs.list() if not codecs.get(codec_id).lossless]
RANKED = make_fixtures.SPECS["binary-rank"]
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


@pytest.mark.parametrize(
    ("order", "state"), [(0, "exact"), (1, "exact"), (1, "int8"), (1, "fp8"), (2, "exact"), (2, "int8")]
)
@pytest.mark.parametrize("codec_id", [*quick_for(LOSSY[::3], LOSSY), pytest.param(RANKED, id="binary-rank")])
def test_closed_loop(codec_id, order, state):
    encoder = ResidualEncoder(codec_id, order=order, state=state)
    decoder = ResidualDecoder(codec_id, order=order, state=state)
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
