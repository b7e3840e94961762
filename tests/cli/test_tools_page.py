"""The figures of docs/tools.md are those of the committed results, and those are what the command prints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.kit import run_json

ROOT = Path(__file__).parents[2]
TRACE = ROOT / "benchmarks" / "traces" / "digits_ring.safetensors"


@pytest.mark.parametrize("order", [1, 2])
def test_figures(order: int) -> None:
    committed = json.loads((ROOT / "benchmarks" / "results" / f"evaluate_digits_order{order}.json").read_text())
    printed = run_json("evaluate", TRACE, "--order", order, "--json")
    page = (ROOT / "docs" / "tools.md").read_text()
    for codec in ("binary", "int2", "int4", "int8"):
        row = committed[codec]
        assert printed[codec] == pytest.approx(row, rel=1e-3), codec
        cells = [codec, f"{row['bits_per_element']:.3f}", f"{row['request_bits_per_element']:.3f}"]
        cells += [f"{row['rel_error']:.2e}", f"{row['nmse_db']:.2f}", f"{row['worst_step_rel_error']:.2e}"]
        assert "| " + " | ".join([*cells, str(row["state_bytes"])]) + " |" in page
