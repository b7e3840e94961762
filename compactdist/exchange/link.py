"""The inner group's six calls that carry frames. Everything that a backend or a torch version does otherwise is here.

A work that is ``None`` (NCCL, for a synchronous call) counts as done: later work on the same stream comes after it.
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
    """What an inner call returned, as a work."""
    return Done() if work is None else work


class Link:
    """An inner group, by what frames need of it.

    Args:
        inner: the group frames travel on; ``None``: a closed group's, which is never used.
    """

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        if inner is None:
            return
        self._all_gather = _torch.first_method(inner, _torch.ALL_GATHER_SINGLE)
        self._all_to_all = _torch.first_method(inner, _torch.ALL_TO_ALL_SINGLE)

    def all_gather(self, arrived: Tensor, frame: Tensor, opts: Any) -> Any:
        """Every rank's frame, all of one size, into ``arrived``, one after the other."""
        return as_work(self._all_gather(arrived, frame, opts or _torch.options("AllgatherOptions")))

    def all_to_all(self, arrived: Tensor, frames: Tensor, arriving: list[int], leaving: list[int], opts: Any) -> Any:
        """Bytes to and from every rank; sizes by group rank."""
        opts = opts or _torch.options("AllToAllOptions")
        return as_work(self._all_to_all(arrived, frames, arriving, leaving, opts))

    def broadcast(self, frame: Tensor, opts: Any) -> Any:
        """The root's frame into every rank's."""
        return as_work(self._inner.broadcast([frame], opts))

    def send(self, frame: Tensor, peer: int, tag: int) -> Any:
        """A frame to group rank ``peer``."""
        return as_work(self._inner.send([frame], peer, tag))

    def receive(self, frame: Tensor, peer: int, tag: int) -> Any:
        """A frame from group rank ``peer``."""
        return as_work(self._inner.recv([frame], peer, tag))

    def receive_any(self, frame: Tensor, tag: int) -> Any:
        """A frame from whoever sends first; the work's ``_source_rank`` says who that was."""
        return as_work(self._inner.recv_anysource([frame], tag))
