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


def room(name: str, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor of any contents, contiguous; good until this thread asks for the same name again."""
    if device.type != "cpu":  # the caching allocator of a GPU does as well
        return torch.empty(shape, dtype=dtype, device=device)
    held, nbytes = _room.held.get(name), math.prod(shape) * dtype.itemsize
    if held is None or held.nbytes < nbytes:
        with torch.inference_mode(False):  # or it could not be written to outside of the mode it was made in
            held = _room.held[name] = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
    return held[:nbytes].view(dtype).view(shape)
