"""Let a script that names CUDA run on a CPU: its devices, its clocks and its memory counters, nothing more.

    torchrun --nproc-per-node 2 -m compactdist_harness.cpu SCRIPT ...

installs it, and nothing else does. Times are wall-clock times and memory counters stay at zero, so the speed and memory
that such a script reports mean nothing. `torch.cuda.is_available()` stays false, so that callers of it keep away from
CUDA kernels; streams, graphs and device properties stay errors.
"""

from __future__ import annotations

import re
import time
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_CUDA = re.compile(r"cuda(:\d+)?")
_CPU = torch.device("cpu")


def _on_cpu(value: Any) -> Any:
    """The CPU where `value` names a CUDA device, otherwise `value`."""
    if isinstance(value, torch.device):
        return _CPU if value.type == "cuda" else value
    if isinstance(value, str) and _CUDA.fullmatch(value):
        return "cpu"
    return value


class _CpuForCuda(TorchFunctionMode):
    """Replaces CUDA devices among the arguments of every torch function, tensor method and `torch.device`."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is torch.Tensor.cuda:
            return args[0]
        if function is torch.device and _on_cpu((*args, *kwargs.values())[0]) in ("cpu", _CPU):
            return _CPU  # drops the index of torch.device("cuda", 1), which a CPU device does not take
        return function(*map(_on_cpu, args), **{name: _on_cpu(value) for name, value in kwargs.items()})


class _Event:
    """`torch.cuda.Event` on a CPU, where every operation is finished when its call returns."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self._seconds: float | None = None

    def record(self, stream: Any = None) -> None:
        self._seconds = time.perf_counter()

    def elapsed_time(self, end: _Event) -> float:
        """Milliseconds of wall-clock time between this event and `end`."""
        if self._seconds is None or end._seconds is None:
            raise RuntimeError("elapsed_time: both events must be recorded first; call record() on each")
        return 1000 * (end._seconds - self._seconds)

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        """Return at once: no operation is under way."""

    def wait(self, stream: Any = None) -> None:
        """Return at once: no operation is under way."""


_Generator = torch.Generator


class _GeneratorType(type):
    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, _Generator)


class _CpuGenerator(metaclass=_GeneratorType):
    """Stands in for `torch.Generator`, which does not pass through `_CpuForCuda`."""

    def __new__(cls, device: Any = "cpu") -> Any:
        return _Generator(_on_cpu(device))


def install() -> None:
    """Take CUDA devices for the CPU in this thread from now on.

    Calling it again does nothing, nor does calling it where CUDA is available.
    """
    cuda: Any = torch.cuda
    if cuda.Event is _Event or cuda.is_available():
        return
    # max_memory_allocated() and the other counters return zero as they are, because CUDA is never initialised.
    for name in ("synchronize", "set_device", "reset_peak_memory_stats"):
        setattr(cuda, name, lambda *_, **__: None)
    cuda.Event = _Event
    setattr(torch, "Generator", _CpuGenerator)  # noqa: B010 - a class may not be assigned to, as far as mypy knows
    _CpuForCuda().__enter__()  # torch's stack of modes keeps it
