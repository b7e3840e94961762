"""The figures of the transform codec in docs/codecs.md are those of the committed results."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("steps", ["", "_4_steps"])
@pytest.mark.parametrize("table", ["transform", "trellis"])
def test_figures(table: str, steps: str) -> None:
    results, page = ROOT / "benchmarks" / "results", (ROOT / "docs" / "codecs.md").read_text()
    both = [json.loads((results / f"evaluate_{name}_{table}{steps}.json").read_text()) for name in ("digits", "photos")]
    assert list(both[0]) == list(both[1])
    for codec in both[0]:
        cells = [f"`{codec}`"]
        for trace in both:
            row = trace[codec]
            cells += [f"{row['bits_per_element']:.3f}", f"{row['request_bits_per_element']:.3f}"]
            cells += [f"{row['rel_error']:.2e}", f"{row['request_worst_step_rel_error']:.2e}"]
        assert "| " + " | ".join(cells) + " |" in page


def test_at_four_steps_the_trellis_is_better_than_scalars_of_its_size_by_three_decibels() -> None:
    for name in ("digits", "photos"):
        rows = json.loads((ROOT / "benchmarks" / "results" / f"evaluate_{name}_trellis_4_steps.json").read_text())
        scalars = ("binary", "int2", "int4")
        for scalar, along in zip(scalars, (codec for codec in rows if codec not in scalars), strict=True):
            assert rows[along]["request_bits_per_element"] < rows[scalar]["request_bits_per_element"]
            assert 20 * math.log10(rows[scalar]["rel_error"] / rows[along]["rel_error"]) > 3
