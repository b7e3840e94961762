"""Let a script that names CUDA run on a CPU: its devices, its clocks and its memory counters, nothing more.

    torchrun --nproc-per-node 2 -m compactdist_xdit.cpu SCRIPT ...

is how it is used, and the only use. It is for trying out and for tests: times are wall-clock times and memory counters
stay at zero, so nothing that such a script reports about speed or memory means anything. `torch.cuda.is_available()`
stays false, so that whoever asks keeps away from CUDA kernels; streams, graphs and device properties stay errors.
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
    """`value`, or the CPU where it names a CUDA device."""
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
            return _CPU  # torch.device("cuda", 1): the index goes as well
        return function(*map(_on_cpu, args), **{name: _on_cpu(value) for name, value in kwargs.items()})


class _Event:
    """`torch.cuda.Event` for work that is finished when the call returns."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self._seconds: float | None = None

    def record(self, stream: Any = None) -> None:
        self._seconds = time.perf_counter()

    def elapsed_time(self, end: _Event) -> float:
        """Milliseconds of wall-clock time."""
        if self._seconds is None or end._seconds is None:
            raise RuntimeError("both events must be recorded before their distance is asked for")
        return 1000 * (end._seconds - self._seconds)

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        """Nothing is ever under way."""

    def wait(self, stream: Any = None) -> None:
        """Nothing is ever under way."""


_Generator = torch.Generator


class _GeneratorType(type):
    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, _Generator)


class _CpuGenerator(metaclass=_GeneratorType):
    """Stands in for `torch.Generator`, which does not pass through `_CpuForCuda`."""

    def __new__(cls, device: Any = "cpu") -> Any:
        return _Generator(_on_cpu(device))


_mode: _CpuForCuda | None = None


def install() -> None:
    """From now on this thread takes CUDA devices for the CPU. Idempotent; where CUDA is available it does nothing."""
    global _mode
    if _mode is not None or torch.cuda.is_available():
        return
    cuda: Any = torch.cuda
    # The counters themselves (max_memory_allocated, ...) answer zero by themselves where CUDA was never initialised.
    for name in ("synchronize", "set_device", "reset_peak_memory_stats"):
        setattr(cuda, name, lambda *_, **__: None)
    cuda.Event = _Event
    setattr(torch, "Generator", _CpuGenerator)  # noqa: B010 - a class may not be assigned to, as far as mypy knows
    _mode = _CpuForCuda()
    _mode.__enter__()
