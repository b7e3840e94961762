"""How a tensor of any shape is seen as groups of matrices, and how sections are aligned."""

from __future__ import annotations

import math
from collections.abc import Sequence

from compactdist.kernels.spec import MatrixView

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


def whole_view(shape: Sequence[int], *, in_blocks: bool) -> MatrixView:
    """The matrix view of a contiguous tensor of this shape when nobody says more about it.

    Args:
        shape: of the tensor.
        in_blocks: blocks, and no rows, have scales; then a tensor without channels is a single row.
    """
    numel = math.prod(shape)
    return MatrixView(numel, *((1, 1, numel) if in_blocks and len(shape) <= 1 else matrix_shape(shape)))
