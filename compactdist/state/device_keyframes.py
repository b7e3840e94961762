"""Keyframes that a device seals and checks, as it does residuals: the host knows kind and size, and looks at no value.

A tensor that is not finite is found on the device, after its frame's size is agreed on, so that both ends go on from a
finite history instead of forgetting it. A coded keyframe then has a flag, says zero where the tensor cannot be coded,
and its values are handed out as NaN. A keyframe of the tensor's own bytes is handed out as it is, and has no flag: both
ends remember zero where it is not finite (:func:`finite`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compactdist import kernels
from compactdist.codecs.base import Codec, Session, Terms
from compactdist.kernels.spec import HeadPlaces, MatrixView
from compactdist.wire import HEAD_PLACES, KEYFRAME, NONFINITE, HeadTemplate, raw_nbytes

if TYPE_CHECKING:
    from compactdist.state.stream import StreamState

__all__ = ["DeviceKeyframes", "finite", "device_keyframes_of", "remembered"]

_UNFLAGGED = HEAD_PLACES._replace(NONFINITE=0)
"""A frame of the tensor's own bytes with the flag ``NONFINITE`` comes from a host, whose end has forgotten the
history: a device, which could not do so in time, must refuse it."""


def finite(values: Tensor) -> Tensor:
    """What both ends remember of a keyframe of the tensor's own bytes: new memory, zero where it is not finite."""
    return torch.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)


def remembered(values: Tensor, flags: int) -> Tensor:
    """What both ends remember of a keyframe of the tensor's own bytes that a host looked into.

    Without a flag it may come from a device, which remembers :func:`finite` values; with one it begins no history.
    """
    may_be_of_device = kernels.frames_for(values.device) is not None and not flags & NONFINITE
    return finite(values) if may_be_of_device else values


class DeviceKeyframes:
    """What the keyframes of one codec, size and dtype share at one end of a stream whose device makes or checks them.

    Attributes:
        head: the bytes before the payload; what differs from frame to frame is filled in.
        frames: seals or checks them.
        nbytes: of a frame, header included, padding excluded.
        own_bytes: they carry the tensor's own bytes.
    """

    __slots__ = ("_session", "_what", "frames", "head", "nbytes", "own_bytes")

    def __init__(
        self,
        what: tuple[Codec, int, torch.dtype, torch.device, MatrixView | None],
        head: HeadTemplate,
        frames: kernels.Frames,
        session: Session | RawSession,
    ) -> None:
        self._what, self._session = what, session
        self.head, self.frames = head, frames
        self.nbytes = head.header.nbytes + head.header.payload_nbytes
        self.own_bytes = isinstance(session, RawSession)

    def suit(self, codec: Codec, numel: int, dtype: torch.dtype, device: torch.device, hint: MatrixView | None) -> bool:
        """Whether keyframes of such tensors are these, on a stream with this codec of residuals."""
        ours, *others = self._what
        return (ours is codec or ours == codec) and others == [numel, dtype, device, hint]

    @property
    def steps(self) -> kernels.DeviceSteps | None:
        """Code the tensor; ``None``: the host has to, as the kernels in use were changed."""
        return self._session.device_steps


class RawSession:
    """Stands in for a codec's session where keyframes carry the tensor's own bytes."""

    __slots__ = ("_device", "_nbytes", "payload_nbytes")

    def __init__(self, numel: int, dtype: torch.dtype, device: torch.device) -> None:
        self._device, self._nbytes = device, numel * dtype.itemsize
        self.payload_nbytes = raw_nbytes(numel, dtype)

    @property
    def device_steps(self) -> kernels.DeviceSteps | None:
        """The steps that copy the tensor, wherever a device seals and checks frames."""
        return None if kernels.frames_for(self._device) is None else RawSteps(self._nbytes)


class RawSteps:
    """Copies tensors into payloads and out of them, by operations of torch; see ``kernels.DeviceSteps``.

    Args:
        nbytes: of the tensor; what the payload has beyond them is zero.
    """

    __slots__ = ("_nbytes", "checksum")

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes
        self.checksum: int | None = None

    def encode(
        self,
        x: Tensor,
        terms: Terms,
        out: Tensor | None,
        payload: Tensor,
        *,
        copy: Tensor | None = None,
        flag: Tensor | None = None,
    ) -> bool:
        """Copy ``x`` to ``payload``, ``out`` and ``copy``. What is not finite stays as it is, so no flag is needed."""
        payload[: self._nbytes].view(x.dtype).copy_(x)
        payload[self._nbytes :].zero_()
        if out is not None:
            out.copy_(x)
        if copy is not None:
            copy.copy_(x.view(copy.shape))
        return True

    def decode(
        self,
        payload: Tensor,
        terms: Terms,
        out: Tensor,
        *,
        copy: Tensor | None = None,
        accepted: Tensor | None = None,
    ) -> bool:
        """Copy the tensor to ``copy``, and to ``out`` what is remembered of it."""
        values = payload[: self._nbytes].view(out.dtype)
        remembered = finite(values)
        if accepted is None:
            out.copy_(remembered)
            if copy is not None:
                copy.copy_(values.view(copy.shape))
            return True
        taken, held = accepted.view(torch.bool)
        torch.where(taken, remembered, out, out=out)
        if copy is not None:
            nan = torch.full((), torch.nan, dtype=out.dtype, device=out.device)
            torch.where(held, values.view(copy.shape), nan, out=copy)
        return True


def device_keyframes_of(
    stream: StreamState,
    codec: Codec,
    numel: int,
    dtype: torch.dtype,
    device: torch.device,
    hint: MatrixView | None,
    board: Tensor,
    number: int,
) -> DeviceKeyframes | None:
    """What a stream's keyframes of such tensors share; ``None``: the host makes and checks them.

    Args:
        stream: the stream; its sender keeps no values of its own.
        codec: of residuals, of one rate: of several, a keyframe announces one.
        numel: elements of the tensors, above 0.
        dtype: of the tensors.
        device: of the tensors.
        hint: as for ``StreamState.keyframe_view``.
        board: the group's, on the device.
        number: the stream's on it.
    """
    made = kernels.frames_for(device)
    if made is None:
        return None
    coded = stream.config.keyframe_for(codec, numel, dtype)
    session: Session | RawSession
    places: HeadPlaces
    if coded is None:
        session, places = RawSession(numel, dtype, device), _UNFLAGGED
        fields = {"keyframe_codec": 0}
    else:
        view = stream.keyframe_view(coded, numel, dtype, hint)
        opened = coded.open(view, dtype, device)
        if opened.remembers:
            return None  # every keyframe begins anew
        session, places = opened, HEAD_PLACES
        fields = {"groups": view.groups, "rows": view.rows, "channels": view.channels, "layout": view.hint}
    nbytes = session.payload_nbytes
    if session.device_steps is None or nbytes % 4:
        return None
    head = HeadTemplate(stream.header_of(codec, numel, dtype, flags=KEYFRAME, payload_nbytes=nbytes, **fields))
    return DeviceKeyframes(
        (codec, numel, dtype, device, hint), head, made(head.raw, places, nbytes, board, number), session
    )
