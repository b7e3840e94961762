"""How a tensor of any shape is seen as groups of matrices, and how sections are aligned."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor
from torch.nn.functional import pad

SECTION_ALIGN_NBYTES = 16
"""Every payload section starts at a multiple of this, so kernels may load 128 bits at a time."""

BLOCK_ELEMENTS = 128
"""Row length given to a flat tensor, which has no channels of its own."""


def padded_nbytes(nbytes: int) -> int:
    """Round a size up to the section alignment."""
    return -(-nbytes // SECTION_ALIGN_NBYTES) * SECTION_ALIGN_NBYTES


def matrix_shape(shape: Sequence[int]) -> tuple[int, int, int]:
    """Return ``(groups, rows, channels)`` for a tensor of the given shape.

    ========================= ==========================================================================
    shape                     view
    ========================= ==========================================================================
    ``()``, ``(n,)``          one row if n <= 128, else rows of 128 (the caller pads the tail with zeros)
    ``(N, C)``                ``(1, N, C)``
    ``(G, N, C)``             ``(G, N, C)``: each group has scales of its own
    ``(B, S, ..., H, D)``     ``(1, B * S * ..., H * D)``: tokens by channels of all heads
    ========================= ==========================================================================

    Example:
        >>> matrix_shape((2, 1088, 24, 128))
        (1, 2176, 3072)
        >>> matrix_shape((300,))
        (1, 3, 128)
    """
    if len(shape) <= 1:
        elements = math.prod(shape)
        if elements <= BLOCK_ELEMENTS:
            return 1, 1, elements
        return 1, -(-elements // BLOCK_ELEMENTS), BLOCK_ELEMENTS
    if len(shape) == 2:
        return 1, shape[0], shape[1]
    if len(shape) == 3:
        return shape[0], shape[1], shape[2]
    return 1, math.prod(shape[:-2]), shape[-2] * shape[-1]


class WholeTensor(NamedTuple):
    """A contiguous tensor as a codec sees it when nobody says more about it: a ``Cut`` (``base.py``)."""

    numel: int
    shape: tuple[int, int, int]
    axes: None = None
    order: tuple[int, ...] = ()

    @classmethod
    def of(cls, shape: Sequence[int], *, in_blocks: bool) -> WholeTensor:
        """Of a tensor of this shape; one without channels is a single row if blocks, and no rows, have scales."""
        numel = math.prod(shape)
        return cls(numel, (1, 1, numel) if in_blocks and len(shape) <= 1 else matrix_shape(shape))

    def to_matrix(self, flat: Tensor) -> Tensor:
        """Flat ``[numel]`` to ``(G, R, C)``, the tail filled up with zeros."""
        missing = math.prod(self.shape) - self.numel
        return (pad(flat, (0, missing)) if missing else flat).view(self.shape)

    def to_flat(self, matrix: Tensor) -> Tensor:
        """Undo ``to_matrix``."""
        return matrix.reshape(-1)[: self.numel]
