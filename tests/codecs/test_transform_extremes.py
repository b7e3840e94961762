"""The transform codec near the largest float32, on payloads that say anything, and on zeros: finite, the same bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compactdist import Layout, codecs, kernels
from compactdist.kernels.cpu import component_steps
from compactdist.state import ResidualDecoder, ResidualEncoder
from compactdist.state.matrix_view import plain

WAYS = ("reference", "bytes", "products")
"""Kernels: of the reference, compiled ones that multiply bytes, and compiled ones behind a product of torch."""

codec = pytest.mark.parametrize("codec", ["transform:bits=2", "transform:bits=2,trellis=true"])


def raw(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


def going(way: str, monkeypatch: pytest.MonkeyPatch) -> kernels.use:
    if way == "bytes" and not component_steps.multiplies_bytes():
        pytest.skip("this processor has no instruction for it")
    if way == "products":
        monkeypatch.setattr(component_steps, "multiplies_bytes", lambda: False)
    return kernels.use("reference" if way == "reference" else "cpu")


@codec
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_finite_values_stay_finite(codec, way, dtype, monkeypatch):
    """With a velocity the prediction is twice as large as what it predicts."""
    sign = torch.randn(256, 128, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    encoder, decoder = ResidualEncoder(codec, order=2), ResidualDecoder(codec, order=2)
    with going(way, monkeypatch):
        for largest in (1.0, 3e38, 3e38, 3e38, -3e38, 1.0, 1.0, 1.0):
            x = (sign * largest).to(dtype)
            got = decoder.decode(encoder.encode(x))
            assert got.isfinite().all()
            assert torch.equal(got.flatten(), encoder.state)
    assert (got - x).float().norm() < 0.5 * x.float().norm()


@codec
@pytest.mark.parametrize("way", WAYS[1:])
def test_any_payload_has_the_bits_of_the_reference(codec, way, monkeypatch):
    """Gains that are no number, units and sums beyond float32, rows without a scale."""
    rows, channels = 300, 64
    view, g = plain(rows * channels, 1, channels), torch.Generator().manual_seed(0)
    for number in range(6):
        terms = tuple(torch.randn(view.numel, generator=g).sign() * 3e38 for _ in range(number % 3))
        results = []
        payload: Tensor | None = None
        for which in ("reference", way):
            with going(which, monkeypatch):
                session = codecs.get(codec).open(view, torch.float32, torch.device("cpu"))
                if payload is None:
                    payload = torch.randint(0, 256, (session.payload_nbytes,), generator=g, dtype=torch.uint8)
                    payload[:4] = torch.tensor([3e38]).view(torch.uint8)
                    payload[4:6] = torch.tensor([0x7F80 + number // 3], dtype=torch.int16).view(torch.uint8)
                out = torch.empty(view.numel)
                session.decode(payload, terms, out)
                results.append(out)
        assert results[0].isfinite().all()
        assert torch.equal(raw(results[0]), raw(results[1]))


@codec
@pytest.mark.parametrize("way", WAYS[1:])
def test_which_zero_comes_out(codec, way, monkeypatch):
    """One component of a block has bits: some libraries multiply it without adding anything up."""
    options = {"codec": codec.replace("bits=2", "bits=0.1"), "keyframe": "raw"}
    options["layout"] = Layout("(g r c) -> g r c", g=1, c=8)
    encoder, ends = ResidualEncoder(**options), [ResidualDecoder(**options) for _ in range(2)]
    x = torch.full((2100, 8), -0.0)
    for step in range(3):
        x[:, 3] += torch.arange(2100) % (5 - step) - 2
        frame = encoder.encode(x)
        with going("reference", monkeypatch):
            expected = ends[0].decode(frame)
        with going(way, monkeypatch):
            assert torch.equal(raw(ends[1].decode(frame)), raw(expected))
