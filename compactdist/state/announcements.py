"""What a frame says of its own where only devices look at frames: the predictor's coefficient, announcements.

A device seals and checks frames by a template of their header (``kernels.Frames``). A sender writes what its frame says
into it. A receiver takes from the frame that arrived what such a frame may say, and zero in its place otherwise: then
the frame is another one than it expects, and is refused.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compactdist.codecs.base import Codec
from compactdist.kernels import Frames
from compactdist.state.history import Predictor
from compactdist.state.host_copy import HostCopy
from compactdist.wire import ANNOUNCED_PLACE, COEFFICIENT_PLACE

__all__ = ["announce", "announced", "coefficient_of", "expect_announcement", "expect_coefficient", "say_coefficient"]


def coefficient_of(frames: Frames) -> Tensor:
    """The coefficient that frames say: float32 ``[]`` of the template."""
    view = frames.views.get("coefficient")
    if view is None:
        view = frames.views["coefficient"] = frames.template[COEFFICIENT_PLACE].view(torch.float32)[0]
    return view


def say_coefficient(frames: Frames, x: Tensor, predictor: Predictor, codec: Codec, queue: int) -> Tensor:
    """Choose the coefficient that ``x``, flat, is predicted with, and let frames say it; returns it.

    ``codec``: of the residual, at the rate in use; ``queue``: ``kernels.queue_of`` the device.
    """
    return predictor.choose(x, codec.velocity_share, coefficient_of(frames), queue)


def expect_coefficient(frames: Frames, frame: Tensor, predictor: Predictor, queue: int) -> Tensor:
    """Let the template say the coefficient of a frame, 1-D uint8, if the frame may say it; returns it.

    ``queue``: ``kernels.queue_of`` the device.
    """
    return predictor.accept(frame, COEFFICIENT_PLACE.start, coefficient_of(frames), queue)


def announce(frames: Frames, rate: int, keyframe: bool) -> None:
    """Let frames announce a rate (0: none) and whether a keyframe follows, until they announce something else."""
    place = frames.template[ANNOUNCED_PLACE]
    place[0].fill_(rate)
    place[1].fill_(int(keyframe))


def expect_announcement(frames: Frames, frame: Tensor, rates: int) -> None:
    """Let the template announce what a frame, 1-D uint8, does, if that is one of so many rates and a known kind."""
    said = frame[ANNOUNCED_PLACE]
    known = (said[0] <= rates) & (said[1] <= 1)
    frames.template[ANNOUNCED_PLACE].copy_(torch.where(known, said, 0))


def announced(frames: Frames) -> HostCopy:
    """Of the frame checked last: whether it was the expected one, the rate and the kind of frame that it announced."""
    return HostCopy(torch.cat((frames.accepted[:1], frames.template[ANNOUNCED_PLACE])))
