"""Compressed context parallelism for a diffusers model or pipeline: one call, no change to diffusers.

`enable` replaces the groups behind the ring and the Ulysses dimension of the model's device mesh by wrapped ones, tells
steps, requests and guidance branches by the calls of the model and its scheduler (`clock`), and gives the call sites of
attention names and layouts (`sites`). The gather of the output, which feeds the scheduler, has a mesh of its own and
stays plain.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch

import compactdist
import compactdist_common
from compactdist.policy import as_policy
from compactdist_common import AUTO, Patches, chosen_codec, compiled_call, uncompiled
from compactdist_diffusers import caches
from compactdist_diffusers.clock import Clock
from compactdist_diffusers.sites import Sites

ROUTES = ("ring", "ulysses")


class Handle(compactdist_common.Handle):
    """What `enable` returns: the wrapped groups, what they sent, and the way back. Also a context manager.

    `groups` has `"ring"` and `"ulysses"`, as far as they span more than one rank. Where a pipeline has several parallel
    models with meshes of their own, the names of the second and later ones begin with the component:
    `"transformer_2.ring"`.
    """

    def __init__(self, groups: dict[str, Any], clock: Clock, patches: Patches) -> None:
        super().__init__(lambda: groups, patches)
        self._clock = clock

    def new_request(self) -> None:
        """Forget the history: the next call of the model begins another request.

        Needed only where `enable` got a model without its pipeline. Every rank must call it at the same place.
        """
        self._clock.new_request("new_request()")

    def explain(self, *, wait: bool = True) -> str:
        """How many steps and requests began, and a table for each group of the messages at every call site."""
        return f"{self._clock}\n\n{super().explain(wait=wait)}"


def enable(
    model_or_pipe: Any,
    codec: Any = AUTO,
    *,
    routes: str | Iterable[str] | None = None,
    forwards_per_step: int | None = None,
    **wrap_options: Any,
) -> Handle:
    """Compress the context-parallel traffic of a model from now on. Collective: every rank must call it.

    Args:
        model_or_pipe: a diffusers model after `enable_parallelism(config=ContextParallelConfig(...))`, or a pipeline
            with at least one such model; `torch.compile` it before. With a pipeline, a request begins when the pipeline
            sets its timesteps. With a model alone, a request begins when the timesteps turn back (up, where they go
            down); call `handle.new_request()` where they do not, as with a single step.
        codec: a codec or its name, for `compactdist.wrap`; `"auto"`: that of `preset=`, else of
            `COMPACTDIST_CODEC`, else `int2`.
        routes: `"ring"`, `"ulysses"` or both; by default those that span more than one rank.
        forwards_per_step: forwards of the model in one step, and in one branch where the pipeline names branches in
            `cache_context`; by default a step begins when the timestep changes.
        wrap_options: further arguments of `compactdist.wrap` (`preset`, `policy`, `order`, ...).

    Raises:
        TypeError: neither a diffusers model nor a pipeline.
        ValueError: no group spans more than one rank, an unknown route, a route of one rank, or compression is enabled
            already.
        compactdist.CompactDistError: bad options, or the ranks do not agree.
    """
    if forwards_per_step is not None and forwards_per_step < 1:
        raise ValueError(f"forwards_per_step must be at least 1, got {forwards_per_step}")
    chosen = _routes(routes)
    models = _parallel_models(model_or_pipe)
    meshes = _meshes(models, chosen)

    sites, patches = Sites(), Patches()
    groups: dict[str, Any] = {}
    # Exact: attention uses its own keys and values as they are, and those of other ranks as they were decoded.
    options: dict[str, Any] = {"local": "exact", "layouts": sites.layout_of} | wrap_options
    try:
        _wrap(meshes, chosen_codec(codec, wrap_options), options, groups, sites, patches)
        patches.add(sites.remove)
        sites.install()
        clock = Clock(list(groups.values()), forwards_per_step)
        for module in models.values():
            clock.follow_model(module, patches)
            caches.follow(uncompiled(module), _parallel_meshes(module), patches)
            if not _is_compiled(module):
                for group in groups.values():
                    patches.add(group.attach(module, step_module=None).detach)
        if not isinstance(model_or_pipe, torch.nn.Module):
            clock.follow_pipeline(model_or_pipe, models, patches)
    except BaseException:
        patches.undo()
        raise
    return Handle(groups, clock, patches)


def _wrap(
    meshes: list[tuple[str, str, Any, Any]],
    codec: Any,
    options: dict[str, Any],
    groups: dict[str, Any],
    sites: Sites,
    patches: Patches,
) -> None:
    """Wrap the group of every mesh once, and add it to `groups` by name and to `sites` by configuration and route."""
    policy = options.pop("policy", None)
    wrapped: dict[int, Any] = {}
    for name, route, mesh, _ in meshes:
        if id(mesh) in wrapped:
            continue
        rules = without_gathers(policy) if route == "ulysses" else policy
        (group,) = compactdist.wrap_mesh(mesh, 0, codec, policy=rules, **options).values()
        patches.add(group.close)
        wrapped[id(mesh)] = groups[name] = group
    for config in {id(config): config for _, _, _, config in meshes}.values():
        mine = {route: wrapped[id(mesh)] for _, route, mesh, owner in meshes if owner is config}
        sites.groups.append((config, mine))


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
    """The models with context parallelism, by the name of the component, or of the class for a model on its own."""
    if isinstance(thing, torch.nn.Module):
        found = {type(uncompiled(thing)).__name__: thing}
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


def _parallel_meshes(module: Any) -> list[Any]:
    """The ring and Ulysses meshes of a model that have more than one rank."""
    meshes = [getattr(_config(module), f"_{route}_mesh") for route in ROUTES]
    return [mesh for mesh in meshes if mesh.size() > 1]


def _meshes(models: dict[str, Any], routes: tuple[str, ...] | None) -> list[tuple[str, str, Any, Any]]:
    """Name, route, mesh and configuration of every group to wrap; a mesh that two models share comes twice."""
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
    """Whether the module is compiled as a whole: hooks in it would land in its graph, which cannot name call sites."""
    inner = uncompiled(module)
    return inner is not module or compiled_call(inner) is not None


def without_gathers(policy: Any) -> Any:
    """`policy`, except that all-gathers pass: on a Ulysses group they carry attention masks, which hold infinities.

    Raises:
        compactdist.errors.ConfigError: no policy.
    """
    plain = compactdist.Rule("pass", op="all_gather")
    function = as_policy(policy)
    if function is None:
        return plain
    if isinstance(function, compactdist.Rules):
        return compactdist.Rules(plain, *function.rules)

    @functools.wraps(function)
    def decide(call: compactdist.CallInfo) -> Any:
        return "pass" if call.op == "all_gather" else function(call)

    # Ranks compare policies by `__qualname__`, which an object with __call__ does not have.
    decide.__qualname__ = getattr(function, "__qualname__", type(function).__qualname__)
    return decide
