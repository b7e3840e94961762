"""Memory of each thread that codes, kept from step to step: fresh pages cost more than the work done in them."""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor

__all__ = ["room"]


class _Room(threading.local):
    def __init__(self) -> None:
        self.held: dict[str, Tensor] = {}


_room = _Room()


def room(name: str, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """float32 of any contents, contiguous; good until this thread asks for the same name again."""
    if device.type != "cpu":  # the caching allocator of a GPU does as well
        return torch.empty(shape, device=device)
    held, size = _room.held.get(name), math.prod(shape)
    if held is None or held.numel() < size:
        with torch.inference_mode(False):  # or it could not be written to outside of the mode it was made in
            held = _room.held[name] = torch.empty(size)
    return held[:size].view(shape)
