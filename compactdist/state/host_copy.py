"""A few values of a device that the host wants to know later, and need not wait for now."""

from __future__ import annotations

import torch
from torch import Tensor

from compactdist.state.offloaded import copy_to_host

__all__ = ["HostCopy"]


class HostCopy:
    """A copy of small values, under way to the host.

    Args:
        values: 1-D, of any device; what the current stream of work makes of them.
    """

    __slots__ = ("_copied", "_copy")

    def __init__(self, values: Tensor) -> None:
        self._copy = copy_to_host(values)
        self._copied: torch.cuda.Event | None = None
        if values.is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(values.device))

    @property
    def is_there(self) -> bool:
        """Whether :meth:`read` would not wait."""
        return self._copied is None or self._copied.query()

    def read(self) -> list[float]:
        """The values; waits for the device if it has not come so far."""
        if self._copied is not None:
            self._copied.synchronize()
        return [float(value) for value in self._copy.tolist()]
