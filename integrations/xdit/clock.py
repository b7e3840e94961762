"""When a denoising step and when a request of an xDiT pipeline begins, seen from outside the pipeline.

A request begins at the scheduler's `set_timesteps`, which every pipeline of diffusers and of xfuser calls on every
rank. A step begins, by the first of these signs that the pipeline shows:

* with PipeFusion, when a patch is computed again (only the last stage calls the scheduler);
* at the first forward after `scheduler.step`, whether or not a step has guidance branches, repeated timesteps or
  several forwards;
* where nobody calls `scheduler.step`, when the transformer is called with another `timestep`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from compactdist_common import Patches, timestep_of, unwrapped


class Clock:
    """Turns calls of transformer and scheduler into `begin_step()` and `begin_request()`.

    Args:
        begin_step: called before the forward that begins a step.
        begin_request: called before the timesteps of a request are set.

    Attributes:
        patch: with PipeFusion a function that returns the patch about to be computed, `None` where a forward computes
            the whole latent; without PipeFusion `None`. May be set when a request begins.
    """

    def __init__(self, begin_step: Callable[[], None], begin_request: Callable[[], None]) -> None:
        self._begin_step = begin_step
        self._begin_request = begin_request
        self.patch: Callable[[], int | None] | None = None
        self.restart()

    def restart(self) -> None:
        """Forget the request; the next forward begins a step."""
        self._step_expected = True
        self._scheduler_steps = False
        self._timestep: float | None = None
        self._patches: set[int] = set()

    def before_forward(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pre-hook of the transformer.

        Raises:
            TypeError: the transformer is called without a timestep, before any `scheduler.step`.
        """
        if self.patch is not None:
            begins = self._begins_with_patch(self.patch())
        else:
            begins = self._step_expected
            if not self._scheduler_steps:  # timestep_of waits for the device, so only until scheduler.step is called
                timestep = timestep_of(module, args, kwargs)
                if timestep is None:
                    raise TypeError(
                        f"{type(module).__name__} was called without a timestep before its scheduler stepped, so steps "
                        "cannot be told apart; pass timestep=..."
                    )
                begins = begins or timestep != self._timestep
                self._timestep = timestep
        self._step_expected = False
        if begins:
            self._begin_step()

    def _begins_with_patch(self, patch: int | None) -> bool:
        """Whether a step begins: at a forward of the whole latent, at the first patch, and at a patch seen before."""
        if patch is None or patch in self._patches or not self._patches:
            self._patches = set() if patch is None else {patch}
            return True
        self._patches.add(patch)
        return False

    def follow(self, scheduler: Any, patches: Patches) -> None:
        """Listen to a scheduler, plain or in xfuser's wrapper, until `patches` are undone."""
        # The wrapper passes set_timesteps on to the scheduler inside, and has a step of its own.
        patches.before(unwrapped(scheduler), "set_timesteps", self._on_set_timesteps)
        patches.before(scheduler, "step", self._on_step)

    def _on_set_timesteps(self) -> None:
        self.restart()
        self._begin_request()

    def _on_step(self) -> None:
        self._step_expected = self._scheduler_steps = True
