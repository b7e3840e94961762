"""Steps, requests and guidance branches of a diffusers model, told by its calls.

A step begins when the model is called with another `timestep`; with `forwards_per_step=n`, after every n forwards of a
branch. A request begins at `scheduler.set_timesteps`, at the first forward after the pipeline was given another
scheduler, and at `new_request`. Without a pipeline it begins when the timesteps turn back.
"""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch

from compactdist_common import Patches, before_forwards, timestep_of, uncompiled

_log = logging.getLogger("compactdist")


class Clock:
    """Tells wrapped groups when steps and requests begin.

    Args:
        groups: the wrapped groups.
        forwards_per_step: forwards of the model in one step and branch; `None`: another timestep begins a step.

    Attributes:
        requests: how many requests began, by the event that began them.
        steps: how many steps began.
    """

    def __init__(self, groups: list[Any], forwards_per_step: int | None = None) -> None:
        self.requests: Counter[str] = Counter()
        self.steps = 0
        self._groups = groups
        self._forwards_per_step = forwards_per_step
        self._pipe: Any = None
        self._scheduler: Any = None
        self._listening = Patches()
        self._models: dict[str, Any] = {}
        self._branch = ""
        self._forget()

    def _forget(self) -> None:
        self._timestep: float | None = None
        self._direction = 0
        self._forwards: Counter[str] = Counter()
        self._counted_steps = 0

    def new_request(self, cause: str) -> None:
        """Reset the groups: a request begins.

        Args:
            cause: the event, for `requests`.
        """
        self.requests[cause] += 1
        self._forget()
        for group in self._groups:
            group.reset()

    def _step(self) -> None:
        self.steps += 1
        for group in self._groups:
            group.step()

    def before_forward(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pre-hook of the model.

        Raises:
            TypeError: the model is called without a timestep, and `forwards_per_step` is not set.
        """
        if self._pipe is not None and self._pipe.scheduler is not self._scheduler:
            self._follow(self._pipe.scheduler)
            self.new_request("another scheduler")  # whose set_timesteps was called before anybody listened to it
        # a timestep on a GPU is waited for: not where forwards are counted and a scheduler says when requests begin
        needed = self._forwards_per_step is None or self._pipe is None
        timestep = timestep_of(module, args, kwargs) if needed else None
        if timestep is None and self._forwards_per_step is None:
            raise TypeError(
                f"{type(module).__name__} was called without a timestep, so steps cannot be told apart; "
                "tell enable() how many forwards a step has: forwards_per_step=1"
            )
        last = self._timestep
        changed = timestep is not None and timestep != last
        if changed and last is not None:
            direction = 1 if timestep > last else -1
            if direction * self._direction < 0 and self._pipe is None:
                self.new_request("timesteps turned back")
            else:
                self._direction = direction
        self._timestep = timestep
        if self._forwards_per_step is None:
            if changed:
                self._step()
        else:
            seen = self._forwards[self._branch]
            self._forwards[self._branch] += 1
            if seen // self._forwards_per_step >= self._counted_steps:
                self._counted_steps += 1
                self._step()

    def follow_model(self, module: torch.nn.Module, patches: Patches) -> None:
        """Count the forwards of `module` (compiled or not), and take the guidance branch from `cache_context`."""
        before_forwards(module, self.before_forward, patches)
        model = uncompiled(module)
        if hasattr(model, "cache_context"):
            patches.wrap(model, "cache_context", self._branching)

    def _branching(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @contextlib.contextmanager
        def cache_context(name: str, **kwargs: Any) -> Iterator[Any]:
            before, self._branch = self._branch, name
            try:
                with contextlib.ExitStack() as branches, original(name, **kwargs) as value:
                    for group in self._groups:
                        branches.enter_context(group.branch(name))
                    yield value
            finally:
                self._branch = before

        return cache_context

    def follow_pipeline(self, pipe: Any, models: dict[str, Any], patches: Patches) -> None:
        """Begin a request when the pipeline calls `set_timesteps` of its scheduler, as every pipeline does at first.

        Args:
            pipe: the pipeline.
            models: whose forwards are counted, by their names in the pipeline.
            patches: undone at the end.
        """
        self._pipe, self._models = pipe, dict(models)
        patches.add(self._listening.undo)
        self._follow(pipe.scheduler)

    def _follow(self, scheduler: Any) -> None:
        """Listen to this scheduler and to no other: some servers make one for each request."""
        self._listening.undo()
        self._scheduler = scheduler
        self._listening.before(scheduler, "set_timesteps", self._on_set_timesteps)

    def _on_set_timesteps(self) -> None:
        self.new_request("set_timesteps")
        for name, model in list(self._models.items()):
            if getattr(self._pipe, name, model) is not model:
                del self._models[name]  # said once
                _log.warning(
                    "%s of the pipeline is another model than the one that enable() got, and what it sends is not "
                    "compressed: disable() the handle, and enable() the pipeline again",
                    name,
                )

    def __str__(self) -> str:
        causes = ", ".join(f"{cause} {count}" for cause, count in self.requests.items()) or "none seen yet"
        return f"steps: {self.steps}; requests begun: {causes}"
