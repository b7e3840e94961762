"""Steps and requests as seen by the adapter's clock, without xfuser."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest
import torch

from compactdist_common import Patches
from compactdist_xdit import routes
from compactdist_xdit.clock import Clock


class Transformer(torch.nn.Module):
    def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor | None = None) -> torch.Tensor:
        return hidden_states


class Scheduler:
    def set_timesteps(self, num_inference_steps: int, sigmas: list[float] | None = None) -> int:
        return num_inference_steps

    def step(self, output: float, timestep: float) -> float:
        return output - timestep


class Wrapped:
    """As xfuser wraps a scheduler: it steps by itself, and attributes set on it land on what it wraps."""

    def __init__(self) -> None:
        vars(self)["module"] = Scheduler()

    def __getattr__(self, name: str) -> object:
        return getattr(vars(self)["module"], name)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(vars(self)["module"], name, value)

    def step(self, output: float, timestep: float) -> float:
        return -1.0


@pytest.fixture(params=[Scheduler, Wrapped])
def followed(request: pytest.FixtureRequest) -> SimpleNamespace:
    history: list[str] = []
    clock = Clock(lambda: history.append("step"), lambda: history.append("request"))
    scheduler, transformer = request.param(), Transformer()
    hook = transformer.register_forward_pre_hook(clock.before_forward, with_kwargs=True)
    patches = Patches()
    clock.follow(scheduler, patches)
    return SimpleNamespace(
        history=history, clock=clock, scheduler=scheduler, transformer=transformer, hook=hook, patches=patches
    )


X = torch.ones(2)


@pytest.mark.parametrize("forwards", [1, 2, 3])
def test_a_step_ends_at_the_schedulers_step(followed: SimpleNamespace, forwards: int) -> None:
    followed.scheduler.set_timesteps(3)
    for t in (9.0, 9.0, 5.0):  # second-order schedulers repeat timesteps
        for _ in range(forwards):
            followed.transformer(X, timestep=torch.tensor(t))
        followed.scheduler.step(1.0, t)
    assert followed.history == ["request"] + ["step"] * 3


@pytest.mark.parametrize("forwards", [1, 2])
def test_without_a_stepping_scheduler_a_step_is_a_new_timestep(followed: SimpleNamespace, forwards: int) -> None:
    for t in (1000.0, 500.0, 250.0):
        for _ in range(forwards):
            followed.transformer(X, torch.full((2,), t))
    assert followed.history == ["step"] * 3


def test_a_patch_that_comes_round_begins_a_step(followed: SimpleNamespace) -> None:
    patches = iter([None, None, 0, 1, 2, 0, 1, 2, None])
    followed.clock.patch = lambda: next(patches)
    begins = []
    for _ in range(9):
        before = len(followed.history)
        followed.transformer(X)
        begins.append(len(followed.history) > before)
    assert begins == [True, True, True, False, False, True, False, False, True]


def test_every_request_begins_anew_even_at_the_last_timestep(followed: SimpleNamespace) -> None:
    for _ in range(2):
        assert followed.scheduler.set_timesteps(1) == 1
        followed.transformer(X, timestep=torch.tensor(1000.0))
    assert followed.history == ["request", "step"] * 2


def test_signatures_stay_visible_and_everything_is_given_back(followed: SimpleNamespace) -> None:
    scheduler = followed.scheduler
    assert "sigmas" in inspect.signature(scheduler.set_timesteps).parameters
    assert list(inspect.signature(scheduler.step).parameters) == ["output", "timestep"]
    assert scheduler.step(1.0, 1.0) == type(scheduler)().step(1.0, 1.0)
    followed.patches.undo()
    scheduler.set_timesteps(1)
    assert followed.history == []
    assert "step" not in vars(scheduler)


def test_a_transformer_without_a_timestep_is_refused(followed: SimpleNamespace) -> None:
    with pytest.raises(TypeError, match="without a timestep"):
        followed.transformer(X)


def test_routes_by_name() -> None:
    assert routes.chosen(None) == routes.USUAL
    assert routes.chosen("ring, cfg,ring") == ("ring", "cfg")
    with pytest.raises(ValueError, match="routes must be among ring, ulysses"):
        routes.chosen("ring,tensor")
    with pytest.raises(ValueError, match="none"):
        routes.chosen([])
