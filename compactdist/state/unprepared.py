"""Work for the next frame that waits until a message is under way, so that it costs nothing where links are slow."""

from __future__ import annotations

from contextlib import suppress

from compactdist import kernels
from compactdist.codecs.base import Session

__all__ = ["Unprepared"]


class Unprepared:
    """Sessions whose ``prepare`` waits for the next call of the group, of whichever site, to be under way.

    What is left out is done by the session itself, when its next frame is made or arrives.

    Attributes:
        sessions: with the number of the CUDA stream that works on them; ``None`` on a CPU.
    """

    __slots__ = ("sessions",)

    def __init__(self) -> None:
        self.sessions: list[tuple[Session, int | None]] = []

    def add(self, session: Session) -> None:
        """A session has committed a frame, on the current CUDA stream."""
        device = session.device
        self.sessions.append((session, None if device.type == "cpu" else kernels.queue_of(device)))

    def prepare(self, queue: int | None) -> None:
        """Prepare the sessions of a CUDA stream (on a CPU: all), and forget the others.

        Args:
            queue: the current CUDA stream; ``None`` on a CPU. Nothing is prepared while it is captured: a replay would
                do it again.
        """
        waiting, self.sessions = self.sessions, []
        for session, its_queue in waiting:
            if its_queue == queue and not kernels.captures(session.device):
                with suppress(RuntimeError):  # no memory: the call that is under way has no part in it, the next has
                    session.prepare()
