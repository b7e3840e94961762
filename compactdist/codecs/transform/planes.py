"""Codes of components as planes of bits, eight rows to a byte."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import numpy as np
import torch
from torch import Tensor

from compactdist.codecs.transform.depths import DEEPEST, borders, levels

__all__ = ["classes", "codes_of", "levels_of", "pack", "unpack"]


def classes(depths: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Each depth that occurs, the deepest first, and the components that have it, ascending, int64 ``(n,)``."""
    for depth in range(DEEPEST, 0, -1):
        which = (depths == depth).nonzero().view(-1)
        if which.numel():
            yield depth, which


def codes_of(deviations: Tensor, depth: int) -> Tensor:
    """The code of each value, in standard deviations: how many borders are at most the value; uint8."""
    if depth == 1:
        return (deviations >= 0).to(torch.uint8)
    border = torch.tensor(borders(depth), device=deviations.device)
    return torch.bucketize(deviations, border, right=True, out_int32=True).to(torch.uint8)


@cache
def _table(depth: int, device: torch.device) -> Tensor:
    return torch.tensor(levels(depth), dtype=torch.float32, device=device)


def levels_of(codes: Tensor, depth: int) -> Tensor:
    """The level of each code, float32."""
    if depth == 1:
        return codes.float().mul_(254).sub_(127)
    return _table(depth, codes.device)[codes.int()]


def pack(codes: Tensor, depth: int) -> Tensor:
    """Codes uint8 ``(n, R)`` to uint8 ``(n * depth, ceil(R / 8))``: row r of plane j is bit ``r % 8``."""
    bits = torch.stack([(codes >> bit) & 1 for bit in range(depth)], 1) if depth > 1 else codes[:, None]
    return _packed(bits).reshape(codes.shape[0] * depth, -(-codes.shape[1] // 8))


def unpack(planes: Tensor, depth: int, rows: int) -> Tensor:
    """What :func:`pack` packed, uint8 ``(n, rows)``."""
    bits = _unpacked(planes.reshape(-1, depth, planes.shape[1]))[..., :rows]
    codes = bits[:, 0]
    for bit in range(1, depth):
        codes = codes | (bits[:, bit] << bit)
    return codes


def _packed(bits: Tensor) -> Tensor:
    """uint8 of 0 and 1, eight of the last dimension to a byte, the first lowest."""
    if bits.is_cpu:
        return torch.from_numpy(np.packbits(bits.numpy(), axis=-1, bitorder="little"))
    bits = torch.nn.functional.pad(bits, (0, -bits.shape[-1] % 8))
    eights = bits.view(*bits.shape[:-1], -1, 8)
    weights = torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8, device=bits.device)
    return (eights * weights).sum(-1, dtype=torch.uint8)


def _unpacked(planes: Tensor) -> Tensor:
    """What :func:`_packed` packed."""
    if planes.is_cpu:
        return torch.from_numpy(np.unpackbits(planes.numpy(), axis=-1, bitorder="little"))
    shifts = torch.arange(8, dtype=torch.uint8, device=planes.device)
    return ((planes[..., None] >> shifts) & 1).flatten(-2)
