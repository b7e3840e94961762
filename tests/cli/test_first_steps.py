"""What a newcomer meets on the command line: help, completion, tables of 80 columns, files that cannot be written."""

from __future__ import annotations

import importlib
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from compactdist.cli import app
from tests.cli.kit import activations, run, trace

demo = importlib.import_module("compactdist.cli.demo")  # the package has a command of that name

ROW = {
    "route": "ulysses",
    "method": "binary-no-residual",
    "raw_bytes": 12_345_678_901,
    "wire_bytes": 1_234_567_890,
    "bits_per_element": 32.0,
    "call_bits_per_element": 16.123,
    "ratio": 14.38,
    "latent_rel_error": 1.2e-2,
    "psnr_db": 100.4,
    "seconds": 123.45,
}


def widest(text: str) -> int:
    return max(map(len, text.splitlines()))


@pytest.mark.parametrize(
    "command", [[], ["demo"], ["evaluate"], ["bench"], ["bench", "codecs"], ["plan"], ["doctor"]], ids=" ".join
)
def test_h_is_help(command: list[str]) -> None:
    short, long = run(*command, "-h"), run(*command, "--help")
    assert short.exit_code == 0
    assert "Usage:" in short.stdout
    assert short.stdout == long.stdout


def test_shell_completion() -> None:
    asked = {"_COMPACTDIST_COMPLETE": "complete_bash", "COMP_WORDS": "compactdist ev", "COMP_CWORD": "1"}
    completed = CliRunner().invoke(app, [], prog_name="compactdist", env=asked)
    assert completed.stdout.split() == ["evaluate"]
    assert "--install-completion" in run("--help").stdout


def test_tables_fit_80_columns_and_show_more_where_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = trace(tmp_path / "t.safetensors", {"a": activations(3)})
    shown: dict[int, list[str]] = {}
    for width in (80, 160):
        monkeypatch.setenv("COLUMNS", str(width))
        table = io.StringIO()
        console = Console(file=table, width=width)
        console.print(demo.table_of([ROW, ROW], 28, console))
        bench = run("bench", "codecs", "--shape", "128x96", "--rounds", "3", "--dtype", "float32")
        evaluated = run("evaluate", path, "--codec", "int4:scales=block,block=128,centroids=uniform")
        assert (bench.exit_code, evaluated.exit_code) == (0, 0), bench.output + evaluated.output
        shown[width] = [table.getvalue(), bench.stdout, evaluated.stdout]
        assert max(map(widest, shown[width])) <= width
    codecs = shown[80][1]
    assert "torch.quantize_per_tensor" in codecs
    assert "lowrank_int4, eager torch" in codecs
    assert all(head in codecs for head in ("x copy", "b/el", "NMSE", "gap"))
    assert "Gelem/s" not in codecs.split("Codecs take")[0]
    assert "Gelem/s" in shown[160][1].split("Codecs take")[0]
    assert "raw" in shown[160][0]


@pytest.mark.parametrize("bad", ["file/in/it", "."])
def test_a_file_that_cannot_be_written_is_one_line_and_status_2(tmp_path: Path, bad: str) -> None:
    (tmp_path / "file").write_text("a file, no folder")
    target = tmp_path / bad
    path = trace(tmp_path / "t.safetensors")
    commands: dict[str, list[Any]] = {
        "evaluate": ["evaluate", path, "--json", target],
        "bench": ["bench", "codecs", "--json", target],
        "plan": ["plan", "--link", "1gbit", "--json", target],
        "doctor": ["doctor", "--json", target],
        "demo": ["demo", "--out", tmp_path / "out", "--json", target],
    }
    if bad != ".":
        commands["demo, out"] = ["demo", "--out", target]
    for name, command in commands.items():
        result = run(*command)
        assert result.exit_code == 2, name
        assert result.stdout == "", name
        assert result.stderr.startswith(f"Error: cannot write {target}"), name
        assert result.stderr.count("\n") == 1, name


def test_json_goes_to_a_file_beside_the_table(tmp_path: Path) -> None:
    path, file = trace(tmp_path / "t.safetensors"), tmp_path / "new" / "rows.json"
    command = ["evaluate", path, "--codec", "int4", "--json"]
    with_file, to_stdout = run(*command, file), run(*command, "-")
    assert "int4" in with_file.stdout
    assert json.loads(file.read_text()) == json.loads(to_stdout.stdout)
    measured = run("bench", "codecs", "--shape", "64x64", "--rounds", "3", "--codec", "int4", "--json", "-")
    assert json.loads(measured.stdout)["shape"] == [64, 64]


@pytest.mark.parametrize(
    "arguments",
    [
        ["evaluate"],
        ["evaluate", "no/such/trace.safetensors"],
        ["evaluate", "TRACE", "--warmup", "99"],
        ["evaluate", "TRACE", "--warmup", "-1"],
        ["evaluate", "TRACE", "--damping", "0.3"],
        ["evaluate", "TRACE", "--order", "3"],
        ["evaluate", "TRACE", "--order", "fast"],
        ["evaluate", "TRACE", "--codec", "int99"],
        ["bench", "codecs", "--rounds", "1"],
        ["demo", "--route", "star"],
        ["nonsense"],
    ],
    ids=" ".join,
)
def test_wrong_arguments_are_status_2(tmp_path: Path, arguments: list[str]) -> None:
    path = str(trace(tmp_path / "t.safetensors"))
    result = run(*(path if argument == "TRACE" else argument for argument in arguments))
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Traceback" not in result.stderr


OWN_CODEC = Path(__file__).parents[2] / "examples" / "own_codec.py"


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_codec_of_ones_own_is_checked_and_evaluated_from_its_file(tmp_path: Path) -> None:
    """In processes of their own, for what is registered stays."""
    checked = subprocess.run([sys.executable, OWN_CODEC], capture_output=True, text=True, timeout=100)
    assert checked.stdout == "one_scale keeps the contract\n", checked.stderr
    file = trace(tmp_path / "t.safetensors")
    command = [sys.executable, "-m", "compactdist.cli", "evaluate", file, "--import", OWN_CODEC, "--codec"]
    played = subprocess.run([*command, "one_scale:levels=7", "--json", "-"], capture_output=True, text=True, timeout=60)
    assert played.returncode == 0, played.stderr
    assert 0 < json.loads(played.stdout)["one_scale:levels=7"]["rel_error"] < 0.2


def test_what_cannot_be_imported_is_named(tmp_path: Path) -> None:
    file = trace(tmp_path / "t.safetensors")
    broken = tmp_path / "broken.py"
    broken.write_text("import compactdist.no_such_module")
    for command in (["evaluate", str(file)], ["bench", "codecs"]):
        for name, why in (("no_such", "No module named"), (str(broken), "no_such_module"), ("gone.py", "No such file")):
            result = run(*command, "--import", name)
            assert result.exit_code == 2
            assert f"--import {name}" in result.stderr
            assert why in result.stderr
    result = run("evaluate", str(file), "--codec", "one_scale")
    assert "--import MODULE on the command line" in result.stderr
