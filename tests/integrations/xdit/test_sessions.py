"""Pipelines and requests that meet in one process stay apart, also when interleaved."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from tests.integrations.xdit.ranks import run_worker

if any(importlib.util.find_spec(name) is None for name in ("xfuser", "triton", "yunchang")):
    pytest.skip("xfuser is not installed", allow_module_level=True)

pytestmark = [pytest.mark.xdit, pytest.mark.slow, pytest.mark.timeout(240)]

MUST_HOLD = (
    "restored",
    "alternating",
    "inner 2",
    "inner 5",
    "interleaved",
    "other goes on",
    "restored at last",
    "uncompressed again",
    "batch changes",
)


@pytest.mark.parametrize("route", ["ulysses", "ring"])
def test_sessions(route: str, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    run_worker("sessions_worker.py", out, route)
    ranks = json.loads(out.read_text())
    for seen in ranks:
        assert all(seen[name] for name in MUST_HOLD), seen
        assert "already enabled for this pipeline" in seen["twice"]
    assert ranks[1]["compressed"]  # this rank has the output
