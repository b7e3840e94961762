"""The clock of one end of a stream whose frames are sealed and checked on a device: what its next frame is.

``kernels.spec`` says what its words are. The device moves it on with every frame; a CUDA graph reads it, so that a
replay makes the next frame. The host keeps account of its own frames, and reads the clock only where graphs may have
been replayed or where it has to know the digest.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from compactdist import kernels
from compactdist.codecs.base import Session, tensors_in
from compactdist.errors import CaptureError
from compactdist.kernels.spec import CLOCK_WORDS, ENDED, FROM_HOST, TURN_WORD
from compactdist.state.history import Predictor
from compactdist.wire import MASK64

__all__ = ["COUNTERS", "DeviceClock"]

COUNTERS = 12
"""Words behind a clock's own in which graphs count their replays, see ``replays.py``. Memory that is made while a
graph is captured would be its own."""


class DeviceClock:
    """The clock of one end, and the stream of work that its frames follow.

    Attributes:
        words: int64 ``[CLOCK_WORDS + COUNTERS]``. A sender's keyframe writes another clock, see :meth:`begin`.
        source: which of the digests the next frame is made against; ``FROM_HOST``: the host knows the digest. Once a
            frame is part of the history, the next one reads what that one wrote: the other, the first after
            ``FROM_HOST``.
        right: the words say what the stream's next frame is: its last one was made or checked on the device.
        captured: a CUDA graph may move the clock.
        kept: what graphs that have ended still write to.
        queue: CUDA stream that worked on the history last, as ``kernels.queue_of`` gives it; ``None``: none yet.
    """

    __slots__ = ("captured", "kept", "next_words", "queue", "right", "source", "words")

    def __init__(self, device: torch.device) -> None:
        self.words, self.next_words = _ended(device), _ended(device)
        self.source = FROM_HOST
        self.right = self.captured = False
        self.kept: list[object] = []
        self.queue: int | None = None

    @property
    def on_device(self) -> bool:
        """Whether only the device knows the digest."""
        return self.source != FROM_HOST

    def begin(self) -> None:
        """A keyframe that was sealed against no digest, into ``next_words``, is part of the history.

        Sealed into ``words`` it would have overwritten the digest that counts if the frame is not sent.
        """
        self.words, self.next_words = self.next_words, self.words
        self.source = FROM_HOST

    def read(self) -> int:
        """The digest, once the device has it."""
        return int(self.words[self.source]) & MASK64

    def turn(self) -> tuple[int, int]:
        """The next frame's sequence number, modulo 2^32, and its source, once the device has them."""
        turn = int(self.words[TURN_WORD])
        return turn & 0xFFFFFFFF, turn >> 32

    def goes_on(self) -> Tensor:
        """On the device, bool ``[]``: no graph that was captured by this clock has ended."""
        return self.words[TURN_WORD] < FROM_HOST << 32

    def stop(self) -> None:
        """The words are no longer right: graphs end, until the stream's next frame is made on the device.

        Raises:
            CaptureError: a graph is being captured, which would do this in every replay, and nobody now.
        """
        if self.captured:
            if kernels.captures(self.words.device):
                raise CaptureError(
                    "reset(), and whatever else ends captured calls, cannot be part of a CUDA graph: do it before the "
                    "capture begins"
                )
            self.words[TURN_WORD].fill_(ENDED << 32)
        self.right = False

    def leave(self, held: Iterable[object]) -> None:
        """Begin another clock, as graphs know of memory that the stream will not use any more: they end for good.

        ``held``: what they write to. It is kept as long as they may be replayed.
        """
        self.stop()
        self.kept.append((self.words, *held))
        self.words, self.captured = _ended(self.words.device), False

    def follow(self, predictor: Predictor, now: int, session: Session | None = None) -> None:
        """Let the current CUDA stream wait for the one that worked on the history before, which is another one.

        ``session``: what it remembers goes over, too; what it has left to do is done on the stream it belongs to.
        """
        before, self.queue = self.queue, now
        device = self.words.device
        if before is None or device.type != "cuda":
            return
        stream, earlier = torch.cuda.current_stream(device), kernels.stream_of(before, device)
        held = list(predictor.held)
        if session is not None:
            with torch.cuda.stream(earlier):
                held += tensors_in(session.move)
        stream.wait_stream(earlier)
        for tensor in held:
            tensor.record_stream(stream)


def _ended(device: torch.device) -> Tensor:
    """A clock by which no graph can make a frame."""
    with torch.inference_mode(False):
        words = torch.zeros(CLOCK_WORDS + COUNTERS, dtype=torch.int64, device=device)
        words[TURN_WORD] = ENDED << 32
    return words
