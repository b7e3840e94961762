"""The state of one site in host memory, and the way there and back.

All tensors are copied before the first is replaced, so a copy that fails, for lack of memory, changes nothing. Copies
from and to a GPU are ordered like any other work on the state, and the host waits for none of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from compactdist import kernels
from compactdist.codecs.base import tensors_in

__all__ = ["Movable", "Offloaded", "Queues", "copy_to_device", "copy_to_host"]


class Movable(Protocol):
    """One end of a stream, as far as moving its tensors goes."""

    def move(self, to: Callable[[Tensor], Tensor]) -> None:
        """Keep what ``to`` makes of each tensor that is held."""


class Queues:
    """The CUDA streams that work on the state of one site: a move waits for them, and later ones wait for the move."""

    __slots__ = ("_moved", "_used")

    def __init__(self) -> None:
        self._used: set[tuple[torch.device, int]] = set()
        self._moved: dict[torch.device, torch.cuda.Event] = {}

    def enter(self, device: torch.device) -> None:
        """The current CUDA stream of a device is about to work on the state."""
        if device.type != "cuda":
            return
        place = device, kernels.queue_of(device)
        if place not in self._used:
            self._used.add(place)
            self._follow_move(device)

    def before_move(self, device: torch.device) -> None:
        """Let the current stream wait for all others that worked on the state."""
        if device.type != "cuda":
            return
        now, current = kernels.queue_of(device), torch.cuda.current_stream(device)
        for _, queue in (place for place in self._used if place[0] == device and place[1] != now):
            current.wait_stream(kernels.stream_of(queue, device))
        self._follow_move(device)

    def after_move(self, device: torch.device) -> None:
        """The current stream has been told to copy: whoever works on the state next waits for that."""
        if device.type != "cuda":
            return
        self._used = {place for place in self._used if place[0] != device}
        self._moved[device] = event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(device))

    def wait(self) -> None:
        """Wait until what was moved has arrived, so that the host may read it."""
        for event in self._moved.values():
            event.synchronize()

    def _follow_move(self, device: torch.device) -> None:
        event = self._moved.get(device)
        if event is not None:
            torch.cuda.current_stream(device).wait_event(event)


class Offloaded:
    """What of a site's state lies in host memory, in the places of the tensors that it was copied from.

    Args:
        streams: the site's; every tensor that they move is taken to the host.
        queues: of the site.

    Raises:
        RuntimeError: the host has no memory for it; nothing has changed.
    """

    __slots__ = ("_devices", "_nbytes")

    def __init__(self, streams: Sequence[Movable], queues: Queues) -> None:
        tensors = {stream: tensors_in(stream.move) for stream in streams}
        self._devices = {stream: [tensor.device for tensor in there] for stream, there in tensors.items()}
        there = [tensor for of_stream in tensors.values() for tensor in of_stream]
        _replace(tensors, self._copied(queues, lambda: [copy_to_host(tensor) for tensor in there]))
        self._nbytes = {stream: sum(tensor.nbytes for tensor in there) for stream, there in tensors.items()}

    @property
    def nbytes(self) -> int:
        """Bytes in host memory."""
        return sum(self._nbytes.values())

    def forget(self, stream: Movable) -> None:
        """A stream has let go of its tensors."""
        self._devices.pop(stream, None)
        self._nbytes.pop(stream, None)

    def bring_back(self, queues: Queues) -> None:
        """Take everything back to where it was. The streams have not changed since, but for those that are forgotten.

        Raises:
            RuntimeError: a device has no memory for it; nothing has changed.
        """
        pairs = [pair for one, there in self._devices.items() for pair in zip(tensors_in(one.move), there, strict=True)]
        _replace(self._devices, self._copied(queues, lambda: [copy_to_device(*pair) for pair in pairs]))

    def _copied(self, queues: Queues, copy: Callable[[], list[Tensor]]) -> list[Tensor]:
        devices = dict.fromkeys(device for there in self._devices.values() for device in there)
        for device in devices:
            queues.before_move(device)
        copies = copy()
        for device in devices:
            queues.after_move(device)
        return copies


def copy_to_host(tensor: Tensor) -> Tensor:
    """A copy in host memory, of the same shape and dtype; from a GPU, pinned and perhaps still under way."""
    with torch.inference_mode(False), torch.no_grad():  # a normal tensor may be written to in every mode
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_cuda)
        copy.copy_(tensor, non_blocking=True)
    if tensor.is_cuda:  # freed now, and not used for anything else before it was read
        tensor.record_stream(torch.cuda.current_stream(tensor.device))
    return copy


def copy_to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on a device, of the same shape and dtype, at an address of its own."""
    with torch.inference_mode(False), torch.no_grad():
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        return copy.copy_(tensor, non_blocking=True)


def _replace(streams: Iterable[Movable], tensors: Iterable[Tensor]) -> None:
    others = iter(tensors)
    for stream in streams:
        stream.move(lambda _: next(others))
