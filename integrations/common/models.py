"""The models and pipelines that the adapters follow: out of their wrappers, their forwards, and a call's timestep."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from compactdist_common.patches import Patches

_OUTSIDE = "compactdist counts steps here; a model compiled before the request begins is counted outside of its graph"


def unwrapped(thing: Any) -> Any:
    """The pipeline, scheduler or model inside xfuser's wrappers (`.module`) and torch.compile's (`._orig_mod`)."""
    while True:
        own = getattr(thing, "__dict__", {})
        modules = own.get("_modules", {})
        inner = own.get("module", modules.get("module", modules.get("_orig_mod")))
        if inner is None:
            return thing
        thing = inner


def uncompiled(module: torch.nn.Module) -> Any:
    """The module inside `torch.compile(module)`, xfuser's wrapper included; any other module itself."""
    return getattr(module, "_orig_mod", module)


def compiled_call(module: torch.nn.Module) -> Any:
    """What a module's calls run after `module.compile()`; `None` without it."""
    return module._compiled_call_impl


def before_forwards(module: torch.nn.Module, hook: Callable[..., None], patches: Patches) -> None:
    """Call `hook(module, args, kwargs)` before every forward of a module, until `patches` are undone.

    The hook runs outside of the graph of a module that is compiled by now, in place or by `torch.compile(module)`. A
    module that is compiled later gets a graph break at the hook.
    """
    compiled = compiled_call(module)
    if compiled is None:
        outside = torch.compiler.disable(hook, reason=_OUTSIDE)
        patches.add(module.register_forward_pre_hook(outside, with_kwargs=True).remove)
        return

    # module.compile() takes hooks into the graph, where they would run once, while it is traced.
    def call(*args: Any, **kwargs: Any) -> Any:
        hook(module, args, kwargs)
        return compiled(*args, **kwargs)

    def give_back() -> None:
        if compiled_call(module) is call:  # it may have been compiled anew
            vars(module)["_compiled_call_impl"] = compiled

    vars(module)["_compiled_call_impl"] = call
    patches.add(give_back)


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
        model = uncompiled(module)
        # The signature of the class: hooks replace the instance's `forward` by functions without one.
        timestep = inspect.signature(type(model).forward).bind_partial(model, *args, **kwargs).arguments.get("timestep")
    if timestep is None:
        return None
    return float(timestep.max()) if torch.is_tensor(timestep) else float(timestep)
