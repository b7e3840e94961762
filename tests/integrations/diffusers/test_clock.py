"""Steps, requests and branches as the wrapped groups see them, without diffusers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import compactdist
from compactdist_common import Patches
from compactdist_diffusers.adapter import without_gathers
from compactdist_diffusers.clock import Clock


class Group:
    """Writes down what the clock tells it."""

    def __init__(self) -> None:
        self.history: list[str] = []

    def step(self) -> None:
        self.history.append("step")

    def reset(self) -> None:
        self.history.append("reset")

    @contextlib.contextmanager
    def branch(self, name: str) -> Iterator[None]:
        self.history.append(f"into {name}")
        yield
        self.history.append(f"out of {name}")


class Model(torch.nn.Module):
    def forward(self, hidden_states: torch.Tensor, timestep: Any = None) -> torch.Tensor:
        return hidden_states + 1

    @contextlib.contextmanager
    def cache_context(self, name: str, **where: int) -> Iterator[int]:
        yield where.get("step_index", -1)


class Scheduler:
    def set_timesteps(self, count: int) -> int:
        return count


X = torch.ones(2)


def followed(**options: Any) -> tuple[Model, Group, Clock, Patches]:
    model, group, patches = Model(), Group(), Patches()
    clock = Clock([group], **options)
    clock.follow_model(model, patches)
    return model, group, clock, patches


@pytest.mark.parametrize("forwards", [1, 2, 3])
def test_a_step_is_another_timestep(forwards: int) -> None:
    model, group, clock, _ = followed()
    for t in (1000, 500.0, torch.tensor([250, 250])):
        for _ in range(forwards):
            model(X, timestep=t)
    model(X, torch.tensor(7.0))
    assert group.history == ["step"] * 4
    assert str(clock) == "steps: 4; requests begun: none seen yet"


def test_tokens_of_an_input_picture_have_timestep_zero() -> None:
    model, group, _, _ = followed()
    for t in (1000.0, 500.0):
        model(X, timestep=torch.tensor([[0.0, t, t]]))
    assert group.history == ["step"] * 2


@pytest.mark.parametrize("times", [(3.0, 2.0, 1.0), (0.1, 0.2, 0.3)])
def test_timesteps_that_turn_back_begin_a_request(times: tuple[float, ...]) -> None:
    model, group, clock, _ = followed()
    for _ in range(3):
        for t in times:
            model(X, timestep=t)
    assert group.history == ["step"] * 3 + (["reset"] + ["step"] * 3) * 2
    assert clock.requests == {"timesteps turned back": 2}


def test_a_scheduler_decides_alone_and_so_does_the_one_that_replaces_it() -> None:
    model, group, clock, patches = followed()
    first = Scheduler()
    pipe = SimpleNamespace(scheduler=first)
    clock.follow_pipeline(pipe, {}, patches)
    assert pipe.scheduler.set_timesteps(4) == 4
    for t in (3.0, 2.0, 3.0, 1.0):  # some schedulers go back within a request
        model(X, timestep=t)
    assert group.history == ["reset"] + ["step"] * 4
    assert pipe.scheduler.set_timesteps(1) == 1
    model(X, timestep=1.0)
    assert group.history[5:] == ["reset", "step"]
    for count in range(3):  # each request has one step and a scheduler of its own, as some servers make it
        pipe.scheduler = Scheduler()
        pipe.scheduler.set_timesteps(1)
        model(X, timestep=1.0)
        assert group.history[7 + 2 * count :] == ["reset", "step"]
    del group.history[:]
    pipe.scheduler.set_timesteps(2)
    model(X, timestep=1.0)
    pipe.scheduler = first
    pipe.scheduler.set_timesteps(2)
    model(X, timestep=1.0)
    assert group.history == ["reset", "step"] * 2
    patches.undo()
    assert vars(first) == vars(pipe.scheduler) == {}


def test_a_model_that_took_the_place_of_another_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    model, _, clock, patches = followed()
    pipe = SimpleNamespace(scheduler=Scheduler(), transformer=model)
    clock.follow_pipeline(pipe, {"transformer": model}, patches)
    with caplog.at_level("WARNING", logger="compactdist"):
        pipe.scheduler.set_timesteps(2)
        assert not caplog.messages
        pipe.transformer = Model()
        pipe.scheduler.set_timesteps(2)
        pipe.scheduler.set_timesteps(2)
    (said,) = caplog.messages
    assert "transformer of the pipeline is another model than the one that enable() got" in said


def test_counted_forwards_need_no_timestep() -> None:
    model, group, _, _ = followed(forwards_per_step=2)
    for _ in range(3):
        for branch in ("cond", "uncond"):
            with model.cache_context(branch):
                model(X)
                model(X)
    assert group.history.count("step") == 3
    assert [i for i, told in enumerate(group.history) if told == "step"] == [1, 6, 11]


def test_a_timestep_that_nobody_needs_is_not_read() -> None:
    """On a GPU it would have to be waited for."""

    class Unreadable(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func in (torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.__float__):
                raise AssertionError("the timestep was read")
            return super().__torch_function__(func, types, args, kwargs or {})

    timestep = torch.tensor([500.0]).as_subclass(Unreadable)
    clock = Clock([], forwards_per_step=1)
    with pytest.raises(AssertionError, match="was read"):  # without a scheduler it says where requests begin
        clock.before_forward(torch.nn.Identity(), (), {"timestep": timestep})
    clock._pipe = SimpleNamespace(scheduler=None)
    for _ in range(2):
        clock.before_forward(torch.nn.Identity(), (), {"timestep": timestep})
    assert clock.steps == 2


def test_without_timestep_or_count_it_refuses() -> None:
    model, group, _, _ = followed()
    with pytest.raises(TypeError, match="Model was called without a timestep"):
        model(X)
    assert group.history == []


def test_cache_context_names_the_branch_and_still_works() -> None:
    model, group, _, patches = followed()
    with model.cache_context("cond", step_index=3) as value:
        assert value == 3
        model(X, timestep=1.0)
    with pytest.raises(ZeroDivisionError), model.cache_context("uncond"):
        raise ZeroDivisionError
    assert group.history[:3] == ["into cond", "step", "out of cond"]
    patches.undo()
    with model.cache_context("cond"):
        model(X, timestep=0.0)
    assert group.history[3:] == ["into uncond"]
    assert not model._forward_pre_hooks


def test_a_compiled_module_is_followed_outside_its_graph() -> None:
    model, group, patches = Model(), Group(), Patches()
    model.compile(backend="eager", fullgraph=True)
    compiled = model._compiled_call_impl
    Clock([group]).follow_model(model, patches)
    for t in (2.0, 1.0, 1.0):
        assert torch.equal(model(X, timestep=torch.tensor(t)), X + 1)
    assert group.history == ["step"] * 2
    patches.undo()
    assert model._compiled_call_impl is compiled


def info(op: str, numel: int = 4096) -> compactdist.CallInfo:
    return compactdist.CallInfo("key", op, torch.float32, numel, 0)


@pytest.mark.parametrize(
    "policy",
    [
        None,
        compactdist.Rule("int8"),
        compactdist.Rules(compactdist.Rule("int8")),
        [compactdist.Rule("int8")],
        lambda call: "int8",
    ],
)
def test_policies_let_gathers_pass(policy: Any) -> None:
    decide = without_gathers(policy)
    decide = compactdist.Rules(decide) if isinstance(decide, compactdist.Rule) else decide
    assert decide(info("all_gather")) == "pass"
    chosen = decide(info("all_to_all"))
    assert chosen is None if policy is None else compactdist.codecs.get(chosen) == compactdist.codecs.get("int8")


@pytest.mark.parametrize("policy", ["int8", {"id": "int8"}, ["int8"], 8])
def test_what_is_no_policy_is_refused_by_name(policy: Any) -> None:
    with pytest.raises(compactdist.errors.ConfigError, match=r"int8'.*Rule\(|Rule\('int8'|got 8"):
        without_gathers(policy)
