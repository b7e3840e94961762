"""A few values of a device that the host wants to know later, and need not wait for now."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["HostCopy"]


class HostCopy:
    """A copy of small values, under way to the host.

    Args:
        values: 1-D, of any device; what the current stream of work makes of them.
    """

    __slots__ = ("_copied", "_copy")

    def __init__(self, values: Tensor) -> None:
        self._copied: torch.cuda.Event | None = None
        if values.device.type != "cuda":
            self._copy = values.clone()
            return
        self._copy = torch.empty(values.shape, dtype=values.dtype, device="cpu", pin_memory=True)
        self._copy.copy_(values, non_blocking=True)
        self._copied = torch.cuda.Event()
        self._copied.record(torch.cuda.current_stream(values.device))

    def read(self) -> list[float]:
        """The values; waits for the device if it has not come so far."""
        if self._copied is not None:
            self._copied.synchronize()
        return [float(value) for value in self._copy.tolist()]
