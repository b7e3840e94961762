"""``compactdist demo`` where it cannot run: a clear message, not a traceback."""

from __future__ import annotations

import importlib
import importlib.util

import pytest
from typer.testing import CliRunner

from compactdist.cli import app

demo = importlib.import_module("compactdist.cli.demo")  # the package has a command of that name


@pytest.fixture
def without_xfuser(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "xfuser" else found(name))


@pytest.mark.usefixtures("without_xfuser")
def test_without_xfuser_it_says_what_to_install(tmp_path):
    result = CliRunner().invoke(app, ["demo", "--out", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert "needs xfuser" in result.output
    assert "compactdist[xdit]" in result.output
    assert not (tmp_path / "out").exists()


def test_unknown_route(tmp_path):
    result = CliRunner().invoke(app, ["demo", "--out", str(tmp_path), "--route", "star"])
    assert result.exit_code == 2
    assert "unknown route star" in result.output


def test_a_failing_worker_is_reported_with_the_end_of_its_output(tmp_path, monkeypatch):
    monkeypatch.setattr(demo.sys, "executable", "/bin/false")
    with pytest.raises(demo.DemoError, match="ring run failed"):
        demo._run_workers("ring", tmp_path / "ring", 2, lambda done: None)


def test_version():
    result = CliRunner().invoke(app, ["--version"])
    assert result.exit_code == 0
    assert result.output.startswith("compactdist ")
