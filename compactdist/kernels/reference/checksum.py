"""The checksum of bytes: their 32-bit words, each times an odd number that depends on its position, modulo 2**64."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from compactdist.kernels.spec import CHECKSUM_WEIGHT

__all__ = ["weighted_sum"]

_MASK32, _MASK64 = (1 << 32) - 1, (1 << 64) - 1


@lru_cache(maxsize=16)
def _weights(count: int, device: torch.device) -> Tensor:
    return (2 * torch.arange(count, dtype=torch.int64, device=device) + 1) * CHECKSUM_WEIGHT & _MASK32


def weighted_sum(data: Tensor, copy: Tensor | None = None) -> int:
    """The sum of ``word[n] * ((2 * n + 1) * CHECKSUM_WEIGHT % 2**32)`` modulo 2**64.

    Args:
        data: 1-D uint8, little-endian words; the last one is filled up with zeros.
        copy: as many bytes, where ``data`` is copied to on the way.
    """
    if copy is not None:
        data = copy.copy_(data)
    if data.numel() % 4:
        data = pad(data, (0, -data.numel() % 4))
    if data.storage_offset() % 4 or data.stride(0) != 1:
        data = data.clone(memory_format=torch.contiguous_format)
    words = data.view(torch.int32).to(torch.int64) & _MASK32
    return int((words * _weights(words.numel(), words.device)).sum()) & _MASK64  # int64 wraps as uint64 does
