"""A hook runs before every forward, however the module was compiled, and outside of its graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from compactdist_common import Patches, before_forwards, unwrapped

pytestmark = pytest.mark.filterwarnings("ignore")  # Dynamo warns of itself

X = torch.ones(2)


class Model(torch.nn.Module):
    def forward(self, x: torch.Tensor, timestep: float = 0.0) -> torch.Tensor:
        return x + 1


class Wrapper(torch.nn.Module):
    """As xfuser wraps a model."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module


def whole(model: torch.nn.Module, **options: Any) -> torch.nn.Module:
    return torch.compile(model, backend="eager", **options)


def in_place(model: torch.nn.Module, **options: Any) -> torch.nn.Module:
    model.compile(backend="eager", **options)
    return model


def count(module: torch.nn.Module) -> tuple[list[Any], Patches]:
    seen: list[Any] = []
    patches = Patches()
    before_forwards(module, lambda _, args, kwargs: seen.append(kwargs["timestep"]), patches)
    return seen, patches


def run(module: torch.nn.Module, times: int = 3) -> None:
    for _ in range(times):
        assert torch.equal(module(X, timestep=5.0), X + 1)


@pytest.mark.parametrize("compile_", [whole, in_place])
def test_compiled_before_it_costs_no_graph_break(compile_: Any) -> None:
    torch._dynamo.reset()
    module = compile_(Model(), fullgraph=True)
    run(module)
    seen, patches = count(module)
    run(module)
    patches.undo()
    run(module)
    assert seen == [5.0] * 3


@pytest.mark.parametrize("compile_", [lambda model: model, whole, in_place])
def test_compiled_later_or_never(compile_: Any) -> None:
    torch._dynamo.reset()
    model = Model()
    seen, patches = count(model)
    module = compile_(model)
    run(module)
    patches.undo()
    run(module)
    assert seen == [5.0] * 3


def test_a_module_compiled_anew_stays_so() -> None:
    torch._dynamo.reset()
    model = in_place(Model())
    seen, patches = count(model)
    in_place(model)
    latest = model._compiled_call_impl
    patches.undo()
    assert model._compiled_call_impl is latest
    run(model)
    assert seen == []


def test_out_of_wrappers() -> None:
    model = Model()
    for wrapped in (model, Wrapper(model), whole(model), whole(Wrapper(model)), Wrapper(whole(model))):
        assert unwrapped(wrapped) is model
