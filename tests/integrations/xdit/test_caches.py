"""TeaCache and FBCache of xfuser average what they decide by over all ranks: nothing is left for the adapter to do."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from tests.integrations.xdit.ranks import run_worker

if any(importlib.util.find_spec(name) is None for name in ("xfuser", "triton", "yunchang")):
    pytest.skip("xfuser is not installed", allow_module_level=True)

pytestmark = [pytest.mark.xdit, pytest.mark.slow, pytest.mark.timeout(240)]

STEPS = 8


def test_ranks_that_would_part_skip_together(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    run_worker("caches_worker.py", out)
    ranks = json.loads(out.read_text())
    for method, computes_first in (("fbcache", True), ("teacache", False)):
        own, together = ([[step[which] for step in r[method]["noted"]] for r in ranks] for which in (0, 1))
        assert own[0] != own[1], f"{method}: ranks do not part at this threshold: {own}"
        assert together[0] == together[1], method
        skipped = sum(together[0])
        assert 0 < skipped < STEPS - 1, method
        assert 1e-6 < next(r[method]["error"] for r in ranks if r[method]["error"] is not None) < 2e-2
        for rank in ranks:
            for key, (calls, keyframes) in rank[method]["sites"].items():
                first = computes_first and ".transformer_blocks.0.attn" in key
                assert (calls, keyframes) == (STEPS if first else STEPS - skipped, 1), (method, key)
