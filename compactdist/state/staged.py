"""What is wanted of a frame, and the frame between its making and the moment when the receiver is taken to hold it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from compactdist.codecs.base import Session, Terms
from compactdist.kernels.spec import MatrixView
from compactdist.state.host_copy import HostCopy
from compactdist.state.rate import Measured
from compactdist.state.stream import Room
from compactdist.wire import Header

__all__ = ["Staged", "Wanted"]


class Wanted(NamedTuple):
    """What a sender wants of its next frame, besides the tensor, the codec and whether it is a keyframe.

    Attributes:
        step: of the call, since the last reset.
        epoch: resets of the group so far.
        frame_nbytes: agreed frame size, padded with zeros; ``None``: no padding.
        refuse_state: say in the frame that this end keeps no history for the site.
        value: fill ``Staged.value`` even where the stream keeps no history.
        shape: put this shape into the frame.
        row_weights: how much errors in each row matter, float ``(R,)`` or ``(G, R)``; for a codec that takes them.
        own_bytes: let a keyframe carry the tensor's own bytes, although the stream codes its keyframes.
        hint: matrix view that a layout hint gives the stream when it starts.
        may_surprise: where a residual would miss the target by far, the receiver takes a keyframe that no frame
            announced: one of any size or, with ``frame_nbytes``, a stand-in and then ``Staged.behind``.
        foreseen: as for ``StreamDecoder.decode``, of a keyframe that carries the tensor's own bytes.
        queue: ``kernels.queue_of`` the tensor's device, where the caller has asked.
        copy: contiguous, of the tensor's dtype and size, apart from it: what the receiver will reconstruct goes there,
            too, if ``Staged.copied``.
    """

    step: int = 0
    epoch: int = 0
    frame_nbytes: int | None = None
    refuse_state: bool = False
    value: bool = False
    shape: tuple[int, ...] | None = None
    row_weights: Tensor | None = None
    own_bytes: bool = False
    hint: MatrixView | None = None
    may_surprise: bool = False
    foreseen: bool = False
    queue: int | None = None
    copy: Tensor | None = None


@dataclass(slots=True)
class Staged:
    """A frame that has been made but not yet committed.

    Attributes:
        frame: 1-D uint8, header and payload, padded to the agreed size.
        header: header of the frame; in that of a residual, ``step``, ``epoch``, ``sequence``, ``checksum`` and
            ``digest`` mean nothing.
        checksum: of the payload.
        value: what the receiver will reconstruct, flat ``[numel]``, the sender's dtype; ``None`` if not needed.
        terms: terms of the receiver's prediction; empty for a keyframe.
        exact: the sender's own values, flat; kept by an open-loop sender only.
        hint: matrix view of the layout hint that the stream begins with, if this is its first frame.
        next_view: the matrix view announced for the next frame, or ``None``.
        searched: this frame's residual was searched for a matrix view.
        session: the codec's session that made the payload.
        on_device: made on a device, which alone knows checksum, digest and whether the residual was finite.
        measured: of a residual whose rates are chosen by that, or a device's copy of the sums; else ``None``.
        room: memory of the frame that another may use once this one has been sent; ``None``: it is this frame's own.
        copied: what the receiver will reconstruct was written to the sender's own output, too.
        lends: nobody needs ``value`` once it was copied into the history.
        spare: what ``value`` was copied from, which may be written to once the caller has it.
        goes_on: of a frame that a CUDA graph makes: bool ``[]`` on the device, the stream's clock has not ended.
        behind: the frame itself, where ``frame`` is a stand-in for it; else ``None``.
        surprises: a keyframe that nobody was told of.
    """

    frame: Tensor
    header: Header
    checksum: int
    value: Tensor | None = None
    terms: Terms = ()
    exact: Tensor | None = None
    hint: MatrixView | None = None
    next_view: MatrixView | None = None
    searched: bool = False
    session: Session | None = None
    on_device: bool = False
    measured: Measured | HostCopy | None = None
    room: Room | None = None
    copied: bool = False
    lends: bool = False
    spare: Tensor | None = None
    goes_on: Tensor | None = None
    behind: Tensor | None = None
    surprises: bool = False

    @property
    def wire_nbytes(self) -> int:
        """Bytes that travel: of the frame, and of what follows it."""
        return self.frame.numel() + (0 if self.behind is None else self.behind.numel())
