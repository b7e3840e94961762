"""The digest of a stream whose frames are sealed and checked on a device, and the stream of work they follow."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from compactdist.wire import MASK64

__all__ = ["DeviceDigest"]

FROM_HOST = 2


class DeviceDigest:
    """A pair of int64 on the device, of which the next frame reads one and writes the other.

    Attributes:
        pair: int64 ``[2]``.
        source: which of them the next frame is made against; ``FROM_HOST``: the host knows the digest.
    """

    __slots__ = ("_queue", "pair", "source")

    def __init__(self, device: torch.device) -> None:
        with torch.inference_mode(False):
            self.pair = torch.zeros(2, dtype=torch.int64, device=device)
        self.source = FROM_HOST
        self._queue: torch.cuda.Stream | None = None

    @property
    def on_device(self) -> bool:
        """Whether only the device knows the digest."""
        return self.source != FROM_HOST

    def flip(self) -> None:
        """The frame is part of the history: the next one reads what it wrote (the first, after the host's digest)."""
        self.source = 1 if self.source == 0 else 0

    def read(self) -> int:
        """The digest, once the device has it."""
        return int(self.pair[self.source]) & MASK64

    def follow(self, held: Iterable[Tensor]) -> None:
        """Let the current CUDA stream wait for the one that worked on the history before, if it is another one."""
        if not self.pair.is_cuda:
            return
        now = torch.cuda.current_stream(self.pair.device)
        if self._queue is not None and self._queue != now:
            now.wait_stream(self._queue)
            for tensor in held:
                tensor.record_stream(now)
        self._queue = now
