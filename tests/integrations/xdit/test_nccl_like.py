"""On an inner group with NCCL's manners, xDiT sends and draws what it does on gloo."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from tests.integrations.xdit.ranks import run_worker

if any(importlib.util.find_spec(name) is None for name in ("xfuser", "triton", "yunchang")):
    pytest.skip("xfuser is not installed", allow_module_level=True)

pytestmark = [pytest.mark.xdit, pytest.mark.slow, pytest.mark.timeout(120)]

STEPS, LAYERS = 4, 4
CALLS = {"ring": STEPS * LAYERS, "ulysses": 2 * STEPS * LAYERS}  # of every rank


def test_flux_draws_the_same_bytes(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    run_worker("nccl_like_worker.py", out, timeout=100)
    ranks = json.loads(out.read_text())
    for route in ("ring", "ulysses", "pipefusion"):
        records = [rank[route] for rank in ranks]
        assert [record["same"] for record in records].count(True) == 1, route  # one rank has the picture
        assert not any(record["same"] is False for record in records), route
        for record in records:
            assert record["nccl"] == record["gloo"], route
            assert not any(stats["passed"] for stats in record["nccl"]), route
            calls = sum(stats["compressed"] for stats in record["nccl"])
            assert calls == CALLS[route] if route in CALLS else calls > STEPS, route
            assert record["issued"] >= calls, route
