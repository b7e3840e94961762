"""Benchmarks write their numbers where `--json` says, standard output included."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import common

ROOT = Path(__file__).parents[1]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[str, str]]:
    """Run a made-up benchmark with some words, and get its standard output and error."""

    def made_up(*words: str) -> tuple[str, str]:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["benchmarks/link/made_up.py", *words])
            patch.setattr(sys, "stdout", sys.stdout)  # parsing a dash replaces it
            args = common.parser("about").parse_args()
            print("a table")
            common.finish(args.json, {"rows": [1]})
        out, err = capfd.readouterr()
        return out, err

    return made_up


def test_a_dash_leaves_standard_output_to_the_numbers(run: Callable[..., tuple[str, str]], tmp_path: Path) -> None:
    out, err = run("--json", "-")
    written = json.loads(out)
    assert written["rows"] == [1]
    assert written["command"] == "python -m benchmarks.link.made_up --json -"
    assert "a table" in err
    assert not (ROOT / "-").exists()

    out, _ = run("--json", str(tmp_path / "new" / "file.json"))
    assert json.loads((tmp_path / "new" / "file.json").read_text())["rows"] == [1]
    assert out.startswith("a table\nwritten to ")
    assert run() == ("a table\n", "")


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
