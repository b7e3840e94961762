"""Strided tensors of calls that pass through: contiguous copies travel, and what was written is copied back.

gloo takes a strided tensor for a contiguous one in some calls and writes to its neighbours (all_reduce, broadcast,
scatter, lists of reduce_scatter); in others it raises.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from compactdist import _torch

__all__ = ["contiguous", "copy_back"]


def contiguous(values: Any, copied: list[tuple[Tensor, Tensor]]) -> Any:
    """``values`` with a contiguous copy in place of every strided tensor.

    Args:
        values: a tensor, or a list of tensors or of such lists; anything else is returned as it is.
        copied: gets every strided tensor together with its copy.
    """
    if isinstance(values, list | tuple):
        return [contiguous(value, copied) for value in values]
    if not isinstance(values, Tensor) or values.layout is not torch.strided or values.is_contiguous():
        return values
    copy = values.detach().contiguous()
    copied.append((values, copy))
    return copy


def copy_back(copied: Sequence[tuple[Tensor, Tensor]]) -> Callable[[bool], None]:
    """What a job does once the copies are written; ``True``: it may write to the caller's tensors."""

    def finish(may_write: bool) -> None:
        if may_write:
            with _torch.without_autograd():
                for tensor, copy in copied:
                    tensor.copy_(copy)

    return finish
