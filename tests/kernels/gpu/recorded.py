"""In place of a CUDA graph: launches, torch's operations and inner all-gathers are recorded, not run, and replayed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from compactdist import _torch
from compactdist.group.core import GroupCore
from compactdist.state.board import Board
from compactdist.state.history import ExactLastValue

Node = tuple[str, tuple[Any, ...]]


class Recorded(TorchDispatchMode):
    """What a captured call did, in order.

    While it records, nothing that writes to a tensor runs. Operations that make a tensor run, for it must be there;
    a replay runs them again and writes to the same tensor. All tensors live as long as the recording, as those of a
    graph's own memory do.

    Attributes:
        nodes: name and arguments of each launch, operation and inner call.
    """

    def __init__(self) -> None:
        super().__init__()
        self.nodes: list[Node] = []
        self._runs: list[Callable[[], Any]] = []

    @property
    def launched(self) -> list[str]:
        """Names of the kernels, in order."""
        return [name for name, _ in self.nodes if not name.startswith("aten") and name != "all_gather"]

    def add(self, name: str, run: Callable[[], Any], *args: Any) -> None:
        """Record one node."""
        self.nodes.append((name, args))
        self._runs.append(run)

    def replay(self, only: str | None = None) -> None:
        """Run all nodes once more, or those of one name."""
        with _torch.without_autograd():
            for (name, _), run in zip(self.nodes, self._runs, strict=True):
                if only in (None, name):
                    run()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = str(func)
        assert "_local_scalar_dense" not in name, "a captured call reads a value"
        if func._schema.is_mutable:
            self.add(name, partial(func, *args, **kwargs), *args, kwargs)
            return kwargs["out"] if "out" in kwargs else args[0]
        made = func(*args, **kwargs)
        is_view = any(one.alias_info is not None for one in func._schema.returns)
        if not is_view and not name.startswith("aten.empty"):
            self.add(name, lambda: made.copy_(func(*args, **kwargs)), *args, kwargs)
        return made


@contextmanager
def recording(*groups: Any) -> Iterator[Recorded]:
    """Capture what these groups' calls launch inside the block."""
    from triton.runtime.interpreter import InterpretedFunction

    made = Recorded()
    run = InterpretedFunction.run

    def launch(kernel: Any, *args: Any, **others: Any) -> None:
        made.add(kernel.fn.__name__, partial(run, kernel, *args, **others), *args, others)

    links = [group._engine.link for group in groups]
    gathers = [link._all_gather for link in links]

    def gather(real: Any, arrived: Tensor, frame: Tensor, opts: Any) -> None:
        made.add("all_gather", partial(_gathered, real, arrived, frame, opts), arrived, frame)

    try:
        for link, real in zip(links, gathers, strict=True):
            link._all_gather = partial(gather, real)
        with (
            patch.object(_torch, "is_capturing", lambda: True),
            patch.object(Board, "poll", lambda *_, **__: None),  # which looks at no device that captures
            patch.object(InterpretedFunction, "run", launch),
            made,
        ):
            yield made
    finally:
        for link, real in zip(links, gathers, strict=True):
            link._all_gather = real


def _gathered(real: Any, arrived: Tensor, frame: Tensor, opts: Any) -> None:
    work = real(arrived, frame, opts)
    if work is not None:
        work.wait()


@contextmanager
def like_a_gpu() -> Iterator[None]:
    """CPU tensors may be captured, and histories keep their addresses, as they do on a GPU."""

    def advance(self: ExactLastValue, value: Tensor, terms: Any) -> Tensor | None:
        last = self._cell.value
        if last is None:
            self._cell.value = value
            return None
        if last is value:
            return None
        last.copy_(value)
        return value

    with (
        patch.object(GroupCore, "_captures_cpu", True),
        patch.object(_torch, "is_capturing", bool),
        patch.object(ExactLastValue, "advance", advance),
    ):
        yield
