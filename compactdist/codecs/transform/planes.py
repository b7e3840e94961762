"""Codes of components as planes of bits, eight rows to a byte."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from compactdist.codecs.transform.depths import DEEPEST, levels

__all__ = ["classes", "codes_of", "level_table", "pack", "unpack"]


def classes(depths: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Each depth that occurs, the deepest first, and the components that have it, ascending, int64 ``(n,)``."""
    for depth in range(DEEPEST, 0, -1):
        which = (depths == depth).nonzero().view(-1)
        if which.numel():
            yield depth, which


def level_table(depth: int, device: torch.device) -> Tensor:
    """float32 ``(2**depth,)``: the level of each code."""
    return torch.tensor(levels(depth), dtype=torch.float32, device=device)


def pack(codes: Tensor, depth: int) -> Tensor:
    """Codes uint8 ``(R, n)`` to uint8 ``(ceil(R / 8), n * depth)``: bit j of row r is bit ``r % 8`` of plane j."""
    rows, count = codes.shape
    missing = -rows % 8
    if missing:
        codes = torch.cat([codes, codes.new_zeros(missing, count)])
    octets = codes.view(-1, 8, count)
    planes = [_gathered((octets >> bit) & 1) for bit in range(depth)]
    return torch.stack(planes, 2).reshape(octets.shape[0], count * depth)


def _gathered(bits: Tensor) -> Tensor:
    byte = bits[:, 0].clone()
    for row in range(1, 8):
        byte |= bits[:, row] << row
    return byte


@cache
def _bits_of_bytes(device: torch.device) -> Tensor:
    """uint8 ``(256, 8)``: the bits of each byte, the lowest first."""
    shifts = torch.arange(8, dtype=torch.uint8, device=device)
    return (torch.arange(256, device=device).to(torch.uint8)[:, None] >> shifts) & 1


def unpack(planes: Tensor, depth: int, rows: int) -> Tensor:
    """What :func:`pack` packed, uint8 ``(rows, n)``."""
    octets = planes.shape[0]
    by_bit = planes.reshape(octets, -1, depth).permute(2, 0, 1).int()
    bits = _bits_of_bytes(planes.device)
    codes = bits[by_bit[0]]
    for bit in range(1, depth):
        codes |= bits[by_bit[bit]] << bit
    return codes.transpose(1, 2).reshape(octets * 8, -1)[:rows]


def codes_of(values: Tensor, border: Tensor) -> Tensor:
    """The code of each value: how many borders are at most the value; uint8."""
    return torch.bucketize(values, border, right=True, out_int32=True).to(torch.uint8)
