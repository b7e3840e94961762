"""The figures of docs/tools.md and docs/concepts.md are those of the committed results, and what the command prints."""

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
    printed = run_json("evaluate", TRACE, "--order", order, "--json", "-")
    page = (ROOT / "docs" / "tools.md").read_text()
    for codec in ("binary", "int2", "int4", "int8"):
        row = committed[codec]
        assert printed[codec] == pytest.approx(row, rel=1e-3), codec
        cells = [codec, f"{row['bits_per_element']:.3f}", f"{row['request_bits_per_element']:.3f}"]
        cells += [f"{row['rel_error']:.2e}", f"{row['nmse_db']:.2f}", f"{row['worst_step_rel_error']:.2e}"]
        assert "| " + " | ".join([*cells, f"{row['state_bytes'] / 1e6:.3f}"]) + " |" in page


@pytest.mark.parametrize("order", [1, 2])
def test_figures_with_a_quantized_state(order: int) -> None:
    results = ROOT / "benchmarks" / "results"
    names = {s: f"evaluate_digits_order{order}{s and '_state_' + s}.json" for s in ("", "int8", "fp8")}
    rows = {state: json.loads((results / name).read_text()) for state, name in names.items()}
    page = (ROOT / "docs" / "concepts.md").read_text()
    chosen = [part for codec in ("binary", "int2", "int4", "int8") for part in ("--codec", codec)]
    for state in ("int8", "fp8"):
        printed = run_json("evaluate", TRACE, *chosen, "--order", order, "--state", state, "--json", "-")
        assert printed == {codec: pytest.approx(row, rel=1e-3) for codec, row in rows[state].items()}
        assert all(row["state_bytes"] == order * 104448 // 2 * 130 // 128 for row in printed.values())
    for codec in ("binary", "int2", "int4", "int8"):
        exact, *others = (rows[state][codec]["nmse_db"] for state in ("", "int8", "fp8"))
        cells = [codec, str(order), f"{exact:.2f}", *(f"{db:.2f} ({db - exact:+.2f})" for db in others)]
        assert "| " + " | ".join(cells) + " |" in page
