"""The figures of ``scales="token_history"`` in docs/codecs.md are those of the committed results."""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_figures() -> None:
    results, page = ROOT / "benchmarks" / "results", (ROOT / "docs" / "codecs.md").read_text()
    both = [json.loads((results / f"evaluate_{name}_history.json").read_text()) for name in ("digits", "photos")]
    for codec in ("binary", "int2", "int4", "int8"):
        cells = [f"`{codec}`"]
        for trace in both:
            without, with_it = trace[codec], trace[f"{codec}:scales=token_history"]
            cells.append(f"{with_it['bits_per_element'] - without['bits_per_element']:+.3f}")
            cells += [f"{row['nmse_db']:.2f}" for row in (without, with_it)]
            cells.append(f"{with_it['nmse_db'] - without['nmse_db']:+.2f}")
        assert "| " + " | ".join(cells) + " |" in page
