"""The models and pipelines that the adapters follow: out of their wrappers, and the timestep of a call."""

from __future__ import annotations

import inspect
from typing import Any

import torch


def unwrapped(thing: Any) -> Any:
    """The pipeline, scheduler or model inside xfuser's wrappers, which keep it in `.module`; `thing` if it has none."""
    while True:
        own = getattr(thing, "__dict__", {})
        inner = own.get("module", own.get("_modules", {}).get("module"))
        if inner is None:
            return thing
        thing = inner


def timestep_of(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float | None:
    """The timestep that a transformer is called with, `None` where it is called with none.

    Reads it from the device. Where every token has a timestep of its own, the largest one counts: tokens of an input
    picture have timestep 0.

    Args:
        module: the transformer, compiled or not.
        args, kwargs: of the call.
    """
    timestep = kwargs.get("timestep")
    if timestep is None:
        model = getattr(module, "_orig_mod", module)
        # The signature of the class: hooks replace the instance's `forward` by functions without one.
        timestep = inspect.signature(type(model).forward).bind_partial(model, *args, **kwargs).arguments.get("timestep")
    if timestep is None:
        return None
    return float(timestep.max()) if torch.is_tensor(timestep) else float(timestep)
