"""The real xDiT pipeline on two CPU ranks: exact uncompressed, smaller and close compressed."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

safetensors_torch = pytest.importorskip("safetensors.torch")
if any(importlib.util.find_spec(name) is None for name in ("xfuser", "triton", "yunchang")):
    pytest.skip("xfuser is not installed", allow_module_level=True)

from compactdist_harness.digits import load_digits_pipeline  # noqa: E402

LAYERS = [f"{kind}.{n}.attn" for kind in ("transformer_blocks", "single_transformer_blocks") for n in (0, 1)]
STEPS = 28
SITES = {"ring": {"kv": "all_gather"}, "ulysses": {"qkv": "all_to_all", "out": "all_to_all"}}


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["ring", "ulysses"])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every method's record and latents, by name, from one launch of the worker."""
    out = tmp_path_factory.mktemp(request.param)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "compactdist_harness.demo_worker", "--route", request.param, "--out", str(out)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ.copy())
    assert run.returncode == 0, run.stdout + run.stderr
    return {
        path.stem: {
            **json.loads(path.read_text()),
            "latents": safetensors_torch.load_file(path.with_suffix(".safetensors"))["latents"],
        }
        for path in out.glob("*.json")
    }


@pytest.fixture(scope="module")
def plain() -> torch.Tensor:
    pipe, call_kwargs = load_digits_pipeline()
    return pipe(**call_kwargs)[0]


def test_uncompressed_equals_plain_diffusers(results: dict[str, Any], plain: torch.Tensor) -> None:
    record = results["uncompressed"]
    assert torch.allclose(record["latents"], plain, atol=1e-5)
    assert record["wire_bytes"] == record["raw_bytes"]
    assert record["compressed_calls"] == 0


def test_raw_bytes_are_what_the_shapes_say(results: dict[str, Any]) -> None:
    """Batch 10, 68 tokens, 128 channels, float32, two ranks with half of the tokens each."""
    one_tensor = 10 * 34 * 128 * 4  # what one rank holds of Q, K, V or the output
    per_layer = {"ring": 2 * one_tensor, "ulysses": (3 + 1) * one_tensor // 2}  # Ulysses keeps its own half
    for record in results.values():
        assert record["raw_bytes"] == 2 * STEPS * len(LAYERS) * per_layer[record["route"]]


@pytest.mark.parametrize(
    ("method", "least_ratio", "largest_error"),
    [("int8", 3.4, 0.001), ("int4", 6.0, 0.01), ("int2", 9.5, 0.04), ("binary", 13.5, 0.12)],
)
def test_compressed_is_smaller_and_close(
    results: dict[str, Any], method: str, least_ratio: float, largest_error: float
) -> None:
    record = results[method]
    assert record["raw_bytes"] / record["wire_bytes"] > least_ratio
    assert 0 < record["relative_error"] < largest_error
    assert record["state_bytes"] > 0


def test_residuals_are_what_makes_one_bit_work(results: dict[str, Any]) -> None:
    assert results["binary-no-residual"]["relative_error"] > 3 * results["binary"]["relative_error"]


def test_call_sites_have_names(results: dict[str, Any]) -> None:
    record = results["int8"]
    for site, op in SITES[record["route"]].items():
        for layer in LAYERS:
            assert f"{site}/{layer}/{op}#0" in record["explain"].split()
