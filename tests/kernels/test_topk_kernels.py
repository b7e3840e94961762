"""The compiled loops of ``topk`` and ``topk_int4`` against the torch reference, bit for bit."""

from __future__ import annotations

import pytest
import torch

from compactdist import codecs, kernels
from compactdist.codecs.scalar.with_zero import Int4WithZero
from compactdist.errors import NonFiniteError
from compactdist.kernels import use
from compactdist.kernels.spec import MatrixView
from compactdist.state.matrix_view import blocks
from tests.codecs import kit
from tests.quick import quick_for

pytest.importorskip("numba")

CPU = torch.device("cpu")
SPECS = ({"id": "topk"}, {"id": "topk", "m": 5}, {"id": "topk_int4"})


def _step(spec, view, x, terms, chosen):
    with use(chosen):
        session = codecs.get(spec).open(view, x.dtype, CPU)
        payload, out = torch.full((session.payload_nbytes,), 7, dtype=torch.uint8), torch.empty_like(x)
        session.encode(x, terms, out, payload)
        again = terms[0].clone() if terms else torch.empty_like(x)
        session.decode(payload, (again, *terms[1:]) if terms else (), again)
    assert torch.equal(kit.as_bytes(again), kit.as_bytes(out))
    return payload, out


def _check_same(spec, view, x, terms):
    for ours, theirs in zip(_step(spec, view, x, terms, "cpu"), _step(spec, view, x, terms, "reference"), strict=True):
        assert torch.equal(kit.as_bytes(ours), kit.as_bytes(theirs))


CASES = (  # not all of each, for every one is compiled
    (SPECS[0], torch.float32),
    (SPECS[0], torch.bfloat16),
    (SPECS[0], torch.float16),
    (SPECS[1], torch.float32),
    (SPECS[2], torch.bfloat16),
)


@pytest.mark.parametrize(("spec", "dtype"), CASES, ids=str)
@pytest.mark.parametrize("name", quick_for(sorted(kit.DISTRIBUTIONS)[::6], sorted(kit.DISTRIBUTIONS)))
def test_same_bytes(name, spec, dtype):
    for numel in (1, 7, 40, 513, 2600):
        x = kit.sample(name, (numel,)).clamp(-3e4, 3e4).to(dtype)
        base = x.flip(0).clone()
        for terms in ((), (base,), (base, 0.5 * base)):
            _check_same(spec, MatrixView(numel, 1, 1, numel), x, terms)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_ties_keep_the_first(spec):
    x = torch.tensor([0.0, -2.0, 2.0, -0.0, 2.0] * 160)
    base = torch.tensor([-0.0, 0.0] * 400)
    _check_same(spec, MatrixView(800, 2, 1, 400), x, ())
    _check_same(spec, MatrixView(800, 2, 1, 400), x, (base,))
    _check_same(spec, MatrixView(800, 2, 1, 400), base, (base,))


def test_tiny_and_large_values():
    x = torch.tensor([2.0**-118, -(2.0**-119), -1e-45, 3.4e38, -3.4e38, 1.00390625, -1.01171875, 0.0]).repeat(100)
    for m in (2, 8):
        _check_same({"id": "topk", "m": m}, MatrixView(800, 1, 1, 800), x, ())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_refuses_what_is_not_finite(spec, bad):
    for at in (0, 77, 599):
        x = torch.ones(600)
        x[at] = bad
        with pytest.raises(NonFiniteError, match="1 of 600"):
            _step(spec, MatrixView(600, 1, 1, 600), x, (), "cpu")


def test_where_the_reference_does_the_work():
    with use("cpu"):
        assert kernels.picks_for(MatrixView(80, 2, 1, 40), 8, torch.float32, CPU) is not None
        assert kernels.picks_for(MatrixView(82, 2, 1, 41), 8, torch.float32, CPU) is None
        assert kernels.picks_for(MatrixView(80, 2, 1, 40), 8, torch.float64, CPU) is None
    _check_same({"id": "topk"}, MatrixView(82, 2, 1, 41), torch.randn(82), (torch.randn(82),))


def test_threads_share_the_runs():
    generator = torch.Generator().manual_seed(1)
    numel = (1 << 19) + 3
    x, base = (torch.randn(numel, generator=generator).bfloat16() for _ in range(2))
    for spec in (SPECS[0], SPECS[2]):
        _check_same(spec, MatrixView(numel, 1, 1, numel), x, (base,))


def test_a_place_out_of_range_writes_nothing():
    with use("cpu"):
        session = codecs.get("topk", m=5).open(MatrixView(3, 1, 1, 3), torch.float32, CPU)
        payload, out = torch.zeros(session.payload_nbytes, dtype=torch.uint8), torch.empty(3)
        session.encode(torch.ones(3), (), None, payload)
        payload[0] = 9
        session.decode(payload, (), out)
    assert not out.any()


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_behind_the_last_element_of_a_flat_tensor(spec):
    """Its runs are those of whole rows of 128; what lay in memory before must not be sent."""
    for numel in (1000, 1003):
        _check_same(spec, blocks(numel), torch.randn(numel), ())


@pytest.mark.parametrize("block", [128, 33])
def test_values_of_four_bits_run_in_the_loops(block):
    quantizer = Int4WithZero(block)
    for numel, groups in ((1, 1), (900, 1), (2 * 4 * 132, 2)):
        x = torch.cat([kit.sample(name, (numel,)) for name in sorted(kit.DISTRIBUTIONS)])[: numel * 8]
        view = MatrixView(x.numel(), groups, 1, x.numel() // groups)
        with use("cpu"):
            assert kernels.steps_for(quantizer.spec, view, torch.float32, CPU) is not None
        made = []
        for chosen in ("cpu", "reference"):
            with use(chosen):
                payload = quantizer.encode(x.view(view.shape))
                made.append((payload, quantizer.decode(payload, view.shape, torch.float32)))
        for ours, theirs in zip(*made, strict=True):
            assert torch.equal(kit.as_bytes(ours), kit.as_bytes(theirs))


def test_tensors_of_another_form_are_left_to_the_reference():
    session = codecs.get("topk").open(MatrixView(80, 1, 1, 80), torch.bfloat16, CPU)
    x, base = torch.randn(80), torch.randn(80, 2)[:, 0]
    made = []
    for chosen in ("cpu", "reference"):
        payload, out = torch.empty(session.payload_nbytes, dtype=torch.uint8), torch.empty(80)
        with use(chosen):
            session.encode(x, (base,), out, payload)
        made.append((payload, out))
    assert all(map(torch.equal, *made))
