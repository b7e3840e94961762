"""A compiled transformer communicates compressed, in as many calls as an eager one, whoever compiled it and when."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.integrations.xdit.ranks import run_worker

if any(importlib.util.find_spec(name) is None for name in ("xfuser", "triton", "yunchang")):
    pytest.skip("xfuser is not installed", allow_module_level=True)

pytestmark = [pytest.mark.xdit, pytest.mark.timeout(300)]

# Of one launch each. Most of their time is spent tracing, so each way, before and after, is some model's.
CELLS = {
    "flux": [
        *(f"flux/ring/{way}/before/eager" for way in ("repeated blocks", "forward", "runner", "runner by blocks")),
        "flux/ring/runner/after/eager",
        "flux/ring/wrapper/after/aot_eager",
    ],
    # diffusers names no repeated blocks of SD3, PixArt and CogVideoX, so compile_repeated_blocks raises there
    "ring": [
        "pixart/ring/in place/before/eager",
        "cogvideox/ring/inner/after/eager",
        "wan/ring/repeated blocks/after/eager",
    ],
    "ulysses": [
        "flux/ulysses/wrapper/before/eager",
        "sd3/ulysses/in place/after/eager",
        "wan/ulysses/inner/before/eager",
    ],
}


def check(cells: Sequence[str], out: Path) -> None:
    run_worker("compile_worker.py", out, ", ".join(cells), timeout=280)
    ranks: list[dict[str, dict[str, Any]]] = json.loads(out.read_text())
    for records in ranks:
        assert list(records) == list(cells)
        for name, record in records.items():
            assert record["calls"] == record["eager calls"] > 0, (name, record)
            assert record["passed"] == {}, (name, record)
            assert record["repeats"], name
            assert record["graphs"] > 0, name
            assert record["breaks"] == {}, (name, record)
    for name, record in ranks[-1].items():  # this rank has the output
        # a graph holds no layouts, so the rounding differs from an eager model's
        assert 1e-7 < record["error"] < 3 * record["eager error"] < 2e-2, (name, record)


@pytest.mark.slow
@pytest.mark.parametrize("launch", CELLS)
def test_every_way_to_compile(launch: str, tmp_path: Path) -> None:
    check(CELLS[launch], tmp_path / "out.json")
