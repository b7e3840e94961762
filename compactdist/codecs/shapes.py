"""The matrix view of a tensor of any shape, and the alignment of a payload's sections."""

from __future__ import annotations

import math
from collections.abc import Sequence

from compactdist.kernels.sections import BLOCK_ELEMENTS, SECTION_ALIGN_NBYTES, matrix_shape, padded_nbytes
from compactdist.kernels.spec import MatrixView

__all__ = ["BLOCK_ELEMENTS", "SECTION_ALIGN_NBYTES", "matrix_shape", "padded_nbytes", "whole_view"]


def whole_view(shape: Sequence[int], *, in_blocks: bool) -> MatrixView:
    """The matrix view of a contiguous tensor of this shape when there is no hint.

    Args:
        shape: of the tensor.
        in_blocks: scales belong to blocks, not to rows and channels; a tensor of at most one dimension is then a
            single row.
    """
    numel = math.prod(shape)
    return MatrixView(numel, *((1, 1, numel) if in_blocks and len(shape) <= 1 else matrix_shape(shape)))
