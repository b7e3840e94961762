"""The figures of the transform codec in docs/codecs.md are those of the committed results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("steps", ["", "_4_steps"])
def test_figures(steps: str) -> None:
    results, page = ROOT / "benchmarks" / "results", (ROOT / "docs" / "codecs.md").read_text()
    both = [
        json.loads((results / f"evaluate_{name}_transform{steps}.json").read_text()) for name in ("digits", "photos")
    ]
    assert list(both[0]) == list(both[1])
    for codec in both[0]:
        cells = [f"`{codec}`"]
        for trace in both:
            row = trace[codec]
            cells += [f"{row['bits_per_element']:.3f}", f"{row['request_bits_per_element']:.3f}"]
            cells += [f"{row['rel_error']:.2e}", f"{row['request_worst_step_rel_error']:.2e}"]
        assert "| " + " | ".join(cells) + " |" in page
