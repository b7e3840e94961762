"""A device that is not there: kernels are recorded instead of launched, and tensors have sizes but no memory.

Inside :func:`stub` tensors of torch's ``meta`` device go the way of CUDA tensors: the Triton kernels are chosen, their
launches prepared, kept and repeated, frames sealed and checked on the device. Triton's dispatch and the launchers of
its compiled kernels are recorders; torch's own operations are dispatched and do nothing; streams and devices are
answered by constants. What is left is what a call costs the host but for CUDA's own part: its launches, its allocator.

Nothing can be read from such tensors, so that a value the host would wait for raises.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

import compactdist
from compactdist import _torch, kernels
from compactdist.exchange.engine import Engine, Flight
from compactdist.exchange.patterns.all_gather import AllGather
from compactdist.state import StreamDecoder, StreamEncoder, host_copy
from compactdist.state.board import _OnDevice

DEVICE = torch.device("meta", 0)
STREAM = 7


class Launched(NamedTuple):
    """One launch: the kernel's name, its programs, and all of its arguments, addresses as integers."""

    name: str
    programs: int
    values: tuple[Any, ...]


class _Kernel:
    """In place of what Triton compiled; ``run`` is its launcher."""

    packed_metadata = function = None

    def __init__(self, name: str, recorded: list[tuple[str, int, tuple[Any, ...]]]) -> None:
        record = recorded.append

        def run(x: int, y: int, z: int, stream: int, *rest: Any) -> None:
            record((name, x, rest))

        self.run = run


_recorded: list[tuple[str, int, tuple[Any, ...]]] = []
"""One for all stubs of a process: launches are kept by the caches of ``kernels.gpu``, which outlast a stub."""


class Stub:
    """What went through Triton's dispatch, and what went to a launcher.

    Attributes:
        dispatched: names of kernels.
        recorded: launches as they came, which costs the host the least: kernel, programs, and the launcher's further
            arguments.
        gathers: inner all-gathers.
    """

    def __init__(self) -> None:
        self.dispatched: list[str] = []
        self.recorded = _recorded
        self.recorded.clear()
        self.gathers = 0

    @property
    def launched(self) -> list[Launched]:
        """The launches since ``recorded`` was cleared."""
        return [Launched(name, programs, rest[5:]) for name, programs, rest in self.recorded]

    def dispatch(self, kernel: Any, *_: Any, **others: Any) -> _Kernel:
        self.dispatched.append(kernel.fn.__name__)
        return _Kernel(kernel.fn.__name__, self.recorded)

    def gather(self, arrived: Any, frame: Any, opts: Any) -> None:
        """In place of the inner group's call; NCCL returns ``None``, too."""
        self.gathers += 1

    def wrap(self, inner: Any, codec: str | None = None, **settings: Any) -> Any:
        """A wrapped group whose streams begin as after a keyframe, and whose inner all-gathers are recorded."""
        made: Any = compactdist.wrap(inner, codec, warmup_steps=0, **settings)
        link = made._engine.link
        link.elsewhere = link.elsewhere._replace(all_gather=self.gather)
        return made


def begin(flight: Flight) -> None:
    """Let the streams of a call be as they are after a keyframe, which only a device can make."""
    plan = flight.plan
    for part in plan.parts:
        stream: Any = part.stream
        assert isinstance(stream, StreamEncoder | StreamDecoder)
        stream.start(part.numel, plan.dtype, part.hint)
        stream.predictor.advance(torch.empty(part.numel, dtype=plan.dtype, device=DEVICE), ())
        stream.sequence += 1
        stream.form(part.codec, DEVICE)
    plan.refresh()


@contextmanager
def stub() -> Iterator[Stub]:
    """Stub launchers for all tensors of ``DEVICE``; restored afterwards."""
    from triton.runtime.jit import JITFunction

    from compactdist.kernels.gpu import component_steps, frames, launch, launched, rounding, steps

    made = Stub()

    def refuse(pattern: AllGather, engine: Engine, flight: Flight) -> set[int]:
        begin(flight)  # asked once, where the site's first frame would be a keyframe
        return set()

    patches = [
        patch.object(JITFunction, "run", lambda kernel, *args, **others: made.dispatch(kernel, *args, **others)),
        *[patch.object(module, "DEVICE_TYPE", DEVICE.type) for module in (steps, rounding, component_steps)],
        patch.object(launched, "stream_getter", lambda device: lambda index: STREAM),
        patch.object(launch, "stream_getter", lambda device: lambda index: STREAM),
        patch.object(frames, "stream_getter", lambda device: lambda index: STREAM),
        patch.object(kernels, "queue_of", lambda device: STREAM),
        patch.object(torch.cuda, "current_device", lambda: 0),
        patch.object(torch.cuda, "is_current_stream_capturing", lambda: False),
        patch.object(_torch, "is_capturing", bool),
        patch.object(kernels.choice, "forced", "gpu"),
        patch.object(AllGather, "refuse", refuse),
        patch.object(host_copy, "copy_to_host", lambda tensor: torch.ones(tensor.shape, dtype=tensor.dtype)),
        patch.object(_OnDevice, "look", lambda self, wait: None),
    ]
    with ExitStack() as entered:
        for one in patches:
            entered.enter_context(one)
        yield made
