"""Compressed sequence parallelism for an xDiT pipeline: one call, no change to xfuser.

    pipe = xFuserFluxPipeline(...)                      # as before
    handle = compactdist_xdit.enable(pipe, codec="int2")
    pipe(...)                                           # ring and Ulysses traffic now goes as compressed
    residuals print(handle.explain())
    handle.disable()                                    # or: with enable(pipe, ...): ...

Three things happen. The ring and the Ulysses group that xfuser's attention reads are replaced by wrapped
ones. The denoising step advances whenever the transformer is called with a new `timestep`. State is forgotten
whenever a request begins. What happens once per request (the final gather of the latents) or feeds the
scheduler is left alone.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch

import compactdist
from compactdist_xdit import methods
from compactdist_xdit.sites import Sites

_ROUTES = {"ring": "RING_PG", "ulysses": "ULYSSES_PG"}


class Handle:
    """What `enable` returns: the wrapped groups and the way back. Also a context manager.

    Attributes:
        groups: wrapped group by route, `"ring"` and/or `"ulysses"`; empty without a codec.
        method: the parallel method, if one was asked for.
    """

    def __init__(
        self,
        groups: dict[str, Any],
        undo: list[Callable[[], None]],
        method: methods.GatheringMethod | None = None,
    ) -> None:
        self.groups = groups
        self.method = method
        self._undo = undo

    def stats(self) -> dict[str, Any]:
        """The statistics of each wrapped group, by route, as `compactdist` reports them."""
        return {route: group.stats() for route, group in self.groups.items()}

    def explain(self) -> str:
        """What was sent at every call site, as a table for each route, and what the parallel method did."""
        parts = [f"{route}\n{group.explain()}" for route, group in self.groups.items()]
        if self.method is not None:
            parts.append(self.method.describe())
        return "\n\n".join(parts)

    def disable(self) -> None:
        """Give xfuser its own groups and functions back. Calling it again does nothing."""
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.disable()


class _Clock:
    """Turns calls of the transformer and of the scheduler into steps and requests of the wrapped groups.

    A step may call the transformer once, or several times (two guidance branches, patches): it ends when the
    value of `timestep` changes.
    """

    def __init__(self, groups: dict[str, Any], method: methods.GatheringMethod | None = None) -> None:
        self._groups = list(groups.values())
        self._method = method
        self._timestep: float | None = None

    def before_forward(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        timestep = kwargs.get("timestep")
        if timestep is None:
            timestep = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments.get("timestep")
        if timestep is None:
            raise TypeError(f"{type(module).__name__} was called without a timestep; steps cannot be told apart")
        value = float(timestep.reshape(-1)[0]) if torch.is_tensor(timestep) else float(timestep)
        if value != self._timestep:
            self._timestep = value
            for group in self._groups:
                group.step()
            if self._method is not None:
                self._method.begin_step()
        if self._method is not None:
            self._method.before_forward(module)

    def new_request(self) -> None:
        self._timestep = None
        if self._method is not None:  # its gathers are under way in the groups that are reset next
            self._method.new_request()
        for group in self._groups:
            group.reset()


def _unwrapped(thing: Any) -> Any:
    """xfuser keeps what it wraps (pipelines, schedulers) in `.module`."""
    while "module" in vars(thing):
        thing = thing.module
    return thing


def enable(
    pipe: Any,
    codec: Any = "int2",
    *,
    route: str | None = None,
    parallel_method: str | None = None,
    method_warmup_steps: int = 1,
    method_sync_from_step: int | None = None,
    exact_own: bool = True,
    **wrap_options: Any,
) -> Handle:
    """Compress the sequence-parallel traffic of `pipe` from now on. Collective: every rank must call it.

    Args:
        pipe: an xDiT pipeline wrapper, or a diffusers pipeline whose transformer xfuser has parallelised.
        codec: a codec or its name, for `compactdist.wrap`; `None` compresses nothing (for a parallel method alone).
        route: `"ring"` or `"ulysses"` to compress only that one; by default all that span more than one rank.
        parallel_method: `"patch"` or `"distrifusion"` in place of ring attention; see `compactdist_xdit.methods`.
        method_warmup_steps, method_sync_from_step: of DistriFusion, the synchronous first and last steps.
        exact_own: a rank attends to its own keys and values as they are, not as the others see them.
        wrap_options: further arguments of `compactdist.wrap` (`policy`, `order`, `warmup_steps`, ...).

    Raises:
        ValueError: there is nothing to compress, `route` or `parallel_method` is unknown, or the method cannot run
            with this parallel configuration.
    """
    from yunchang.globals import PROCESS_GROUP

    if route is not None and route not in _ROUTES:
        raise ValueError(f"route must be one of {', '.join(_ROUTES)}, not {route!r}")
    inner = {
        name: getattr(PROCESS_GROUP, attribute)
        for name, attribute in _ROUTES.items()
        if route in (None, name) and getattr(PROCESS_GROUP, attribute) is not None
    }
    inner = {name: group for name, group in inner.items() if group.size() > 1}
    if not inner:
        wanted = route or "ring or Ulysses"
        raise ValueError(f"no {wanted} group with more than one rank: set ring_degree or ulysses_degree")
    if any(isinstance(group, compactdist.CompressedProcessGroup) for group in inner.values()):
        raise ValueError("compression is already enabled; call disable() on its handle first")
    method = None
    if parallel_method is not None:
        choices = {"warmup_steps": method_warmup_steps, "sync_from_step": method_sync_from_step, "exact_own": exact_own}
        method = methods.create(parallel_method, **choices)
    if codec is None:
        if method is None:
            raise ValueError("codec=None compresses nothing; name a codec, or a parallel_method to run without one")
        if wrap_options:
            raise ValueError(f"{', '.join(wrap_options)}: of no use with codec=None, where nothing is wrapped")
        inner = {}

    sites = Sites()
    undo: list[Callable[[], None]] = []
    handle = Handle({}, undo, method)
    # Exact: attention uses its own keys and values as they are and only those of other ranks are
    # reconstructed.
    local = "exact" if exact_own else "reconstructed"
    options: dict[str, Any] = {"local": local, "layouts": sites.layout_of} | wrap_options
    try:
        for name, group in inner.items():
            wrapped = compactdist.wrap(group, codec, **options)
            undo.append(wrapped.close)
            handle.groups[name] = wrapped
        for name, wrapped in handle.groups.items():
            undo.append(functools.partial(setattr, PROCESS_GROUP, _ROUTES[name], inner[name]))
            setattr(PROCESS_GROUP, _ROUTES[name], wrapped)
        if method is not None:
            undo.append(method.remove)
            method.install()
        sites.groups = handle.groups
        undo.append(sites.remove)
        sites.install()  # after the method: names and layouts belong to whatever stands at `ring_attn`
        _follow(pipe, handle.groups, undo, method)
    except BaseException:
        handle.disable()
        raise
    return handle


def _follow(
    pipe: Any,
    groups: dict[str, Any],
    undo: list[Callable[[], None]],
    method: methods.GatheringMethod | None = None,
) -> None:
    """Let the transformers of `pipe` name the call sites and advance the steps, and every request begin anew."""
    inner = _unwrapped(pipe)
    clock = _Clock(groups, method)
    transformers = [getattr(inner, name, None) for name in ("transformer", "transformer_2")]
    if not any(isinstance(transformer, torch.nn.Module) for transformer in transformers):
        raise ValueError(f"{type(inner).__name__} has no transformer")
    for transformer in transformers:
        if isinstance(transformer, torch.nn.Module):
            undo.append(transformer.register_forward_pre_hook(clock.before_forward, with_kwargs=True).remove)
            # xfuser wraps the transformer in a module of its own; its layers keep their names inside.
            layers = getattr(transformer, "module", transformer)
            undo += [group.attach(layers, step_module=None).detach for group in groups.values()]

    # Every pipeline, of diffusers and of xfuser, begins its loop by asking the scheduler for the timesteps;
    # pipelines read the signature of this method to see what it accepts.
    scheduler = _unwrapped(inner.scheduler)
    original = scheduler.set_timesteps

    @functools.wraps(original)
    def set_timesteps(*args: Any, **kwargs: Any) -> Any:
        clock.new_request()
        return original(*args, **kwargs)

    scheduler.set_timesteps = set_timesteps
    undo.append(lambda: vars(scheduler).pop("set_timesteps", None))
