"""State keeps its addresses where something may know them: at the receiving end, and once a CUDA graph does."""

from __future__ import annotations

import pytest
import torch

from compactdist.state import ResidualDecoder, ResidualEncoder
from compactdist.state.quantized_history import make_predictor


def test_a_decoder_works_in_place():
    encoder, decoder = ResidualEncoder("int4"), ResidualDecoder("int4")
    decoder.decode(encoder.encode(torch.randn(4096)))
    place = decoder.state.data_ptr()
    for _ in range(4):
        decoder.decode(encoder.encode(torch.randn(4096)))
        assert decoder.state.data_ptr() == place


@pytest.mark.parametrize("order", [1, 2, "auto"])
def test_once_it_stays_a_new_value_is_copied_into_the_old_ones_memory(order):
    predictor = make_predictor(order, 0.5, "exact")
    predictor.stay()
    assert predictor.advance(torch.zeros(8), ()) is None
    held = predictor.held
    for step in range(1, 4):
        value = torch.full((8,), float(step))
        assert predictor.advance(value, predictor.terms()) is value  # whose memory nobody needs any more
        assert all(a is b for a, b in zip(predictor.held, held, strict=True))
        assert torch.equal(predictor.base, value)


@pytest.mark.parametrize("order", [1, 2, "auto"])
def test_until_then_the_last_values_memory_is_handed_back(order):
    """On a device as on a CPU: a copy would be one more read and write of the tensor."""
    predictor = make_predictor(order, 0.5, "exact")
    predictor.stay()
    predictor.advance(torch.zeros(8), ())
    predictor.clear()  # what stayed is forgotten
    values = [torch.full((8,), float(step)) for step in range(5)]
    given_back = [predictor.advance(value, predictor.terms()) for value in values]
    for step in range(2, 5):
        assert predictor.base is values[4]
        assert given_back[step] is values[step - (1 if order == 1 else 2)]
