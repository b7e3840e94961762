"""A link of a given speed, simulated on loopback."""

from __future__ import annotations

import time
from types import MethodType
from typing import Any

__all__ = ["slow_down"]


class _Arrives:
    """The work of a frame: done when gloo's is, and not before the link would have carried the frame."""

    def __init__(self, work: Any, at: float) -> None:
        self._work, self._at = work, at

    def wait(self) -> bool:
        self._work.wait()
        time.sleep(max(0.0, self._at - time.perf_counter()))
        return True

    def is_completed(self) -> bool:
        return bool(self._work.is_completed()) and time.perf_counter() >= self._at


def slow_down(group: Any, gbit: float) -> None:
    """Let the frames of a group's all-gathers arrive as on a link of so many Gbit/s, by which each rank receives.

    A frame comes after those posted before it. Waiting for it sleeps, so that it takes no processor time, as a network
    card's work does.
    """
    link = group._engine.link
    plain, free = link.all_gather, 0.0

    def all_gather(self: Any, arrived: Any, frame: Any, opts: Any) -> Any:
        nonlocal free
        free = max(free, time.perf_counter()) + 8e-9 * (arrived.numel() - frame.numel()) / gbit
        return _Arrives(plain(arrived, frame, opts), free)

    link.all_gather = MethodType(all_gather, link)
