"""Work for the next frame that is done where a rank waits for a message, so that it costs nothing on slow links."""

from __future__ import annotations

from contextlib import suppress

from compactdist import kernels
from compactdist.codecs.base import Session

__all__ = ["Unprepared"]


class Unprepared:
    """Sessions of a group whose ``prepare`` waits until the group waits for a message, of whichever site.

    What is left out is done by the session itself, when its next frame is made or arrives. Any thread may wait. Where
    nobody ever does, as with synchronous calls on NCCL, a session is held once, until its site is forgotten.

    Attributes:
        sessions: with the number of the CUDA stream that works on them.
        late: how often a session had to prepare itself, as nobody had waited since its frame before.
    """

    __slots__ = ("late", "sessions")

    def __init__(self) -> None:
        self.sessions: dict[Session, int] = {}
        self.late = 0

    def add(self, session: Session) -> None:
        """A session has committed a frame, on the current CUDA stream."""
        self.late += session in self.sessions
        self.sessions[session] = kernels.queue_of(session.device)

    def prepare(self) -> None:
        """Prepare the sessions of the current CUDA stream; the others stay for who waits on theirs, or to themselves.

        Nothing is prepared while the stream is captured: a replay would do it again.
        """
        waiting, self.sessions = self.sessions, {}
        for session, queue in tuple(waiting.items()):  # another thread may still be adding to it
            if kernels.queue_of(session.device) != queue or kernels.captures(session.device):
                self.sessions.setdefault(session, queue)
            else:
                with suppress(Exception):  # as no memory: the call that is under way has no part in it, the next has
                    session.prepare()

    def clear(self) -> None:
        """Hold no session any longer: histories were forgotten. Those that remain in use prepare themselves."""
        self.sessions = {}
