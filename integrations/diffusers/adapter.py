"""Compressed context parallelism for a diffusers model or pipeline: one call, no change to diffusers.

Three things happen in `enable`. The groups behind the ring and the Ulysses dimension of the model's device mesh are
replaced by wrapped ones. Steps, requests and guidance branches are read off the calls of the model and its scheduler.
The attention of the model names its call sites and knows the layouts of its buffers. The gather of the output, which
feeds the scheduler, runs on a mesh of its own and stays plain.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any

import torch

import compactdist
from compactdist_diffusers.clock import Clock, Undo
from compactdist_diffusers.sites import Sites

ROUTES = ("ring", "ulysses")


class Handle:
    """What `enable` returns: the wrapped groups and the way back. Also a context manager.

    Attributes:
        groups: wrapped groups by name: `"ring"` and/or `"ulysses"`. Where a pipeline has several parallel models with
            meshes of their own, those of the second and later carry the component's name: `"transformer_2.ring"`.
    """

    def __init__(self, groups: dict[str, Any], clock: Clock, undo: Undo) -> None:
        self.groups = groups
        self._clock = clock
        self._undo = undo

    def new_request(self) -> None:
        """Forget the history: the next call of the model begins another request.

        Needed only where no pipeline was given. Every rank must call it at the same place.
        """
        self._clock.new_request("new_request()")

    def stats(self) -> dict[str, compactdist.Stats]:
        """The statistics of each wrapped group, as `compactdist` reports them."""
        return {name: group.stats() for name, group in self.groups.items()}

    def explain(self) -> str:
        """How many steps and requests were seen, and what was sent at every call site, as a table for each group."""
        tables = (f"{name}\n{group.explain()}" for name, group in self.groups.items())
        return "\n\n".join((str(self._clock), *tables))

    def disable(self) -> None:
        """Give diffusers its own groups and functions back. Calling it again does nothing."""
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.disable()


def enable(
    model_or_pipe: Any,
    codec: Any = "int2",
    *,
    routes: str | Iterable[str] | None = None,
    forwards_per_step: int | None = None,
    **wrap_options: Any,
) -> Handle:
    """Compress the context-parallel traffic of a model from now on. Collective: every rank must call it.

    Args:
        model_or_pipe: a diffusers model after `enable_parallelism(config=ContextParallelConfig(...))`, or a pipeline
            with at least one such model; `torch.compile` them before. With a pipeline, requests are seen by
            themselves. With a model alone, a request begins when the timesteps turn back (up, where they go down);
            call `handle.new_request()` where that does not happen, as with a single step.
        codec: a codec or its name, for `compactdist.wrap`.
        routes: `"ring"`, `"ulysses"` or both; by default all that span more than one rank.
        forwards_per_step: forwards of the model in one step (and branch of `cache_context`, where the pipeline names
            those); by default a step begins when the timestep changes.
        wrap_options: further arguments of `compactdist.wrap` (`policy`, `order`, `warmup_steps`, ...).

    Raises:
        TypeError: neither a diffusers model nor a pipeline.
        ValueError: nothing to compress, an unknown route, a route of one rank, or compression is enabled already.
        compactdist.CompactDistError: bad options, or the ranks do not agree.
    """
    if forwards_per_step is not None and forwards_per_step < 1:
        raise ValueError(f"forwards_per_step must be at least 1, got {forwards_per_step}")
    chosen = _routes(routes)
    models = _parallel_models(model_or_pipe)
    meshes = _meshes(models, chosen)

    sites = Sites()
    undo: Undo = []
    handle = Handle({}, Clock([], forwards_per_step), undo)
    # Exact: attention uses its own keys and values as they are, and those of other ranks are reconstructed.
    options: dict[str, Any] = {"local": "exact", "layouts": sites.layout_of} | wrap_options
    policy = options.pop("policy", None)
    try:
        wrapped: dict[int, Any] = {}
        for name, route, mesh, _ in meshes:
            if id(mesh) in wrapped:
                continue
            rules = without_gathers(policy) if route == "ulysses" else policy
            (group,) = compactdist.wrap_mesh(mesh, 0, codec, policy=rules, **options).values()
            undo.append(group.close)
            wrapped[id(mesh)] = handle.groups[name] = group
        for config in {id(config): config for _, _, _, config in meshes}.values():
            mine = {route: wrapped[id(mesh)] for _, route, mesh, owner in meshes if owner is config}
            sites.groups.append((config, mine))
        undo.append(sites.remove)
        sites.install()
        _follow(handle, model_or_pipe, models, forwards_per_step)
    except BaseException:
        handle.disable()
        raise
    return handle


def _follow(handle: Handle, model_or_pipe: Any, models: dict[str, Any], forwards_per_step: int | None) -> None:
    groups = list(handle.groups.values())
    clock = handle._clock = Clock(groups, forwards_per_step)
    for module in models.values():
        clock.follow_model(module, handle._undo)
        if not _is_compiled(module):
            handle._undo += [group.attach(module, step_module=None).detach for group in groups]
    if not isinstance(model_or_pipe, torch.nn.Module):
        clock.follow_scheduler(model_or_pipe, handle._undo)


def _routes(routes: str | Iterable[str] | None) -> tuple[str, ...] | None:
    if routes is None:
        return None
    chosen = (routes,) if isinstance(routes, str) else tuple(routes)
    unknown = [route for route in chosen if route not in ROUTES]
    if unknown or not chosen:
        raise ValueError(f"routes are {' and '.join(ROUTES)}, not {routes!r}")
    return chosen


def _config(module: Any) -> Any:
    """The context parallel configuration of a model, or None."""
    return getattr(getattr(module, "_parallel_config", None), "context_parallel_config", None)


def _parallel_models(thing: Any) -> dict[str, Any]:
    """Models with context parallelism by name; a model on its own is called by its class."""
    if isinstance(thing, torch.nn.Module):
        found = {type(getattr(thing, "_orig_mod", thing)).__name__: thing}
    elif isinstance(getattr(thing, "components", None), dict) and hasattr(thing, "scheduler"):
        found = {name: part for name, part in thing.components.items() if isinstance(part, torch.nn.Module)}
    else:
        raise TypeError(f"enable() takes a diffusers model or pipeline, not {type(thing).__name__}")
    parallel = {name: module for name, module in found.items() if _config(module) is not None}
    if not parallel:
        raise ValueError(
            f"{type(thing).__name__} has no context parallelism: first call "
            "transformer.enable_parallelism(config=ContextParallelConfig(ring_degree=...)) (or ulysses_degree)"
        )
    return parallel


def _meshes(models: dict[str, Any], routes: tuple[str, ...] | None) -> list[tuple[str, str, Any, Any]]:
    """Name, route, mesh and configuration of everything to wrap; the same mesh may come more than once."""
    meshes: list[tuple[str, str, Any, Any]] = []
    for component, module in models.items():
        config = _config(module)
        for route in ROUTES:
            mesh = getattr(config, f"_{route}_mesh")
            if routes is not None and route not in routes:
                continue
            if mesh.size() == 1:
                if routes is not None:
                    raise ValueError(f"{component} has {route}_degree 1: route {route!r} sends nothing; leave it out")
                continue
            if isinstance(mesh.get_group(), compactdist.CompressedProcessGroup):
                raise ValueError(f"compression of {component} is already enabled; call disable() on its handle first")
            taken = any(name == route and other is not mesh for name, _, other, _ in meshes)
            meshes.append((f"{component}.{route}" if taken else route, route, mesh, config))
    if not meshes:
        raise ValueError(f"{', '.join(models)}: every degree is 1, nothing is sent between ranks")
    return meshes


def _is_compiled(module: Any) -> bool:
    """Whether hooks in the module would land in a compiled graph, where names cannot be kept."""
    inner = getattr(module, "_orig_mod", module)
    return inner is not module or any(m._compiled_call_impl is not None for m in inner.modules())


def without_gathers(policy: Any) -> Any:
    """`policy`, but all-gathers pass: on a Ulysses group these are attention masks, and masks hold infinities."""
    plain = compactdist.Rule("pass", op="all_gather")
    if policy is None:
        return plain
    if isinstance(policy, compactdist.Rule):
        return compactdist.Rules(plain, policy)
    if isinstance(policy, compactdist.Rules):
        return compactdist.Rules(plain, *policy.rules)
    if not callable(policy):
        return compactdist.Rules(plain, *policy)

    function: Callable[[compactdist.CallInfo], Any] = policy

    @functools.wraps(function)
    def decide(call: compactdist.CallInfo) -> Any:
        return "pass" if call.op == "all_gather" else function(call)

    # Ranks compare policies by name, and an object with __call__ has none of its own.
    decide.__qualname__ = getattr(function, "__qualname__", type(function).__qualname__)
    return decide
