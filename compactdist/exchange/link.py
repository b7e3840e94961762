"""The inner group's six calls that carry frames; callers see no difference between backends or torch versions.

A work that is ``None`` (NCCL, for a synchronous call) counts as done: later work on its CUDA stream comes after it.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from torch import Tensor

from compactdist import _torch

__all__ = ["Done", "Link", "as_work"]

_NO_TIMEOUT = timedelta(0)


class Done(_torch.Work):
    """The work of a call that returned none: nothing is left to wait for."""

    def __init__(self) -> None:
        super().__init__()

    def wait(self, timeout: timedelta = _NO_TIMEOUT) -> bool:
        """Return at once."""
        return True

    def is_completed(self) -> bool:
        """True."""
        return True

    def _source_rank(self) -> int:
        raise RuntimeError("the inner group returned no work for a receive from any source: receive from a named rank")


def as_work(work: Any) -> Any:
    """The work that an inner call returned, or a :class:`Done` if it returned ``None``."""
    return Done() if work is None else work


class Link:
    """The calls of an inner group that carry frames, 1-D uint8 tensors. Every call returns a work.

    Args:
        inner: the group that frames travel on; ``None`` once the wrapped group is closed: then no call can be made.
    """

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        if inner is None:
            return
        self._all_gather = _torch.first_method(inner, _torch.ALL_GATHER_SINGLE)
        self._all_to_all = _torch.first_method(inner, _torch.ALL_TO_ALL_SINGLE)

    def all_gather(self, arrived: Tensor, frame: Tensor, opts: Any) -> Any:
        """Gather every rank's frame, all of one size, into ``arrived``, in rank order."""
        return as_work(self._all_gather(arrived, frame, opts or _torch.options("AllgatherOptions")))

    def all_to_all(self, arrived: Tensor, frames: Tensor, arriving: list[int], leaving: list[int], opts: Any) -> Any:
        """Exchange frames between all ranks; ``arriving`` and ``leaving`` give bytes by group rank."""
        opts = opts or _torch.options("AllToAllOptions")
        return as_work(self._all_to_all(arrived, frames, arriving, leaving, opts))

    def broadcast(self, frame: Tensor, opts: Any) -> Any:
        """Copy the root's frame into every other rank's ``frame``."""
        return as_work(self._inner.broadcast([frame], opts))

    def send(self, frame: Tensor, peer: int, tag: int) -> Any:
        """Send a frame to group rank ``peer``."""
        return as_work(self._inner.send([frame], peer, tag))

    def receive(self, frame: Tensor, peer: int, tag: int) -> Any:
        """Receive a frame from group rank ``peer``."""
        return as_work(self._inner.recv([frame], peer, tag))

    def receive_any(self, frame: Tensor, tag: int) -> Any:
        """Receive a frame from whichever rank sends first; the work's ``_source_rank`` gives its group rank."""
        return as_work(self._inner.recv_anysource([frame], tag))
