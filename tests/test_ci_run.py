"""What `.ci/run` does in which order, and what it says of it: with programs in the place of make, and no tests run."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Notes what it is asked for; makes an environment that can be shown; fails where a word of BROKEN is in the request,
# and takes long where SLOW is.
MAKE = """#!/usr/bin/env bash
echo "$*" >> "$ASKED"
for word in $BROKEN; do
    [[ "$*" != *"$word"* ]] || exit 1
done
[[ -z $SLOW || "$*" != *"$SLOW"* ]] || exec /bin/sleep 50
case $2 in
    venv) place=$VENV ;;
    venv-torch) place=$VENV-torch-${3#TORCH=} ;;
    *) exit 0 ;;
esac
mkdir -p "$place/bin"
ln -sf "$(type -P true)" "$place/bin/python"
"""
MAIN = ["venv", "test-all PYTEST_ARGS=--durations=40"]
OTHERS = ["2.11.0", "2.14.1", "2.12.1"]


def on(*versions: str) -> list[str]:
    return [f"test-torch TORCH={version}" for version in versions]


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
        env={**kept, "BROKEN": "", "SLOW": "", **places, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert not [path for path in folder.iterdir() if path.name.startswith("tmp.")], "environments are left behind"
    asked = (folder / "asked").read_text().replace("--no-print-directory ", "").splitlines()
    return asked, done.stdout + done.stderr, done.returncode


def parts(asked: list[str]) -> tuple[list[str], list[str]]:
    """What is done in order, and the versions that are installed beside it, which is in any order: sorted."""
    install = "venv-torch TORCH="
    installed = sorted(what.removeprefix(install) for what in asked if what.startswith(install))
    return [what for what in asked if not what.startswith(install)], installed


def test_other_versions_of_torch_follow_while_there_is_time(tmp_path: Path) -> None:
    asked, said, status = ci(tmp_path)
    assert (*parts(asked), status) == (MAIN + on(*OTHERS), sorted(OTHERS), 0)
    assert "torch 2.11.0: passed\n.ci/run: torch 2.14.1: passed\n.ci/run: torch 2.12.1: passed" in said


def test_without_time_it_says_that_they_were_not_run(tmp_path: Path) -> None:
    asked, said, status = ci(tmp_path, MINUTES="2")
    assert (parts(asked)[0], status) == (MAIN, 0)
    for version in OTHERS[:2]:
        assert f"torch {version}: not run, for after 0 of 2 minutes 3 more may be needed" in said


def test_what_is_not_installed_yet_takes_longer(tmp_path: Path) -> None:
    """Bash counts on from the seconds that it is told have passed."""
    asked, said, status = ci(tmp_path, SECONDS="2280")
    assert (parts(asked)[0], status) == (MAIN + on("2.11.0", "2.14.1"), 0)
    assert "torch 2.12.1: not run, for after 38 of 45 minutes 8 more may be needed" in said


def test_without_room_on_the_disk_each_is_installed_before_its_tests(tmp_path: Path) -> None:
    (tmp_path / "df").write_text("#!/bin/sh\necho Avail; echo 29G\n")
    (tmp_path / "df").chmod(0o755)
    asked, _, status = ci(tmp_path)
    each = [f"{step} TORCH={version}" for version in OTHERS for step in ("venv-torch", "test-torch")]
    assert (asked, status) == (MAIN + each, 0)


@pytest.mark.parametrize("named", [[], ["2.14.1"]])
def test_versions_that_are_named_are_run_however_late_it_is(tmp_path: Path, named: list[str]) -> None:
    asked, said, status = ci(tmp_path, OTHER_TORCH=" ".join(named), MINUTES="0")
    assert (*parts(asked), status) == (MAIN + on(*named), named, 0)
    assert ("torch 2.14.1: passed" in said) == bool(named)


@pytest.mark.parametrize("named", [None, " ".join(OTHERS)])
def test_a_torch_that_cannot_be_installed_fails_the_run_if_it_was_named(tmp_path: Path, named: str | None) -> None:
    names = {} if named is None else {"OTHER_TORCH": named}
    asked, said, status = ci(tmp_path, BROKEN="2.11.0", **names)
    assert parts(asked) == (MAIN + on(*OTHERS[1:]), ["2.11.0", *sorted(OTHERS)])
    assert status == (named is not None)
    assert "torch 2.11.0: not run, for it cannot be installed" in said
    assert "torch 2.14.1: passed" in said


@pytest.mark.parametrize("broken", ["test-all", "test-torch"])
def test_tests_that_fail_do_not_keep_others_from_running_and_fail_the_run(tmp_path: Path, broken: str) -> None:
    asked, said, status = ci(tmp_path, BROKEN=broken)
    assert (*parts(asked), status) == (MAIN + on(*OTHERS), sorted(OTHERS), 1)
    assert f"failed: {'checks or tests on torch 2.13.0' if broken == 'test-all' else 'tests on torch 2.11.0'}" in said


def test_what_is_still_being_installed_at_the_end_is_ended_and_removed(tmp_path: Path) -> None:
    asked, _, status = ci(tmp_path, MINUTES="0", SLOW="venv-torch")
    assert (parts(asked)[0], status) == (MAIN, 0)


def test_without_the_main_environment_nothing_is_run(tmp_path: Path) -> None:
    asked, said, status = ci(tmp_path, BROKEN="venv")
    assert (asked, status) == (["venv", "venv"], 1)
    assert "torch 2.13.0, or what the tests need beside it, cannot be installed" in said
