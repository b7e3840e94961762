"""The request after one that was broken off is what it would be without it: bit for bit."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from tests.integrations.xdit.ranks import run_worker

if any(importlib.util.find_spec(name) is None for name in ("xfuser", "triton", "yunchang")):
    pytest.skip("xfuser is not installed", allow_module_level=True)

pytestmark = [pytest.mark.xdit, pytest.mark.slow, pytest.mark.timeout(240)]


def run(part: str, out: Path) -> list[dict[str, dict[str, Any]]]:
    run_worker("abort_worker.py", out, part)
    return json.loads(out.read_text())


def test_broken_off_on_every_rank(tmp_path: Path) -> None:
    for seen in run("all", tmp_path / "out.json"):
        assert list(seen) == ["ring", "ulysses", "distrifusion"]
        for route, record in seen.items():
            assert record["ended"].startswith("BrokenOff"), (route, record)
            assert record["next"] == [True, True], (route, record)
            assert record["compressed calls"] > 0, route


def test_broken_off_on_one_rank_and_groups_made_anew(tmp_path: Path) -> None:
    ranks = run("one", tmp_path / "out.json")
    for rank, seen in enumerate(ranks):
        assert list(seen) == ["ring", "pipefusion"]
        for route, record in seen.items():
            # what the rank that went on waits for never comes
            assert record["ended"].startswith("BrokenOff" if rank == 1 else "RuntimeError"), (route, record)
            assert record["next"] == [True, True], (route, record)
            assert record["compressed calls"] > 0, route
        refusal = seen["pipefusion"]["with the same groups"]
        assert f"stage {rank}: the last request was broken off" in refusal, refusal
        assert "initialize_runtime_state" in refusal
