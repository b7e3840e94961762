"""One launch of one kernel, prepared once and repeated.

Triton's own dispatch binds and classifies every argument in every call. The arguments of a step hardly change, so a
``Launch`` goes through the dispatch once for each pattern of aligned pointers. It keeps the compiled kernel, and later
calls its launcher with pointers as plain integers, which the launcher does not look up.

Numbers and constants never change in a launch: Triton makes other code of a number that is 1 or a multiple of 16.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from operator import itemgetter
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

__all__ = ["Aligned", "Launch", "Slot", "alignment_of", "on", "stream_getter"]

Aligned = bool | tuple[bool, ...]
"""``True``: all pointers are multiples of 16. Otherwise which of them are."""


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
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        return torch.cuda.device(device)
    return _NOTHING


class Launch:
    """A kernel with its grid and arguments.

    Args:
        kernel: Compiled by Triton, or interpreted.
        grid: How many programs.
        arguments: Of its first parameters, in order: slots, tensors that stay, numbers.
        given: How much a call gives.
        constants: By name: all of its other parameters, and the options of compilation.
    """

    __slots__ = ("_arguments", "_compiled", "_constants", "_fixed", "_grid", "_kernel", "_pick")

    def __init__(
        self,
        kernel: Any,
        grid: int,
        arguments: Sequence[Any],
        given: int,
        constants: Mapping[str, Any],
    ) -> None:
        self._kernel = kernel
        self._grid = grid
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
        self._fixed = tuple(fixed)
        self._pick: Callable[[tuple[Any, ...]], tuple[Any, ...]] = itemgetter(*places)
        self._compiled: dict[Aligned, Any] = {}

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
        compiled = None if stream is None else self._compiled.get(aligned)
        if compiled is None:
            self._dispatch(tensors, aligned, stream)
            return
        values = self._pick(pointers + self._fixed)
        runtime = triton.knobs.runtime
        enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
        about = None
        if getattr(enter, "calls", enter) or getattr(leave, "calls", leave):
            about = compiled.launch_metadata((self._grid,), stream, *values)
        else:  # an empty chain of hooks would be called all the same
            enter = leave = None
        compiled.run(
            self._grid, 1, 1, stream, compiled.function, compiled.packed_metadata, about, enter, leave, *values
        )

    def _dispatch(self, tensors: tuple[Tensor | int, ...], aligned: Aligned, stream: int | None) -> None:
        values = [tensors[value.number] if isinstance(value, Slot) else value for value in self._arguments]
        values = [_bits(value) if isinstance(value, Tensor) else value for value in values]
        compiled = self._kernel[(self._grid,)](*values, **self._constants)
        if _KEPT and stream is not None and compiled is not None:  # None: a hook of Triton's took the launch away
            self._compiled[aligned] = compiled


def _bits(x: Tensor) -> Tensor:
    """What the kernels take: bfloat16 as int16."""
    x = x.detach()
    return x.view(torch.int16) if x.dtype == torch.bfloat16 else x
