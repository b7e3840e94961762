"""How a tensor of any shape is seen as groups of matrices, and how sections are aligned."""

from __future__ import annotations

import math
from collections.abc import Sequence

from compactdist.kernels.sections import BLOCK_ELEMENTS, SECTION_ALIGN_NBYTES, matrix_shape, padded_nbytes
from compactdist.kernels.spec import MatrixView

__all__ = ["BLOCK_ELEMENTS", "SECTION_ALIGN_NBYTES", "matrix_shape", "padded_nbytes", "whole_view"]


def whole_view(shape: Sequence[int], *, in_blocks: bool) -> MatrixView:
    """The matrix view of a contiguous tensor of this shape when nobody says more about it.

    Args:
        shape: of the tensor.
        in_blocks: blocks, and no rows, have scales; then a tensor without channels is a single row.
    """
    numel = math.prod(shape)
    return MatrixView(numel, *((1, 1, numel) if in_blocks and len(shape) <= 1 else matrix_shape(shape)))
