"""CUDA streams as numbers: to compare two of them costs the host far less than to make objects of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch

__all__ = ["captures", "queue_of", "stream_of"]


def queue_of(device: torch.device) -> int:
    """The current CUDA stream of a device; 0 where there are none, and for the default stream."""
    return _getter()(device.index) if device.type == "cuda" else 0


@cache
def _getter() -> Callable[[int], int]:
    try:
        import triton
    except ImportError:
        return lambda index: int(torch.cuda.current_stream(index).cuda_stream)
    getter: Callable[[int], int] = triton.runtime.driver.active.get_current_stream
    return getter


def captures(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured on the current stream; no tensor of the device can be waited for then."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def stream_of(queue: int, device: torch.device) -> torch.cuda.Stream:
    """The CUDA stream of a number that :func:`queue_of` gave."""
    return torch.cuda.ExternalStream(queue, device) if queue else torch.cuda.default_stream(device)
