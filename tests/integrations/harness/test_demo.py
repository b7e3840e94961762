"""What the demo promises, seen by running it as a user would: xDiT on two CPU ranks, exact uncompressed, smaller and
close compressed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

safetensors_torch = pytest.importorskip("safetensors.torch")
if any(importlib.util.find_spec(name) is None for name in ("xfuser", "triton", "yunchang")):
    pytest.skip("xfuser is not installed", allow_module_level=True)

from compactdist_harness.digits import load_digits_pipeline  # noqa: E402

LAYERS = [f"{kind}.{n}.attn" for kind in ("transformer_blocks", "single_transformer_blocks") for n in (0, 1)]
RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"
STEPS = 28
SITES = {"ring": {"kv": "all_gather"}, "ulysses": {"qkv": "all_to_all", "out": "all_to_all"}}


pytestmark = [pytest.mark.xdit, pytest.mark.slow, pytest.mark.timeout(800)]


ROUTES = ["ring", "ulysses"]
METHODS = ["uncompressed", "int8", "int4", "int2", "binary", "binary-no-residual"]
Table = dict[tuple[str, str], dict[str, Any]]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Table, str]:
    """One run of the command, as a user starts it: its folder, the rows of its table, and what it shows.

    It takes a minute on all cores, so the workers of pytest-xdist share one: their folders lie in one of this run.
    """
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "demo"
    with FileLock(f"{folder}.lock", timeout=390):
        shown = folder / "shown.txt"
        if not shown.exists():
            shown.parent.mkdir(exist_ok=True)
            shown.write_text(_run(folder))
        printed = shown.read_text()
    rows = json.loads((folder / "t.json").read_text())["rows"]
    return folder, {(row["route"], row["method"]): row for row in rows}, printed


def _run(folder: Path) -> str:
    command = [sys.executable, "-m", "compactdist.cli", "demo", "--out", str(folder), "--json", str(folder / "t.json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, env=environment, timeout=380, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(params=ROUTES)
def route(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def results(demo: tuple[Path, Table, str], route: str) -> dict[str, Any]:
    """Every method's record and latents, by name."""
    return {
        path.stem: {
            **json.loads(path.read_text()),
            "latents": safetensors_torch.load_file(path.with_suffix(".safetensors"))["latents"],
        }
        for path in (demo[0] / route).glob("*.json")
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
    ("method", "least_ratio", "largest_error", "largest_ring_error"),
    [
        ("int8", 3.4, 0.001, 0.001),
        ("int4", 6.0, 0.01, 0.005),
        ("int2", 9.5, 0.04, 0.015),
        ("binary", 13.5, 0.12, 0.03),
    ],
)
def test_compressed_is_smaller_and_close(
    results: dict[str, Any],
    route: str,
    method: str,
    least_ratio: float,
    largest_error: float,
    largest_ring_error: float,
) -> None:
    record = results[method]
    assert record["raw_bytes"] / record["wire_bytes"] > least_ratio
    assert 0 < record["relative_error"] < (largest_ring_error if route == "ring" else largest_error)
    assert record["state_bytes"] > 0


def test_residuals_are_what_makes_one_bit_work(results: dict[str, Any]) -> None:
    assert results["binary-no-residual"]["relative_error"] > 5 * results["binary"]["relative_error"]


def test_call_sites_have_names(results: dict[str, Any]) -> None:
    record = results["int8"]
    for site, op in SITES[record["route"]].items():
        for layer in LAYERS:
            assert f"{site}/{layer}/{op}#0" in record["explain"].split()


def test_the_table_has_every_method_on_both_routes(demo: tuple[Path, Table, str]) -> None:
    folder, rows, shown = demo
    assert list(rows) == [(route, method) for route in ROUTES for method in METHODS]
    assert (folder / "samples.png").stat().st_size > 10_000
    assert "binary-no-residual" in shown
    assert "ulysses" in shown


@pytest.mark.parametrize(("method", "most"), [("binary", 1.25), ("int2", 2.25)])
def test_wire_bits_of_the_largest_buffers(demo: tuple[Path, Table, str], route: str, method: str, most: float) -> None:
    assert most - 0.25 < demo[1][route, method]["call_bits_per_element"] <= most


def test_the_table_is_the_one_in_the_readme(demo: tuple[Path, Table, str]) -> None:
    """To the byte; errors as far as machines round alike."""
    for row in json.loads((RESULTS / "demo.json").read_text())["rows"]:
        ours = demo[1][row["route"], row["method"]]
        assert (ours["raw_bytes"], ours["wire_bytes"]) == (row["raw_bytes"], row["wire_bytes"])
        assert ours["latent_rel_error"] == pytest.approx(row["latent_rel_error"], rel=0.5)


def test_bytes_of_the_table(demo: tuple[Path, Table, str], results: dict[str, Any], route: str) -> None:
    rows = {method: demo[1][route, method] for method in METHODS}
    raw = results["uncompressed"]["raw_bytes"]
    assert rows["uncompressed"]["wire_bytes"] == raw
    assert all(row["raw_bytes"] == raw for row in rows.values())
    assert all(row["latent_rel_error"] == results[method]["relative_error"] for method, row in rows.items())
    sizes = [rows[method]["wire_bytes"] for method in METHODS]
    assert sizes == sorted(sizes, reverse=True)
    assert rows["binary"]["ratio"] > 13
    assert rows["uncompressed"]["psnr_db"] is None
    assert rows["int8"]["psnr_db"] > rows["binary"]["psnr_db"] > rows["binary-no-residual"]["psnr_db"]
