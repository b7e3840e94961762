"""Steps and requests as seen by the wrapped groups, without xfuser."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest
import torch

from compactdist_xdit import adapter


class Group:
    """Counts what the clock tells it: `history` is a list of "step" and "reset"."""

    def __init__(self) -> None:
        self.history: list[str] = []
        self.attached: list[torch.nn.Module] = []

    def step(self) -> None:
        self.history.append("step")

    def reset(self) -> None:
        self.history.append("reset")

    def attach(self, module: torch.nn.Module, *, step_module: str | None) -> SimpleNamespace:
        assert step_module is None
        self.attached.append(module)
        return SimpleNamespace(detach=lambda: self.attached.remove(module))


class Transformer(torch.nn.Module):
    def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return hidden_states * timestep


class Scheduler:
    def set_timesteps(self, num_inference_steps: int, sigmas: list[float] | None = None) -> int:
        return num_inference_steps


def pipeline() -> SimpleNamespace:
    """As xfuser wraps them: the pipeline and its scheduler hide behind `.module`."""
    return SimpleNamespace(
        module=SimpleNamespace(transformer=Transformer(), scheduler=SimpleNamespace(module=Scheduler()))
    )


def followed() -> tuple[SimpleNamespace, Group, list]:
    pipe, group, undo = pipeline(), Group(), []
    adapter._follow(pipe, {"ring": group}, undo)
    return pipe.module, group, undo


@pytest.mark.parametrize("forwards", [1, 2, 3])
def test_a_step_is_a_new_timestep(forwards: int) -> None:
    pipe, group, _ = followed()
    for t in (1000.0, 500.0, 250.0):
        for _ in range(forwards):
            pipe.transformer(hidden_states=torch.ones(2), timestep=torch.full((2,), t))
    assert group.history == ["step"] * 3


def test_timestep_may_be_positional() -> None:
    pipe, group, _ = followed()
    pipe.transformer(torch.ones(2), torch.tensor(7.0))
    pipe.transformer(torch.ones(2), torch.tensor(6.0))
    assert group.history == ["step"] * 2


def test_every_request_forgets_even_when_it_starts_at_the_last_timestep() -> None:
    pipe, group, _ = followed()
    for _ in range(2):
        assert pipe.scheduler.module.set_timesteps(1) == 1
        pipe.transformer(torch.ones(2), timestep=torch.tensor(1000.0))
    assert group.history == ["reset", "step"] * 2


def test_signature_of_set_timesteps_stays_visible() -> None:
    pipe, _, _ = followed()
    assert "sigmas" in inspect.signature(pipe.scheduler.module.set_timesteps).parameters


def test_disable_restores_everything() -> None:
    pipe, group, undo = followed()
    handle = adapter.Handle({"ring": group}, undo)
    assert group.attached == [pipe.transformer]
    handle.disable()
    handle.disable()
    pipe.transformer(torch.ones(2), timestep=torch.tensor(1.0))
    pipe.scheduler.module.set_timesteps(1)
    assert group.history == []
    assert group.attached == []
    assert "set_timesteps" not in vars(pipe.scheduler.module)


def test_pipeline_without_transformer_is_refused() -> None:
    with pytest.raises(ValueError, match="no transformer"):
        adapter._follow(SimpleNamespace(scheduler=Scheduler()), {}, [])


def test_unknown_route_is_refused() -> None:
    pytest.importorskip("yunchang")
    with pytest.raises(ValueError, match="route must be one of ring, ulysses"):
        adapter.enable(pipeline(), route="tensor")
