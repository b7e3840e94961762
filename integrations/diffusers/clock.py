"""Steps, requests and guidance branches of a diffusers model, read off its calls.

A step begins when the model is called with another `timestep`, or, where the number of forwards in a step is given,
when so many have been counted in a branch. A request begins at `scheduler.set_timesteps`; without a pipeline, or with a
scheduler other than the one that was there at first, when the timesteps turn back; and at every `new_request`.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch

Undo = list[Callable[[], None]]

_LATE_COMPILE = "compactdist_diffusers counts steps here; compile the model before enable() to keep it out of the graph"


class Clock:
    """Tells wrapped groups of steps and requests.

    Attributes:
        requests: how many requests began, by what began them.
        steps: how many steps began.
    """

    def __init__(self, groups: list[Any], forwards_per_step: int | None = None) -> None:
        self.requests: Counter[str] = Counter()
        self.steps = 0
        self._groups = groups
        self._forwards_per_step = forwards_per_step
        self._scheduled: Callable[[], bool] = lambda: False
        self._branch = ""
        self._forget()

    def _forget(self) -> None:
        self._timestep: float | None = None
        self._direction = 0
        self._forwards: Counter[str] = Counter()
        self._counted_steps = 0

    def new_request(self, cause: str) -> None:
        self.requests[cause] += 1
        self._forget()
        for group in self._groups:
            group.reset()

    def _step(self) -> None:
        self.steps += 1
        for group in self._groups:
            group.step()

    def before_forward(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        timestep = _timestep(module, args, kwargs)
        if timestep is None and self._forwards_per_step is None:
            raise TypeError(
                f"{type(module).__name__} was called without a timestep, so steps cannot be told apart; "
                "tell enable() how many forwards a step has: forwards_per_step=1"
            )
        last = self._timestep
        changed = timestep is not None and timestep != last
        if changed and last is not None:
            direction = 1 if timestep > last else -1
            if direction * self._direction < 0 and not self._scheduled():
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

    def follow_model(self, module: torch.nn.Module, undo: Undo) -> None:
        """Count the forwards of `module` (compiled or not), and let `cache_context` name the guidance branch."""
        if getattr(module, "_compiled_call_impl", None) is not None:
            # module.compile() takes hooks into the graph, where counting would happen once, while it is traced.
            compiled = module._compiled_call_impl

            def call(*args: Any, **kwargs: Any) -> Any:
                self.before_forward(module, args, kwargs)
                return compiled(*args, **kwargs)

            module._compiled_call_impl = call
            undo.append(functools.partial(setattr, module, "_compiled_call_impl", compiled))
        else:
            hook = torch.compiler.disable(self.before_forward, reason=_LATE_COMPILE)
            undo.append(module.register_forward_pre_hook(hook, with_kwargs=True).remove)

        model: Any = getattr(module, "_orig_mod", module)
        original = getattr(model, "cache_context", None)
        if original is None:
            return

        @contextlib.contextmanager
        @functools.wraps(original)
        def cache_context(name: str, **kwargs: Any) -> Iterator[Any]:
            before, self._branch = self._branch, name
            try:
                with contextlib.ExitStack() as branches, original(name, **kwargs) as value:
                    for group in self._groups:
                        branches.enter_context(group.branch(name))
                    yield value
            finally:
                self._branch = before

        model.cache_context = cache_context
        undo.append(lambda: vars(model).pop("cache_context", None))

    def follow_scheduler(self, pipe: Any, undo: Undo) -> None:
        """Begin a request whenever the pipeline asks its scheduler for timesteps, as every pipeline does at first."""
        scheduler = pipe.scheduler
        original = scheduler.set_timesteps

        # Pipelines read the signature of this method to see what it accepts.
        @functools.wraps(original)
        def set_timesteps(*args: Any, **kwargs: Any) -> Any:
            self.new_request("set_timesteps")
            return original(*args, **kwargs)

        scheduler.set_timesteps = set_timesteps
        undo.append(lambda: vars(scheduler).pop("set_timesteps", None))
        self._scheduled = lambda: pipe.scheduler is scheduler

    def __str__(self) -> str:
        causes = ", ".join(f"{cause} {count}" for cause, count in self.requests.items()) or "none seen yet"
        return f"steps: {self.steps}; requests begun: {causes}"


def _timestep(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float | None:
    """The timestep of a call; the largest where every token has its own (0 for those given by an input picture)."""
    timestep = kwargs.get("timestep")
    if timestep is None:
        model = getattr(module, "_orig_mod", module)
        timestep = inspect.signature(type(model).forward).bind_partial(model, *args, **kwargs).arguments.get("timestep")
    if timestep is None:
        return None
    return float(timestep.max()) if torch.is_tensor(timestep) else float(timestep)
