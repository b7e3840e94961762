"""`cpu.xdit.install` refuses what it cannot do. test_demo.py runs what it makes possible."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

import pytest
import torch

from compactdist_harness.cpu import xdit as xdit_on_cpu

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="does nothing where CUDA is available")


def test_after_xfuser_is_too_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xfuser.envs", ModuleType("xfuser.envs"))
    with pytest.raises(RuntimeError, match="before xfuser is imported"):
        xdit_on_cpu.install()


def test_second_time_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    envs = ModuleType("xfuser.envs")
    setattr(envs, xdit_on_cpu._MARK, True)
    monkeypatch.setitem(sys.modules, "xfuser.envs", envs)
    finders = list(sys.meta_path)
    xdit_on_cpu.install()
    assert sys.meta_path == finders


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "xfuser.envs", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"xfuser and triton; install with: pip install xfuser"):
        xdit_on_cpu.install()
