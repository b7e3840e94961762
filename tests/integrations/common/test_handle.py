"""What every adapter's handle does, and how models are found and asked for their timestep."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from compactdist_common import Handle, Patches, timestep_of, unwrapped


class Group:
    def __init__(self, name: str) -> None:
        self.name = name

    def stats(self, *, wait: bool) -> str:
        return f"stats of {self.name}" if wait else f"what is known of {self.name}"

    def explain(self, *, wait: bool) -> str:
        return f"table of {self.name}"


def test_a_handle_asks_its_groups_and_gives_back_once() -> None:
    groups: dict[str, Any] = {}
    told: list[str] = []
    patches = Patches()
    patches.add(lambda: told.append("given back"))
    with Handle(lambda: groups, patches) as handle:
        assert handle.explain() == ""
        groups |= {"ring": Group("one"), "ulysses": Group("two")}  # wrapped after `enable`
        assert handle.groups is groups
        assert told == []
    handle.disable()
    assert told == ["given back"]
    assert handle.stats() == {"ring": "stats of one", "ulysses": "stats of two"}
    assert handle.stats(wait=False)["ring"] == "what is known of one"
    assert handle.explain() == "ring\ntable of one\n\nulysses\ntable of two"


def test_wrappers_are_opened() -> None:
    plain, layer = SimpleNamespace(name="pipe"), torch.nn.Linear(1, 1)
    assert unwrapped(SimpleNamespace(module=SimpleNamespace(module=plain))) is plain
    assert unwrapped(plain) is plain
    holder = torch.nn.Module()
    holder.module = layer
    assert unwrapped(holder) is layer
    assert unwrapped(layer) is layer
    assert unwrapped(None) is None


class Model(torch.nn.Module):
    def forward(self, hidden_states: torch.Tensor, timestep: Any = None) -> torch.Tensor:
        return hidden_states


@pytest.mark.parametrize("compiled", [False, True])
def test_timesteps(compiled: bool) -> None:
    model: Any = torch.compile(Model(), backend="eager") if compiled else Model()
    x = torch.ones(1)
    assert timestep_of(model, (x,), {"timestep": 5}) == 5
    assert timestep_of(model, (x, torch.tensor([7.0, 7.0])), {}) == 7
    assert timestep_of(model, (x,), {"timestep": torch.tensor([[0.0, 3.0, 3.0]])}) == 3
    assert timestep_of(model, (x,), {}) is None


def test_adapters_import_neither_frameworks_nor_the_harness() -> None:
    script = """
import pkgutil, sys, importlib
for name in ("compactdist_common", "compactdist_xdit", "compactdist_diffusers"):
    package = importlib.import_module(name)
    for module in pkgutil.walk_packages(package.__path__, name + "."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    unwanted = {"xfuser", "diffusers", "yunchang", "compactdist_harness"} & sys.modules.keys()
    assert not unwanted, (name, unwanted)
print("done")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "done\n", done.stderr
