"""What the demo promises: errors, sizes and files, seen by running it as a user would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.xdit, pytest.mark.slow, pytest.mark.timeout(400)]

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
MOST = {"int8": 1e-3, "int4": 5e-3, "int2": 1.5e-2, "binary": 3e-2}
METHODS = ["uncompressed", "int8", "int4", "int2", "binary", "binary-no-residual"]


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "-m", "compactdist.cli", "demo", "--out", str(folder), "--json", str(folder / "t.json")]
    done = subprocess.run(command, env=ENVIRONMENT, timeout=380, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((folder / "t.json").read_text())["rows"]
    return folder, {(row["route"], row["method"]): row for row in rows}, done.stdout


def test_every_method_on_both_routes(table):
    folder, rows, shown = table
    assert list(rows) == [(route, method) for route in ("ring", "ulysses") for method in METHODS]
    assert (folder / "samples.png").stat().st_size > 10_000
    assert "binary-no-residual" in shown
    assert "ulysses" in shown


@pytest.mark.parametrize("method", MOST)
def test_ring_errors(table, method):
    assert 0 < table[1]["ring", method]["latent_rel_error"] <= MOST[method]


def test_ulysses_int4(table):
    assert 0 < table[1]["ulysses", "int4"]["latent_rel_error"] <= 1e-2


@pytest.mark.parametrize("route", ["ring", "ulysses"])
def test_residuals_matter(table, route):
    rows = table[1]
    with_history = rows[route, "binary"]["latent_rel_error"]
    assert rows[route, "binary-no-residual"]["latent_rel_error"] >= 5 * with_history


@pytest.mark.parametrize("route", ["ring", "ulysses"])
@pytest.mark.parametrize(("method", "most"), [("binary", 1.25), ("int2", 2.25)])
def test_wire_bits_of_the_largest_buffers(table, route, method, most):
    assert most - 0.25 < table[1][route, method]["call_bits_per_element"] <= most


@pytest.mark.parametrize("route", ["ring", "ulysses"])
def test_bytes(table, route):
    rows = {method: table[1][route, method] for method in METHODS}
    # 4 layers x 28 steps x 2 ranks; each rank sends K and V (ring) or q, k, v and the output to the other (Ulysses):
    # 10 pictures x 34 of 68 tokens x 128 channels each
    elements = 4 * 28 * 2 * 2 * 10 * 34 * 128
    assert rows["uncompressed"]["raw_bytes"] == rows["uncompressed"]["wire_bytes"] == 4 * elements
    assert all(row["raw_bytes"] == 4 * elements for row in rows.values())
    sizes = [rows[method]["wire_bytes"] for method in METHODS]
    assert sizes == sorted(sizes, reverse=True)
    assert rows["binary"]["ratio"] > 13
    assert rows["uncompressed"]["psnr_db"] is None
    assert rows["int8"]["psnr_db"] > rows["binary"]["psnr_db"] > rows["binary-no-residual"]["psnr_db"]


@pytest.mark.slow
def test_the_layout_beats_one_global_scale(tmp_path):
    worker = Path(__file__).with_name("global_scale_worker.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(worker), str(tmp_path / "errors.json")]
    done = subprocess.run(command, env=ENVIRONMENT, timeout=200, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    errors = json.loads((tmp_path / "errors.json").read_text())
    assert errors["layout"] < 0.9 * errors["global"], errors
