"""In place of a CUDA graph: launches, torch's operations and inner calls are recorded, not run, and replayed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from compactdist import _torch
from compactdist.exchange.link import Collectives
from compactdist.group.core import GroupCore
from compactdist.state.board import Board

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
        return [name for name, _ in self.nodes if not name.startswith("aten") and name.split()[0] not in INNER]

    def add(self, name: str, run: Callable[[], Any], *args: Any) -> None:
        """Record one node."""
        self.nodes.append((name, args))
        self._runs.append(run)

    def replay(self, *, inner_only: bool = False) -> None:
        """Run all nodes once more, or the inner calls only."""
        with _torch.without_autograd():
            for (name, _), run in zip(self.nodes, self._runs, strict=True):
                if not inner_only or name.removesuffix(" done") in INNER:
                    run()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = str(func)
        assert "_local_scalar_dense" not in name, "a captured call reads a value"
        if func._schema.is_mutable:
            self.add(name, partial(func, *args, **kwargs), *args, kwargs)
            return kwargs["out"] if "out" in kwargs else args[0]
        made = func(*args, **kwargs)
        may_view = any(one.alias_info is not None for one in func._schema.returns)
        is_view = may_view and _memory(made) in map(_memory, args)  # a conversion may have made a tensor
        if not is_view and not name.startswith("aten.empty"):
            self.add(name, lambda: made.copy_(func(*args, **kwargs)), *args, kwargs)
        return made


def _memory(value: Any) -> Any:
    """What tells tensors apart that do not share memory."""
    value = value[0] if isinstance(value, list | tuple) and value else value
    return value.untyped_storage().data_ptr() if isinstance(value, Tensor) else None


class _Work:
    """Stands for the work that a recorded inner call returns: waiting for it is a node of its own."""

    def __init__(self, made: Recorded, name: str) -> None:
        self._made, self._name = made, name
        self.real: Any = None

    def wait(self) -> None:
        self._made.add(f"{self._name} done", self._wait)

    def _wait(self) -> None:
        work, self.real = self.real, None
        if work is not None:
            work.wait()


class _Inner:
    """In place of an inner group: its calls are recorded."""

    def __init__(self, made: Recorded, inner: Any) -> None:
        self._made, self._inner, self._open = made, inner, False

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._inner, name)
        if name in CALLS:
            return partial(self.call, CALLS[name], real)
        return real

    def call(self, name: str, real: Callable[..., Any], *args: Any) -> Any:
        """Record a call; as NCCL does, a synchronous one and one inside a group of calls return ``None``."""
        work = _Work(self._made, name)

        def run() -> None:
            work.real = real(*args)

        self._made.add(name, run, *[arg for arg in args if isinstance(arg, Tensor | list | int)])
        self._open = name == "start" or (self._open and name != "end")
        returns = name in ("send", "recv", "end") or getattr(args[-1], "asyncOp", True)
        return None if self._open or not returns else work


CALLS = {
    "broadcast": "broadcast",
    "send": "send",
    "recv": "recv",
    **dict.fromkeys(_torch.START_COALESCING, "start"),
    **dict.fromkeys(_torch.END_COALESCING, "end"),
}
INNER = {"all_gather", "all_to_all", *CALLS.values()}


@contextmanager
def recording(*groups: Any) -> Iterator[Recorded]:
    """Capture what these groups' calls launch inside the block."""
    from triton.runtime.interpreter import InterpretedFunction

    made = Recorded()
    run = InterpretedFunction.run

    def launch(kernel: Any, *args: Any, **others: Any) -> None:
        made.add(kernel.fn.__name__, partial(run, kernel, *args, **others), *args, others)

    with ExitStack() as patched:
        for link in [group._engine.link for group in groups]:
            inner = _Inner(made, link._inner)
            patched.enter_context(patch.object(link, "_inner", inner))
            calls = {name: partial(inner.call, name, call) for name, call in link.on_cpu._asdict().items()}
            patched.enter_context(patch.object(link, "on_cpu", Collectives(**calls)))
        patched.enter_context(patch.object(_torch, "is_capturing", lambda: True))
        patched.enter_context(patch.object(Board, "poll", lambda *_, **__: None))  # it looks at no device that captures
        patched.enter_context(patch.object(InterpretedFunction, "run", launch))
        yield patched.enter_context(made)


@contextmanager
def like_a_gpu() -> Iterator[None]:
    """CPU tensors may be captured, as those of a GPU may."""
    with (
        patch.object(GroupCore, "_captures_cpu", True),
        patch.object(_torch, "is_capturing", bool),
    ):
        yield
