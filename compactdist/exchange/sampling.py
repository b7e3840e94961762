"""How far reconstructions are from the tensors: measured on every n-th frame of a stream (``sample_errors_every``)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from compactdist.observe.stats import GroupStats
from compactdist.state.host_copy import HostCopy
from compactdist.wire import KEYFRAME, NONFINITE

if TYPE_CHECKING:
    from compactdist.exchange.engine import Flight
    from compactdist.exchange.plan import Call

__all__ = ["Samples"]


class Samples:
    """Measures frames for the statistics of a group.

    What a device measures is read when a call of another step or of the same site is measured, or where the statistics
    are asked for.

    Args:
        every: measure every n-th frame of a stream; 0: none.
        stats: of the group.
    """

    def __init__(self, every: int, stats: GroupStats) -> None:
        self.every = every
        self._stats = stats
        self._unread: list[tuple[Call, HostCopy, bool]] = []

    def take(self, flight: Flight) -> None:
        """Measure the frames of a flight whose turn it is.

        Called before they are committed, while the predictions they were made against are still there. A frame that is
        passed on is not sampled: no encoder added an error to it.
        """
        call, messages = flight.call, iter(flight.messages)
        self.read(besides=call)
        for part, x, staged in zip(flight.plan.outgoing, flight.inputs, flight.staged, strict=True):
            if staged is None or part.stream is None:
                continue
            message = next(messages, None)
            if staged.value is None or staged.header.flags & NONFINITE or (message is not None and message.forwards):
                continue
            if (part.stream.sequence + 1) % self.every == 0:
                copy = HostCopy(part.stream.energies(x, staged))
                self._unread.append((call, copy, bool(staged.header.flags & KEYFRAME)))
                if not staged.on_device:
                    self.read()

    def read(self, besides: Call | None = None, *, wait: bool = True) -> None:
        """Count what was measured, but for other sites' calls of this call's epoch and step; waits for devices, unless
        told not to.

        What this call's site measured before is read even where there are no steps, or it would pile up.
        """
        left = []
        for call, copy, is_keyframe in self._unread:
            if (besides is not None and _is_beside(call, besides)) or not (wait or copy.is_there):
                left.append((call, copy, is_keyframe))
                continue
            energy, residual, error = copy.read()
            if math.isfinite(error):  # else the tensor was not finite, which only the device knew
                self._stats.error(call.site, call.op, error, energy, math.nan if is_keyframe else residual)
        self._unread = left


def _is_beside(call: Call, other: Call) -> bool:
    """Whether two calls are of one step and of two sites."""
    return (call.epoch, call.step) == (other.epoch, other.step) and call.site != other.site
