"""The digest of a stream whose frames are sealed and checked on a device, and the stream of work they follow."""

from __future__ import annotations

import torch

from compactdist import kernels
from compactdist.state.history import Predictor
from compactdist.wire import MASK64

__all__ = ["FROM_HOST", "DeviceDigest"]

FROM_HOST = 2
"""In place of one of a pair: the host knows the digest."""


class DeviceDigest:
    """A pair of int64 on the device, of which the next frame reads one and writes the other.

    Attributes:
        pair: int64 ``[2]``. A sender's keyframe writes another one, see :meth:`begin`.
        source: which of them the next frame is made against; ``FROM_HOST``: the host knows the digest. Once a frame is
            part of the history, the next one reads what that one wrote: the other, the second after ``FROM_HOST``.
        queue: CUDA stream that worked on the history last, as ``kernels.queue_of`` gives it; ``None``: none yet.
    """

    __slots__ = ("next_pair", "pair", "queue", "source")

    def __init__(self, device: torch.device) -> None:
        with torch.inference_mode(False):
            self.pair = torch.zeros(2, dtype=torch.int64, device=device)
            self.next_pair = torch.zeros(2, dtype=torch.int64, device=device)
        self.source = FROM_HOST
        self.queue: int | None = None

    @property
    def on_device(self) -> bool:
        """Whether only the device knows the digest."""
        return self.source != FROM_HOST

    def begin(self) -> None:
        """A keyframe that was sealed against no digest, into ``next_pair``, is part of the history.

        Sealed into ``pair`` it would have overwritten the digest that counts if the frame is not sent.
        """
        self.pair, self.next_pair = self.next_pair, self.pair
        self.source = FROM_HOST

    def read(self) -> int:
        """The digest, once the device has it."""
        return int(self.pair[self.source]) & MASK64

    def follow(self, predictor: Predictor, now: int) -> None:
        """Let the current CUDA stream wait for the one that worked on the history before, which is another one."""
        before, self.queue = self.queue, now
        device = self.pair.device
        if before is None or device.type != "cuda":
            return
        stream = torch.cuda.current_stream(device)
        stream.wait_stream(kernels.stream_of(before, device))
        for tensor in predictor.held:
            tensor.record_stream(stream)
