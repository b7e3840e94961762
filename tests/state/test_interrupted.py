"""A decode that was interrupted half-way cannot be repeated on what it left behind; a reset begins anew."""

from __future__ import annotations

import pytest
import torch

from compactdist.codecs.scalar.int4 import Int4
from compactdist.codecs.scalar.quantized import ScalarSession
from compactdist.errors import FrameError
from compactdist.state import ResidualDecoder, ResidualEncoder

N = 4096


class _Interrupted(ScalarSession):
    __slots__ = ()
    once = True

    def decode(self, payload, terms, out):
        super().decode(payload, terms, out)
        if type(self).once:
            type(self).once = False
            raise KeyboardInterrupt


class _Int4(Int4):
    def open(self, view, dtype, device):
        return _Interrupted(self, view, dtype, device)


@pytest.mark.parametrize("order", [1, 2, "auto"])
def test_a_retry_is_refused_and_a_reset_helps(order):
    _Interrupted.once = True
    encoder, decoder = ResidualEncoder("int4", order=order), ResidualDecoder(_Int4(), order=order)
    values = [torch.randn(N) for _ in range(5)]
    decoder.decode(encoder.encode(values[0]))
    frame = encoder.encode(values[1])
    with pytest.raises(KeyboardInterrupt):
        decoder.decode(frame)
    held = decoder.state.clone()
    for again in (frame, encoder.encode(values[2])):
        with pytest.raises(FrameError, match=r"(interrupted|sequence).*reset\(\)"):
            decoder.decode(again)
    assert torch.equal(decoder.state, held)
    encoder.reset()
    decoder.reset()
    for x in values[3:]:
        assert torch.equal(decoder.decode(encoder.encode(x)), encoder.state)
