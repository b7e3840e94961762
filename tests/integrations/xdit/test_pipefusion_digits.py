"""Compressed PipeFusion on the trained digits FLUX, and what docs/quality.md says of it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

if any(importlib.util.find_spec(name) is None for name in ("xfuser", "triton", "yunchang")):
    pytest.skip("xfuser is not installed", allow_module_level=True)

pytestmark = [pytest.mark.xdit, pytest.mark.timeout(240)]

ROOT = Path(__file__).parents[3]
STORED = ROOT / "benchmarks" / "results" / "pipefusion_quality.json"


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    out = tmp_path_factory.mktemp("pipefusion") / "rows.json"
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.quality.pipefusion_quality", "--seeds", "1"]
    command += ["--variants", "int4", "int4, order 2", "int4, its ends too"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--json", str(out)],
        cwd=ROOT,
        env=environment,
        timeout=220,
        capture_output=True,
        text=True,
        check=False,
    )
    assert out.exists(), done.stdout[-2000:] + done.stderr[-4000:]
    return {row["variant"]: row for row in json.loads(out.read_text())["rows"]}


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["int4", "int4, order 2"])
def test_within_one_percent_of_uncompressed_pipefusion(rows: dict[str, dict[str, Any]], variant: str) -> None:
    assert 0 < rows[variant]["median"] <= 1e-2


@pytest.mark.slow
def test_eight_bits_at_both_ends_pay(rows: dict[str, dict[str, Any]]) -> None:
    plain, fine = rows["int4, its ends too"], rows["int4"]
    assert fine["median"] < 0.8 * plain["median"]
    assert plain["wire_bytes"] < fine["wire_bytes"] < 1.15 * plain["wire_bytes"]


def test_quality_page_shows_the_stored_results() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "benchmarks.quality.pipefusion_quality", "--show", str(STORED)],
        cwd=ROOT,
        timeout=100,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.count("\n") > 10
    assert done.stdout in (ROOT / "docs" / "quality.md").read_text()
    stored = {row["variant"]: row for row in json.loads(STORED.read_text())["rows"]}
    assert stored["int4"]["max"] <= 1e-2
