"""State keeps its addresses where something may know them: at the receiving end, and off the CPU at the sending end."""

from __future__ import annotations

import pytest
import torch

from compactdist.state import ResidualDecoder, ResidualEncoder
from compactdist.state.history import ExactCell
from compactdist.state.quantized_history import make_predictor


def test_a_decoder_works_in_place():
    encoder, decoder = ResidualEncoder("int4"), ResidualDecoder("int4")
    decoder.decode(encoder.encode(torch.randn(4096)))
    place = decoder.state.data_ptr()
    for _ in range(4):
        decoder.decode(encoder.encode(torch.randn(4096)))
        assert decoder.state.data_ptr() == place


@pytest.mark.parametrize("order", [1, 2, "auto"])
def test_off_the_cpu_a_new_value_is_copied_into_the_old_ones_memory(order):
    """Tensors of the meta device stand in for a GPU's."""
    predictor = make_predictor(order, 0.5, "exact")
    first = torch.empty(64, device="meta")
    assert predictor.advance(first, ()) is None
    held = predictor.held
    for _ in range(3):
        value = torch.empty(64, device="meta")
        assert predictor.advance(value, predictor.terms()) is value  # whose memory nobody needs any more
        assert all(a is b for a, b in zip(predictor.held, held, strict=True))


def test_on_the_cpu_the_last_values_memory_is_handed_back():
    cell, first, second = ExactCell(), torch.zeros(8), torch.ones(8)
    assert cell.put(first, None) is None
    assert cell.put(second, first) is first
    assert cell.read() is second
