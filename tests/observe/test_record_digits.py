"""The committed trace is what its tool records from the real pipeline."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from compactdist.observe.trace import Trace

ROOT = Path(__file__).parents[2]
COMMITTED = ROOT / "benchmarks" / "traces" / "digits_ring.safetensors"
SITES = ["kv/single_transformer_blocks.1.attn/all_gather#0", "kv/transformer_blocks.0.attn/all_gather#0"]


def test_the_committed_trace_is_what_the_docs_say() -> None:
    trace = Trace(COMMITTED)
    assert trace.sites == SITES
    assert COMMITTED.stat().st_size <= 3_000_000
    assert trace.metadata["codec"] == "Raw()"
    assert trace.metadata["rank"] == "0 of 2"
    for site in SITES:
        x = trace.load(site)
        assert x.shape == (28, 2 * 3 * 34, 128)  # K and V, three digits, half of 4 + 64 tokens
        assert x.dtype == torch.float16
        assert trace.groups(site, x.shape[1]) == 2


@pytest.mark.xdit
@pytest.mark.slow
def test_the_tool_records_it_again(tmp_path: Path) -> None:
    if any(importlib.util.find_spec(name) is None for name in ("xfuser", "triton", "yunchang")):
        pytest.skip("xfuser is not installed")
    out = tmp_path / "again.safetensors"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(ROOT / "tools" / "record_digits.py"), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, env=os.environ.copy())
    assert done.returncode == 0, done.stdout + done.stderr
    committed, again = Trace(COMMITTED), Trace(out)
    assert again.sites == committed.sites
    for site in SITES:
        x, y = committed.load(site).float(), again.load(site).float()
        assert float((x - y).norm() / x.norm()) < 1e-3
