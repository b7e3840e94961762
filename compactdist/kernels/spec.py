"""What a kernel is told: how a flat buffer is a matrix. Imports nothing of codecs."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import pad

__all__ = ["MatrixView"]


@dataclass(frozen=True, slots=True)
class MatrixView:
    """A concrete way to see a flat buffer as a (groups, rows, channels) matrix.

    Attributes:
        numel: elements of the flat buffer.
        groups, rows, channels: the matrix; ``groups * rows * channels >= numel``, the tail is zero padding.
        axes: sizes of the flat buffer's own axes, when they must be permuted; else ``None``.
        order: the permutation of ``axes`` that brings group axes first, then row axes, then channel axes.
        hint: crc32 of the hint this came from; 0 without a hint.
    """

    numel: int
    groups: int
    rows: int
    channels: int
    axes: tuple[int, ...] | None = None
    order: tuple[int, ...] = ()
    hint: int = 0

    @property
    def shape(self) -> tuple[int, int, int]:
        """(groups, rows, channels)."""
        return self.groups, self.rows, self.channels

    def to_matrix(self, flat: Tensor) -> Tensor:
        """View or copy a flat ``[numel]`` tensor as ``(groups, rows, channels)``."""
        if self.axes is not None:
            return flat.view(self.axes).permute(self.order).reshape(self.shape)
        missing = self.groups * self.rows * self.channels - self.numel
        return (pad(flat, (0, missing)) if missing else flat).view(self.shape)

    def to_flat(self, matrix: Tensor) -> Tensor:
        """Undo :meth:`to_matrix`: ``(groups, rows, channels)`` to a flat, contiguous ``[numel]``."""
        if self.axes is not None:
            permuted = matrix.reshape([self.axes[i] for i in self.order])
            inverse = [self.order.index(i) for i in range(len(self.order))]
            return permuted.permute(inverse).reshape(-1)
        return matrix.reshape(-1)[: self.numel]
