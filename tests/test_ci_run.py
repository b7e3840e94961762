"""What `.ci/run` does in which order, and what it says of it: with programs in the place of make, and no tests run."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Notes what it is asked for; makes an environment that can be shown; fails where a word of BROKEN is in the request.
MAKE = """#!/usr/bin/env bash
echo "$*" >> "$ASKED"
for word in $BROKEN; do
    [[ "$*" != *"$word"* ]] || exit 1
done
version=${3#TORCH=}
mkdir -p "$VENV/bin" "$VENV-torch-$version/bin"
ln -sf "$(type -P true)" "$VENV/bin/python"
ln -sf "$(type -P true)" "$VENV-torch-$version/bin/python"
"""
MAIN = ["venv", "test-all PYTEST_ARGS=--durations=40"]


OTHERS = ["2.11.0", "2.14.1"]


def on(*versions: str) -> list[str]:
    """All are installed at a time, which is in any order, and then tested one after another."""
    return [f"{step} TORCH={version}" for step in ("venv-torch", "test-torch") for version in versions]


def ci(folder: Path, **environment: str) -> tuple[list[str], str, int]:
    """What make was asked for, what the script printed, and its exit status."""
    for name, text in (("make", MAKE), ("sleep", "#!/bin/sh\n")):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if name not in ("OTHER_TORCH", "MINUTES")}
    places = {
        "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
        "TMPDIR": str(folder),
        "ASKED": str(folder / "asked"),
    }
    done = subprocess.run(
        [str(ROOT / ".ci" / "run")],
        env={**kept, "BROKEN": "", **places, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert not [path for path in folder.iterdir() if path.name.startswith("tmp.")], "environments are left behind"
    asked = (folder / "asked").read_text().replace("--no-print-directory ", "").splitlines()
    installed = [place for place, what in enumerate(asked) if what.startswith("venv-torch")]
    if installed:
        first, last = installed[0], installed[-1] + 1
        asked[first:last] = sorted(asked[first:last])
    return asked, done.stdout + done.stderr, done.returncode


def test_other_versions_of_torch_follow_while_there_is_time(tmp_path: Path) -> None:
    asked, said, status = ci(tmp_path)
    assert (asked, status) == (MAIN + on(*OTHERS), 0)
    assert "torch 2.11.0: passed\n.ci/run: torch 2.14.1: passed" in said


def test_without_time_it_says_that_they_were_not_run(tmp_path: Path) -> None:
    asked, said, status = ci(tmp_path, MINUTES="7")
    assert (asked, status) == (MAIN, 0)
    for version in OTHERS:
        assert f"torch {version}: not run, for after 0 of 7 minutes 8 more may be needed" in said


def test_those_are_run_for_which_there_is_time(tmp_path: Path) -> None:
    asked, said, status = ci(tmp_path, MINUTES="15")
    assert (asked, status) == (MAIN + on("2.11.0"), 0)
    assert "torch 2.14.1: not run, for after 0 of 15 minutes 16 more may be needed" in said


@pytest.mark.parametrize(("named", "asked"), [("", []), ("2.14.1", on("2.14.1"))])
def test_versions_that_are_named_are_run_however_late_it_is(tmp_path: Path, named: str, asked: list[str]) -> None:
    found, said, status = ci(tmp_path, OTHER_TORCH=named, MINUTES="0")
    assert (found, status) == (MAIN + asked, 0)
    assert ("torch 2.14.1: passed" in said) == bool(named)


@pytest.mark.parametrize("named", [None, "2.11.0 2.14.1"])
def test_a_torch_that_cannot_be_installed_fails_the_run_if_it_was_named(tmp_path: Path, named: str | None) -> None:
    names = {} if named is None else {"OTHER_TORCH": named}
    asked, said, status = ci(tmp_path, BROKEN="2.11.0", **names)
    installed = ["venv-torch TORCH=2.11.0"] * 2 + ["venv-torch TORCH=2.14.1"]
    assert (sorted(asked[:-1]), status) == (sorted(MAIN + installed), named is not None)
    assert asked[-1] == "test-torch TORCH=2.14.1"
    assert "torch 2.11.0: not run, for it cannot be installed" in said
    assert "torch 2.14.1: passed" in said


@pytest.mark.parametrize("broken", ["test-all", "test-torch"])
def test_tests_that_fail_do_not_keep_others_from_running_and_fail_the_run(tmp_path: Path, broken: str) -> None:
    asked, said, status = ci(tmp_path, BROKEN=broken)
    assert (asked, status) == (MAIN + on(*OTHERS), 1)
    assert f"failed: {'checks or tests on torch 2.13.0' if broken == 'test-all' else 'tests on torch 2.11.0'}" in said


def test_without_the_main_environment_nothing_is_run(tmp_path: Path) -> None:
    asked, said, status = ci(tmp_path, BROKEN="venv")
    assert (asked, status) == (["venv", "venv"], 1)
    assert "torch 2.13.0, or what the tests need beside it, cannot be installed" in said
