"""One launch of one kernel, prepared once and repeated.

Triton's own dispatch binds and classifies every argument in every call. The arguments of a step hardly change, so a
``Launch`` goes through the dispatch once for each pattern of aligned pointers. It keeps the compiled kernel, and later
calls its launcher with pointers as plain integers, which the launcher does not look up.

Numbers and constants never change in a launch: Triton makes other code of a number that is 1 or a multiple of 16.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from operator import itemgetter, methodcaller
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

__all__ = [
    "ADDRESS",
    "Aligned",
    "Launch",
    "Series",
    "Slot",
    "alignment_of",
    "is_elsewhere",
    "on",
    "run",
    "stream_getter",
]

Aligned = bool | tuple[bool, ...]
"""``True``: all pointers are multiples of 16. Otherwise which of them are."""


ADDRESS = methodcaller("data_ptr")
"""Of a tensor: a call of C, where a comprehension would be one of Python."""

_NOTHING = nullcontext()
# For AMD's devices Triton compiles other code by the size of a tensor, too: there every launch is dispatched.
_KEPT = torch.version.hip is None


class Slot(NamedTuple):
    """In place of an argument: the tensor with this number among those that a call gives.

    A call may give integers, too, for parameters that the kernel excepts from specialization.
    """

    number: int


def alignment_of(pointers: tuple[int, ...]) -> Aligned:
    """What Triton compiles other code for."""
    together = 0
    for pointer in pointers:
        together |= pointer
    return True if together % 16 == 0 else tuple([pointer % 16 == 0 for pointer in pointers])


def stream_getter(device: torch.device) -> Callable[[int], int] | None:
    """What returns the current stream of a device, by its index, as the launcher takes it.

    ``None`` for the CPU, where Triton interprets.
    """
    if device.type != "cuda":
        return None
    getter: Callable[[int], int] = triton.runtime.driver.active.get_current_stream
    return getter


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device."""
    return torch.cuda.device(device) if is_elsewhere(device) else _NOTHING


def is_elsewhere(device: torch.device) -> bool:
    """Whether another CUDA device is the current one."""
    return device.type == "cuda" and device.index != torch.cuda.current_device()


class Launch:
    """A kernel with its grid and arguments.

    Args:
        kernel: Compiled by Triton, or interpreted.
        grid: How many programs.
        arguments: Of its first parameters, in order: slots, tensors that stay, numbers.
        given: How much a call gives.
        constants: By name: all of its other parameters, and the options of compilation.

    Attributes:
        grid, given: As above.
        fixed: The values that stay, addresses for tensors.
        places: Of all parameters, in the values that a call gives followed by the fixed ones.
        compiled: What Triton made of the kernel, by how pointers are aligned.
    """

    __slots__ = ("_arguments", "_constants", "_kernel", "_pick", "compiled", "fixed", "given", "grid", "places")

    def __init__(
        self,
        kernel: Any,
        grid: int,
        arguments: Sequence[Any],
        given: int,
        constants: Mapping[str, Any],
    ) -> None:
        self._kernel = kernel
        self.grid = grid
        self._arguments = tuple(arguments)
        self._constants = dict(constants)
        # The launcher takes the constants, too, and passes over them.
        values = [*arguments, *(constants[name] for name in kernel.arg_names[len(arguments) :])]
        fixed: list[Any] = []
        places: list[int] = []
        for value in values:
            if isinstance(value, Slot):
                places.append(value.number)
            else:
                places.append(given + len(fixed))
                fixed.append(value.data_ptr() if isinstance(value, Tensor) else value)
        self.fixed = tuple(fixed)
        self.given, self.places = given, tuple(places)
        self._pick: Callable[[tuple[Any, ...]], tuple[Any, ...]] = itemgetter(*places)
        self.compiled: dict[Aligned, Any] = {}

    def __call__(
        self, tensors: tuple[Tensor | int, ...], pointers: tuple[int, ...], aligned: Aligned, stream: int | None
    ) -> None:
        """Launch on the current device.

        Args:
            tensors: What slots stand for, contiguous. Of each only the address may differ from one call to the next; of
                an integer, the value.
            pointers: Their addresses, and the integers.
            aligned: ``alignment_of`` the addresses.
            stream: The current one; ``None``: leave it all to Triton's dispatch.
        """
        compiled = None if stream is None else self.compiled.get(aligned)
        if compiled is None:
            self._dispatch(tensors, aligned, stream)
            return
        values = self._pick(pointers + self.fixed)
        runtime = triton.knobs.runtime
        enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
        about = None
        if getattr(enter, "calls", enter) or getattr(leave, "calls", leave):
            about = compiled.launch_metadata((self.grid,), stream, *values)
        else:  # an empty chain of hooks would be called all the same
            enter = leave = None
        compiled.run(self.grid, 1, 1, stream, compiled.function, compiled.packed_metadata, about, enter, leave, *values)

    def renumbered(self, numbers: Sequence[int], given: int) -> Launch:
        """The same launch of a call that gives so much, where its own slots are those of other ``numbers``."""
        arguments = [Slot(numbers[one.number]) if isinstance(one, Slot) else one for one in self._arguments]
        return Launch(self._kernel, self.grid, arguments, given, self._constants)

    def _dispatch(self, tensors: tuple[Tensor | int, ...], aligned: Aligned, stream: int | None) -> None:
        values = [tensors[value.number] if isinstance(value, Slot) else value for value in self._arguments]
        values = [_bits(value) if isinstance(value, Tensor) else value for value in values]
        compiled = self._kernel[(self.grid,)](*values, **self._constants)
        if _KEPT and stream is not None and compiled is not None:  # None: a hook of Triton's took the launch away
            self.compiled[aligned] = compiled


class Series:
    """Launches that follow one another with the same arguments given, which cost the host less together.

    Args:
        launches: in order; each has the same ``given``.
    """

    __slots__ = ("_fixed", "_launches", "_picks", "_ready")

    def __init__(self, launches: Sequence[Launch]) -> None:
        self._launches = tuple(launches)
        self._fixed: tuple[Any, ...] = ()
        self._picks: list[Callable[[tuple[Any, ...]], tuple[Any, ...]]] = []
        for launch in launches:
            shift, given = len(self._fixed), launch.given
            self._picks.append(itemgetter(*[at if at < given else at + shift for at in launch.places]))
            self._fixed += launch.fixed
        self._ready: dict[Aligned, list[tuple[Any, ...]]] = {}

    def repeat(self, pointers: tuple[int, ...], aligned: Aligned, stream: int | None) -> bool:
        """Launch all on the current device if that was done before; arguments as for a :class:`Launch`.

        Returns:
            Whether it was done; if not, :meth:`begin` has to do it.
        """
        ready = None if stream is None else self._ready.get(aligned)
        runtime = triton.knobs.runtime
        enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
        if ready is None or getattr(enter, "calls", enter) or getattr(leave, "calls", leave):
            return False
        values = pointers + self._fixed
        for run, grid, function, packed, pick in ready:
            run(grid, 1, 1, stream, function, packed, None, None, None, *pick(values))
        return True

    def begin(
        self, tensors: tuple[Tensor | int, ...], pointers: tuple[int, ...], aligned: Aligned, stream: int | None
    ) -> None:
        """Launch all on the current device, by Triton's dispatch where that has to be."""
        for launch in self._launches:
            launch(tensors, pointers, aligned, stream)
        if all(aligned in launch.compiled for launch in self._launches):
            compiled = [launch.compiled[aligned] for launch in self._launches]
            self._ready[aligned] = [
                (one.run, launch.grid, one.function, one.packed_metadata, pick)
                for one, launch, pick in zip(compiled, self._launches, self._picks, strict=True)
            ]


def run(launch: Launch | Series, tensors: tuple[Tensor, ...], device: torch.device, queue: int | None = None) -> None:
    """Launch once on the current stream of a device; all slots are tensors.

    ``queue``: ``kernels.queue_of`` the device, where the caller has asked.
    """
    if is_elsewhere(device):
        with torch.cuda.device(device):
            run(launch, tensors, device, queue)
        return
    pointers, stream = tuple(map(ADDRESS, tensors)), None if device.type == "cpu" else queue
    if queue is None:
        getter = stream_getter(device)
        stream = None if getter is None else getter(torch.cuda.current_device())
    aligned = alignment_of(pointers)
    if isinstance(launch, Launch):
        launch(tensors, pointers, aligned, stream)
    elif not launch.repeat(pointers, aligned, stream):
        launch.begin(tensors, pointers, aligned, stream)


def _bits(x: Tensor) -> Tensor:
    """What the kernels take: bfloat16 as int16."""
    x = x.detach()
    return x.view(torch.int16) if x.dtype == torch.bfloat16 else x
