"""When a denoising step and when a request begins, seen from outside a pipeline.

A request begins at the scheduler's `set_timesteps`, which every pipeline of diffusers and of xfuser calls on every
rank. A step begins, in order of preference,

* with PipeFusion, when a patch comes round again (only the last stage calls the scheduler);
* at the first forward after `scheduler.step`, which knows nothing of guidance branches, repeated timesteps or
  several forwards;
* where the scheduler is never asked to step, when the value of `timestep` changes.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch

from compactdist_xdit.probe import unwrapped


class Clock:
    """Turns calls of transformer and scheduler into `begin_step()` and `begin_request()`.

    Args:
        begin_step: called before the forward that begins a step.
        begin_request: called before the timesteps of a request are set.

    Attributes:
        patch: with PipeFusion a function that gives the patch about to be computed, or `None` where a forward covers
            the whole; otherwise `None`. It may be set at the beginning of a request.
    """

    def __init__(
        self,
        begin_step: Callable[[], None],
        begin_request: Callable[[], None],
    ) -> None:
        self._begin_step = begin_step
        self._begin_request = begin_request
        self.patch: Callable[[], int | None] | None = None
        self.restart()

    def restart(self) -> None:
        """Forget the request; the next forward begins a step."""
        self._due = True
        self._scheduler_steps = False
        self._timestep: float | None = None
        self._patches: set[int] = set()

    def before_forward(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pre-hook of the transformer."""
        if self.patch is not None:
            begins = self._patch_comes_round(self.patch())
        else:
            begins = self._due
            if not self._scheduler_steps:  # reads the timestep from the device, so only until a scheduler.step is seen
                value = _timestep_of(module, args, kwargs)
                begins = begins or value != self._timestep
                self._timestep = value
        self._due = False
        if begins:
            self._begin_step()

    def _patch_comes_round(self, patch: int | None) -> bool:
        if patch is None or patch in self._patches or not self._patches:
            self._patches = set() if patch is None else {patch}
            return True
        self._patches.add(patch)
        return False

    def follow(self, scheduler: Any) -> Callable[[], None]:
        """Listen to a scheduler (xfuser's wrapper of one, or a plain one); returns the way back."""
        # A wrapper hands set_timesteps on to what it wraps and steps by itself; its __setattr__ forwards too, so
        # the attributes go where instances keep them.
        inner = unwrapped(scheduler)
        set_timesteps, step = inner.set_timesteps, scheduler.step

        # Pipelines read the signatures to see what a scheduler accepts.
        @functools.wraps(set_timesteps)
        def begin(*args: Any, **kwargs: Any) -> Any:
            self.restart()
            self._begin_request()
            return set_timesteps(*args, **kwargs)

        @functools.wraps(step)
        def stepped(*args: Any, **kwargs: Any) -> Any:
            self._due = self._scheduler_steps = True
            return step(*args, **kwargs)

        vars(inner)["set_timesteps"], vars(scheduler)["step"] = begin, stepped

        def back() -> None:
            vars(inner).pop("set_timesteps", None)
            vars(scheduler).pop("step", None)

        return back


def _timestep_of(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    timestep = kwargs.get("timestep")
    if timestep is None:
        timestep = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments.get("timestep")
    if timestep is None:
        raise TypeError(f"{type(module).__name__} was called without a timestep; steps cannot be told apart")
    return float(timestep.reshape(-1)[0]) if torch.is_tensor(timestep) else float(timestep)
