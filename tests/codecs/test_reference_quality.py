"""Ours against CompactFusion's encoders: on the recorded trace, in size, and the formulas against their description."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.quality import reference_formulas, reference_quality

ROOT = Path(__file__).parent.parent.parent
STORED = json.loads((ROOT / "benchmarks/results/reference_quality.json").read_text())


def test_the_page_shows_the_stored_numbers():
    assert reference_quality.table(STORED["rows"], STORED["ratios"]) in (ROOT / "docs/quality.md").read_text()


def test_quantizers_are_better_at_the_same_bits():
    for line in reference_quality.rows(sites=1, names=("binary", "int2", "int4")):
        assert line["our_bits"] < line["their_bits"]
        assert line["gain_at_same_bits_db"] > 0, line


@pytest.mark.parametrize("size", reference_quality.ratios(), ids=lambda size: size["codec"])
def test_ratios_at_the_flux_cell(size):
    assert size["ours"] >= 0.998 * size["theirs"]
    assert size in STORED["ratios"]


def test_formulas_on_a_gaussian():
    """The relative errors and sizes that follow from the description."""
    r = torch.randn(1088, 768, generator=torch.Generator().manual_seed(0))
    for formula, error, bits in (
        (reference_formulas.binary, 0.603, 1088 * 768 + 16 * (1088 + 768)),
        (reference_formulas.int2, 0.384, 2 * 1088 * 768 + 16 * (1088 + 768)),
        (reference_formulas.int4, 0.128, 4 * 1088 * 768 + 32 * 768),
    ):
        decoded, cost = formula(r)
        assert cost == bits
        assert float((decoded - r).norm() / r.norm()) == pytest.approx(error, abs=0.004)


def test_low_rank_formulas():
    g = torch.Generator().manual_seed(0)
    r = torch.randn(60, 8, generator=g) @ torch.randn(8, 50, generator=g)
    decoded, bits = reference_formulas.lowrank(r, 8, g)
    assert bits == 16 * 8 * 110
    assert (decoded - r).norm() < 1e-3 * r.norm()
    decoded, bits = reference_formulas.lowrank_int4(r, 8, g)
    assert bits == 4 * 8 * 110 + 64 * 8
    assert 0.01 < (decoded - r).norm() / r.norm() < 0.25
