"""The compiled loops of the low-rank codecs against the torch reference, bit for bit."""

from __future__ import annotations

import pytest
import torch

from compactdist import codecs
from compactdist.codecs.lowrank import factors
from compactdist.codecs.scalar.with_zero import MAGNITUDES
from compactdist.errors import NonFiniteError
from compactdist.kernels import use
from compactdist.state import Layout, blocks, plain
from tests.codecs import kit

pytest.importorskip("numba")


@pytest.mark.parametrize("magnitudes", [(0.8,), (0.45, 1.51), MAGNITUDES])
@pytest.mark.parametrize("name", sorted(kit.DISTRIBUTIONS))
def test_fit(name, magnitudes):
    for shape in ((1, 1), (3, 7), (5, 300), (2, 1088)):
        factor = kit.sample(name, shape)
        if name == "huge":
            factor = factor * 2.0**-40  # factors are of matrices scaled to 1
        with use("reference"):
            expected = factors.fit(factor, magnitudes)
        with use("cpu"):
            got = factors.fit(factor, magnitudes)
        for ours, theirs in zip(got, expected, strict=True):
            assert torch.equal(kit.as_bytes(ours), kit.as_bytes(theirs))


@pytest.mark.parametrize("spec", [{"id": "lowrank", "rank": 11}, {"id": "lowrank_int4", "rank": 1}, "lowrank_int4"])
@pytest.mark.parametrize("name", sorted(kit.DISTRIBUTIONS))
def test_encode_and_decode(name, spec):
    codec = codecs.get(spec)
    for shape in ((1, 1), (2, 33, 257), (70, 600)):
        x = kit.sample(name, shape)
        with use("reference"):
            payload = codec.encode(x)
            expected = codec.decode(payload, shape, torch.float32)
        with use("cpu"):
            assert torch.equal(codec.encode(x), payload)
            assert torch.equal(kit.as_bytes(codec.decode(payload, shape, torch.float32)), kit.as_bytes(expected))


VIEWS = (
    blocks(300),
    plain(2 * 33 * 300, 2, 300),
    Layout("(kv b h s d) -> kv (b s) (h d)", kv=2, b=2, h=3, d=40).resolve(2 * 2 * 3 * 33 * 40),
    Layout("(h s d) -> 1 s (d h)", h=3, d=8).resolve(3 * 40 * 8),
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("view", VIEWS)
def test_decode_onto_a_base(view, dtype):
    codec = codecs.get("lowrank_int4", rank=6)
    for name in ("gaussian", "huge", "wide_range", "zero", "denormal"):
        x, base = kit.sample(name, (view.numel,), dtype) / 2, kit.sample("gaussian", (view.numel,), dtype, seed=1)
        for terms in ((), (base,)):
            expected, got = torch.empty_like(x), torch.empty_like(x)
            with use("reference"):
                payload = kit.encode_residual(codec, x, terms, view, expected)
            with use("cpu"):
                kit.decode_residual(codec, payload, terms, view, got)
            assert torch.equal(kit.as_bytes(got), kit.as_bytes(expected))
        with use("cpu"):
            kit.decode_residual(codec, payload, (base,), view, base)
        assert torch.equal(kit.as_bytes(base), kit.as_bytes(expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("view", VIEWS)
def test_take_in(view, dtype):
    from compactdist.kernels.cpu import products

    x, base = kit.sample("laplace", (view.numel,), dtype), kit.sample("gaussian", (view.numel,), dtype)
    out = torch.empty(view.shape, dtype=torch.bfloat16)
    norm = products.take_in(x, (base,), view, out)
    residual = view.to_matrix(x.float() - base.float())
    assert torch.equal(out, residual.bfloat16())
    torch.testing.assert_close(norm, residual.flatten(1).norm(dim=1))


def test_large_matrices_contract_whatever_is_rounded():
    """At this size products may be of bfloat16-rounded matrices; the gain has to allow for it."""
    shape = (512, 640)
    view = plain(512 * 640, 1, 640)
    for spec in ("lowrank", "lowrank_int4", {"id": "lowrank", "rank": 1}):
        codec = codecs.get(spec)
        for name in sorted(kit.DISTRIBUTIONS):
            x = kit.sample(name, shape)
            kit.check_contraction(codec, x)
            session, out = codec.open(view, x.dtype, x.device), torch.empty(view.numel)
            payload = torch.empty(session.payload_nbytes, dtype=torch.uint8)
            for _ in range(3):
                session.encode(x.view(-1), (), out, payload)
                session.commit()
                error, energy = (out.double() - x.view(-1)).square().sum(), x.double().square().sum()
                assert error < energy or not float(x.abs().max()) > 1e-4
        bad = torch.zeros(view.numel).index_fill(0, torch.tensor([7]), float("nan"))
        with pytest.raises(NonFiniteError, match="1 of"):
            session.encode(bad, (), None, payload)
