"""Benchmarks write their numbers where `--json` says, standard output included."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import common

ROOT = Path(__file__).parents[1]
SCRIPT = """
import sys
from benchmarks import common

sys.argv[0] = "benchmarks/link/made_up.py"
args = common.parser("about").parse_args()
print("a table")
common.finish(args.json, {"rows": [1]})
"""


def run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", SCRIPT, *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)


def test_a_dash_leaves_standard_output_to_the_numbers(tmp_path: Path) -> None:
    done = run("--json", "-")
    written = json.loads(done.stdout)
    assert written["rows"] == [1]
    assert written["command"] == "python -m benchmarks.link.made_up --json -"
    assert "a table" in done.stderr
    assert not (ROOT / "-").exists()

    done = run("--json", str(tmp_path / "new" / "file.json"))
    assert json.loads((tmp_path / "new" / "file.json").read_text())["rows"] == [1]
    assert done.stdout.startswith("a table\nwritten to ")
    assert run().stdout == "a table\n"


def test_every_benchmark_takes_it_from_one_place() -> None:
    files = (ROOT / "benchmarks").rglob("*.py")
    own = [path.name for path in files if '"--json"' in path.read_text() and path.name != "common.py"]
    assert own == []


def test_a_default_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    parser = argparse.ArgumentParser()
    common.add_json(parser, Path("there"))
    assert parser.parse_args([]).json == Path("there")
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # parsing a dash replaces it
    assert parser.parse_args(["--json", "-"]).json == common.STDOUT
    assert sys.stdout is sys.stderr
