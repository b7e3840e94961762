"""Low-rank fits that care more for some rows than for others."""

from __future__ import annotations

import math

import pytest
import torch

from compactdist import codecs
from compactdist.errors import CodecConfigError
from compactdist.state import Layout, ResidualDecoder, ResidualEncoder
from tests.codecs import kit

SPECS: tuple[dict, ...] = (
    {"id": "lowrank", "rank": 4},
    {"id": "lowrank_int4", "rank": 8},
    {"id": "lowrank_int4", "rank": 8, "allocation": "energy"},
)
SHAPE = (2, 90, 70)


def weighted(error: torch.Tensor, weights: torch.Tensor) -> float:
    return float((error.square().sum(-1) * weights.square()).sum())


@pytest.mark.parametrize("spec", SPECS)
def test_weighted_error_falls_and_the_plain_one_stays_below_the_input(spec):
    codec, x = codecs.get(spec), kit.sample("gaussian", SHAPE)
    weights = torch.rand(SHAPE[:2], generator=torch.Generator().manual_seed(1)).pow(2) + 0.05
    without = codec.decode(codec.encode(x), SHAPE, x.dtype) - x
    with_weights = codec.decode(codec.encode(x, row_weights=weights), SHAPE, x.dtype) - x
    assert weighted(with_weights, weights) < 0.98 * weighted(without, weights)
    assert without.square().sum() < with_weights.square().sum() < x.square().sum()


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", sorted(kit.DISTRIBUTIONS))
def test_contraction_under_any_weights(spec, name):
    codec, x = codecs.get(spec), kit.sample(name, SHAPE)
    for power in (-10, 3):
        weights = torch.rand(SHAPE[1], generator=torch.Generator().manual_seed(2)).clamp(min=0.3).pow(power)
        y = codec.decode(codec.encode(x, row_weights=weights), SHAPE, x.dtype)
        assert (y.double() - x.double()).square().sum() <= x.double().square().sum()


@pytest.mark.parametrize("spec", SPECS)
def test_only_ratios_count(spec):
    codec, x = codecs.get(spec), kit.sample("gaussian", SHAPE)
    weights = torch.rand(SHAPE[1], generator=torch.Generator().manual_seed(3)) + 0.1
    payload = codec.encode(x, row_weights=weights)
    assert torch.equal(codec.encode(x, row_weights=weights.double() * 1024), payload)
    assert payload.numel() == codec.payload_nbytes(SHAPE, x.dtype)
    assert not torch.equal(codec.encode(x), payload)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (torch.ones(89), r"must be a tensor of shape \(90,\) or \(2, 90\).*got \(89,\)"),
        ([1.0] * 90, "got list"),
        (torch.zeros(90), "must be positive"),
        (torch.ones(90).index_fill(0, torch.tensor([4]), 0.0), "must be positive"),
        (torch.ones(90).index_fill(0, torch.tensor([4]), -1.0), "must be positive"),
        (torch.ones(90).index_fill(0, torch.tensor([4]), math.nan), "must be positive"),
        (torch.ones(90).index_fill(0, torch.tensor([4]), math.inf), "must be positive"),
        (torch.ones(90).index_fill(0, torch.tensor([4]), 1e7), r"within a factor of 2\*\*20"),
    ],
)
def test_unfit_weights_are_refused(weights, message):
    for spec in SPECS:
        with pytest.raises(CodecConfigError, match=message):
            codecs.get(spec).encode(kit.sample("gaussian", SHAPE), row_weights=weights)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("spec", SPECS)
def test_in_a_stream(spec, order):
    """The receiver knows nothing of them, and rows that matter come out better."""
    g = torch.Generator().manual_seed(0)
    values = torch.randn(8, *SHAPE[1:], generator=g).cumsum(0)
    weights = torch.ones(SHAPE[1])
    weights[:20] = 8.0
    layout = Layout("(s c) -> 1 s c", c=SHAPE[2])
    errors = []
    for given in (None, weights):
        encoder, decoder = (make(spec, order=order, layout=layout) for make in (ResidualEncoder, ResidualDecoder))
        for x in values:
            y = decoder.decode(encoder.encode(x, row_weights=given))
            assert torch.equal(y.view(-1), encoder.state)
        errors.append(float((y - x)[:20].square().sum()))
    assert errors[1] < 0.9 * errors[0]


def test_codecs_that_do_not_take_them_say_so():
    with pytest.raises(CodecConfigError, match="int4 has no use for row_weights; lowrank and lowrank_int4 have"):
        ResidualEncoder("int4").encode(torch.ones(4, 4), row_weights=torch.ones(4))
