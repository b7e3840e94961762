"""A steady call stays short: Python calls and files of the project that it enters, as benchmarks/link measures them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from compactdist import _torch

ROOT = Path(__file__).resolve().parents[2]
MOST_PYTHON_CALLS = 60
MOST_FILES = 18 + (_torch.VERSION < (2, 13))  # before, torch enters by a name whose wrapper is in _torch.py


def test_a_steady_all_gather_enters_few_frames_and_files(tmp_path):
    written = tmp_path / "cost.json"
    command = [
        sys.executable,
        "-m",
        "benchmarks.link.host_cost",
        "--rounds",
        "2",
        "--steps",
        "2",
        "--json",
        str(written),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = json.loads(written.read_text())["results"]["this"]
    assert counts["python_calls"] <= MOST_PYTHON_CALLS
    assert counts["files"] <= MOST_FILES
