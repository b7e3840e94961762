"""A frame between its making and its commitment."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from compactdist.state.matrix_view import MatrixView
from compactdist.state.stream import Memory
from compactdist.wire import Header

__all__ = ["Staged"]


@dataclass(slots=True)
class Staged:
    """A frame that has been made but not yet committed.

    Attributes:
        frame: 1-D uint8, header and payload, padded to the agreed size.
        value: what the receiver will reconstruct, flat, the sender's dtype; ``None`` if not needed.
        header: the frame's header.
        exact: the sender's own values, flat; kept by an open-loop sender only.
        next_view: the matrix view announced for the next frame, or ``None``.
        searched: this frame's residual was searched for a matrix view.
        memory: what the codec will find at the next residual.
    """

    frame: Tensor
    value: Tensor | None
    header: Header
    exact: Tensor | None = None
    next_view: MatrixView | None = None
    searched: bool = False
    memory: Memory | None = None
