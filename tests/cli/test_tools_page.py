"""The figures of docs/tools.md and docs/concepts.md are those of the committed results, and what the command prints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from compactdist.cli.baselines import BASELINES
from compactdist.presets import PRESETS
from tests.cli.kit import run_json
from tests.quick import quick_for

ROOT = Path(__file__).parents[2]
TRACE = ROOT / "benchmarks" / "traces" / "digits_ring.safetensors"
PHOTOS = ROOT / "benchmarks" / "traces" / "photos_dit.safetensors"


@pytest.mark.parametrize("order", quick_for([1], [1, 2]))
def test_figures(order: int) -> None:
    committed = json.loads((ROOT / "benchmarks" / "results" / f"evaluate_digits_order{order}.json").read_text())
    codecs = "binary", "int2", "int4", "int8"
    played = codecs if order == 2 else codecs[1::2]  # each takes seconds
    printed = run_json(
        "evaluate", TRACE, *(part for codec in played for part in ("--codec", codec)), "--order", order, "--json", "-"
    )
    page = (ROOT / "docs" / "tools.md").read_text()
    for codec in codecs:
        row = committed[codec]
        assert codec not in played or printed[codec] == pytest.approx(row, rel=1e-3), codec
        cells = [codec, f"{row['bits_per_element']:.3f}", f"{row['request_bits_per_element']:.3f}"]
        cells += [f"{row['request_ratio']:.2f}", f"{row['rel_error']:.2e}", f"{row['request_rel_error']:.2e}"]
        cells += [f"{row['request_worst_step_rel_error']:.2e}", f"{row['nmse_db']:.2f}"]
        assert "| " + " | ".join([*cells, f"{row['state_bytes'] / 1e6:.3f}"]) + " |" in page


def stored_presets(trace: Path, steps: int | None) -> dict[str, dict[str, float]]:
    fewer = "" if steps is None else f"_{steps}_steps"
    name = f"evaluate_{trace.name.split('_')[0]}_presets{fewer}.json"
    stored: dict[str, dict[str, float]] = json.loads((ROOT / "benchmarks" / "results" / name).read_text())
    return stored


@pytest.mark.slow
@pytest.mark.parametrize("steps", [None, 4])
@pytest.mark.parametrize("trace", [TRACE, PHOTOS], ids=lambda trace: trace.stem)
def test_presets_and_baselines_are_what_the_command_prints(trace: Path, steps: int | None) -> None:
    fewer = () if steps is None else ("--steps", steps)
    printed, stored = (
        run_json("evaluate", trace, "--preset", "all", "--baselines", *fewer, "--json", "-"),
        stored_presets(trace, steps),
    )
    assert list(printed) == list(stored)
    for row, values in stored.items():
        assert list(printed[row]) == list(values)
        for key, value in values.items():
            # what a sender of `transform` finds in floating point differs from processor to processor
            near = {"abs": 0.1} if key == "nmse_db" else {"rel": 3e-2 if "error" in key else 1e-3}
            assert printed[row][key] == pytest.approx(value, **near), (row, key)


@pytest.mark.parametrize("steps", [None, 4])
def test_presets_and_baselines(steps: int | None) -> None:
    both, page = [stored_presets(trace, steps) for trace in (TRACE, PHOTOS)], (ROOT / "docs" / "tools.md").read_text()
    assert list(both[0]) == list(both[1]) == [*PRESETS, *(name for name, _ in BASELINES)]
    for row in both[0]:
        cells = [f"{values[row]['request_bits_per_element']:.3f}" for values in both]
        for key in ("request_rel_error", "request_worst_step_rel_error"):
            cells += [f"{values[row][key]:.2e}" for values in both]
        assert "| " + " | ".join([row, *cells]) + " |" in page


@pytest.mark.parametrize("order", quick_for([2], [1, 2]))
def test_figures_with_a_quantized_state(order: int) -> None:
    results = ROOT / "benchmarks" / "results"
    names = {s: f"evaluate_digits_order{order}{s and '_state_' + s}.json" for s in ("", "int8", "fp8")}
    rows = {state: json.loads((results / name).read_text()) for state, name in names.items()}
    page = (ROOT / "docs" / "concepts.md").read_text()
    for state, played in (("int8", ("binary", "int4")), ("fp8", ("int2", "int8"))):  # each takes seconds
        chosen = [part for codec in played for part in ("--codec", codec)]
        printed = run_json("evaluate", TRACE, *chosen, "--order", order, "--state", state, "--json", "-")
        assert printed == {codec: pytest.approx(rows[state][codec], rel=1e-3) for codec in played}
        assert all(row["state_bytes"] == order * 104448 // 2 * 130 // 128 for row in printed.values())
    for codec in ("binary", "int2", "int4", "int8"):
        exact, *others = (rows[state][codec]["nmse_db"] for state in ("", "int8", "fp8"))
        cells = [codec, str(order), f"{exact:.2f}", *(f"{db:.2f} ({db - exact:+.2f})" for db in others)]
        assert "| " + " | ".join(cells) + " |" in page
