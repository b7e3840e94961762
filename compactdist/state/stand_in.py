"""Stand-ins: of a keyframe that nobody was told of, where all frames have a size that was agreed beforehand.

A stand-in has that size. It holds the keyframe's header with the flag ``STAND_IN`` and zeros behind it; the keyframe
itself follows in a message of its own, from the same rank.
"""

from __future__ import annotations

from dataclasses import replace

from compactdist.state.staged import Staged
from compactdist.wire import STAND_IN, Header, empty_frame, hash64, seal

__all__ = ["FrameFollows", "put_behind", "tag_of"]

_LEAST_TAG = 1 << 30


class FrameFollows(Exception):
    """What was to be decoded is a stand-in; nothing has changed.

    Attributes:
        header: of the frame that follows, but for the flag.
    """

    def __init__(self, header: Header) -> None:
        super().__init__(header.describe())
        self.header = header


def put_behind(staged: Staged, nbytes: int) -> None:
    """Put a staged frame behind a stand-in of ``nbytes``."""
    header = replace(staged.header, flags=staged.header.flags | STAND_IN)
    frame, _ = empty_frame(header.nbytes, 0, nbytes, staged.frame.device)
    staged.frame, staged.behind = seal(frame, header), staged.frame


def tag_of(header: Header) -> int:
    """The tag of the message that the frame follows in: 30 bits of what tells it from other frames of its sender.

    A frame that was never received is thus not taken for a later one.
    """
    names = (header.stream, header.epoch, header.sequence, header.part)
    return _LEAST_TAG | hash64(*map(str, names)) % _LEAST_TAG
