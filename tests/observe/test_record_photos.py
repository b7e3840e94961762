"""The second committed trace, and the tool that records it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from compactdist.observe.trace import Trace

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "record_photos.py"
COMMITTED = ROOT / "benchmarks" / "traces" / "photos_dit.safetensors"
KEYS, VALUES = SITES = ["k/transformer_blocks.2.attn1", "v/transformer_blocks.4.attn1"]


def test_the_committed_trace_is_what_the_docs_say() -> None:
    trace = Trace(COMMITTED)
    assert COMMITTED.stat().st_size < 4_500_000
    assert trace.sites == SITES
    for site in SITES:
        x = trace.load(site)
        assert x.shape == (28, 2 * 128, 144)  # two pictures, half of 256 tokens each
        assert x.dtype == torch.bfloat16
        assert trace.groups(site, x.shape[1]) == 1


def test_the_committed_trace_says_where_it_is_from() -> None:
    about = Trace(COMMITTED).metadata
    config = json.loads(about["config"])
    assert about["model"] == "diffusers.DiTTransformer2DModel"
    assert config["num_attention_heads"] * config["attention_head_dim"] == 144
    assert "load_sample_images" in about["data"]
    assert (about["seed"], about["steps"]) == ("0", "28")
    options = f"--train-steps {about['train_steps']} --seed {about['seed']}"
    assert about["made by"].startswith(f"python tools/{TOOL.name} {options}")
    assert json.loads(about["sites"]) == SITES
    assert 0 < float(about["loss"]) < 0.5  # a model that has learnt nothing is at about 1.3


def test_its_tensors_differ_and_change_slowly() -> None:
    trace = Trace(COMMITTED)
    keys, values = (trace.load(site).float() for site in SITES)
    assert not torch.equal(keys, values)
    for x in (keys, values):
        assert 0 < float((x[1:] - x[:-1]).norm() / x[1:].norm()) < 0.5
        first, second = x.chunk(2, dim=1)
        assert float((first - second).norm() / first.norm()) > 0.1  # the two pictures


def recorded(folder: Path, name: str) -> dict[str, Tensor]:
    out = folder / name
    command = [sys.executable, str(TOOL), "--out", str(out), "--train-steps", "2", "--batch", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, env=os.environ.copy(), cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    trace = Trace(out)
    assert trace.metadata["train_steps"] == "2"
    return {site: trace.load(site) for site in trace.sites}


@pytest.mark.xdit
@pytest.mark.slow
@pytest.mark.timeout(240)
def test_the_tool_records_a_trace(tmp_path: Path) -> None:
    """After two steps of training; that of the digits is recorded again and compared."""
    pytest.importorskip("diffusers")
    pytest.importorskip("sklearn")
    found = recorded(tmp_path, "trace.safetensors")
    assert sorted(found) == SITES
    for x in found.values():
        assert x.shape == (28, 2 * 128, 144)
        assert 0 < float((x[1:].float() - x[:-1].float()).norm() / x[1:].float().norm()) < 1
