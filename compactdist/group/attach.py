"""Hooks that let a model name its call sites and count its steps."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch

from compactdist import _torch
from compactdist.errors import ConfigError
from compactdist.group.keys import Clock, KeyBook, check_part

__all__ = ["Attachment", "Seen"]

_NOTHING = object()


class Seen:
    """What an attachment has seen of one request, which has a clock of its own.

    Attributes:
        forwards: of the module that counts steps, by branch.
        steps: that began.
        last_value: of ``step_value``.
    """

    __slots__ = ("forwards", "last_value", "steps")

    def __init__(self) -> None:
        self.forwards: dict[str, int] = {}
        self.steps = 0
        self.last_value: Any = _NOTHING

    def copy(self) -> Seen:
        """What was seen so far."""
        made = Seen()
        made.forwards, made.steps, made.last_value = dict(self.forwards), self.steps, self.last_value
        return made


class Attachment:
    """Forward hooks on a module tree; made by ``CompressedProcessGroup.attach``.

    Each module pushes its qualified name while it runs, so a call's prefix is the name of the innermost running module.
    A graph runs no hooks: a submodule that is compiled by now names all calls made inside it. In a module that is
    compiled as a whole, calls have no names.
    Steps: ``step_module``'s forwards are counted per branch, and a step begins when a branch comes round again; so the
    ``cond`` and ``uncond`` passes of one step share it.
    """

    def __init__(
        self,
        keys: KeyBook,
        module: torch.nn.Module,
        step_module: str | None,
        forwards_per_step: int,
        step_value: Callable[..., Any] | None,
    ) -> None:
        if forwards_per_step < 1:
            raise ConfigError(f"forwards_per_step must be >= 1, got {forwards_per_step}")
        if not isinstance(module, torch.nn.Module):
            raise ConfigError(
                f"attach takes a torch.nn.Module, got {type(module).__name__}: for a pipeline, its transformer"
            )
        modules = dict(module.named_modules())
        if step_module is not None and step_module not in modules:
            raise ConfigError(f"attach: {type(module).__name__} has no submodule '{step_module}' to count steps by")
        for name in modules:
            check_part(name)
        self._keys = keys
        keys.engaged = True
        self._forwards_per_step = forwards_per_step
        self._step_value = step_value
        self._handles: list[Any] = []
        self.restart()
        if step_module is not None:
            counted = modules[step_module]
            self._handles.append(counted.register_forward_pre_hook(self._count, with_kwargs=True))
        compiled: list[str] = []  # names of the submodules, not of the whole, that are compiled in place
        for name, child in modules.items():
            if any(name.startswith(f"{graph}.") for graph in compiled):
                continue
            shown = name or type(child).__name__
            if name and _torch.compiled_in_place(child):
                compiled.append(name)
                enter, leave = partial(keys.push_module, shown), partial(keys.pop_module, shown)
                self._handles.append(_torch.AroundCompiledCalls(child, enter, leave))
                continue
            self._handles.append(child.register_forward_pre_hook(self._entering(shown)))
            # always_call: a forward that raises must not leave its name on the stack
            self._handles.append(child.register_forward_hook(self._leaving(shown), always_call=True))

    def restart(self) -> None:
        """Forget how many forwards were seen (a new request)."""
        self._seen: WeakKeyDictionary[Clock, Seen] = WeakKeyDictionary()

    def seen(self, clock: Clock) -> Seen:
        """A copy of what was seen of the request with this clock."""
        return self._seen.get(clock, Seen()).copy()

    def go_on_from(self, clock: Clock, seen: Seen) -> None:
        """Count on from what had been seen of a request."""
        self._seen[clock] = seen.copy()

    def _entering(self, name: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: Any) -> None:
            if not torch.compiler.is_compiling():  # a compiled graph holds no names: its calls are counted in order
                self._keys.push_module(name)

        return hook

    def _leaving(self, name: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: Any, output: Any) -> None:
            if not torch.compiler.is_compiling():
                self._keys.pop_module(name)

        return hook

    def _count(self, module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        clock = self._keys.clock
        seen = self._seen.setdefault(clock, Seen())
        if self._step_value is not None:
            value = self._step_value(module, args, kwargs)
            if isinstance(value, torch.Tensor):  # one of its own: a scheduler may go on in the same memory
                value = value.tolist()
            if seen.last_value is _NOTHING or value != seen.last_value:
                seen.last_value = value
                self._keys.tick()
            return
        branch = self._keys.current_branch
        forwards = seen.forwards.get(branch, 0)
        seen.forwards[branch] = forwards + 1
        if forwards // self._forwards_per_step >= seen.steps:
            seen.steps += 1
            self._keys.tick()

    def detach(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *exc: object) -> None:
        self.detach()
