"""CompactFusion's encoders as pure functions, for comparison (arXiv 2507.17511 and its public code).

Written from their description; no code of theirs is used. Each takes a residual, float32 ``(N, C)``, and returns what
its decoder would reconstruct and the bits it would send, without any header: theirs has none. Scales, factors and
offsets are rounded to float16, as sent. Only ``int4`` has no wire format there ("simulated"); its bits are those of its
codes, scales and minima.
"""

from __future__ import annotations

import torch
from torch import Tensor

ITERATIONS = 2


def _half(x: Tensor) -> Tensor:
    return x.half().float()


def mean_scales(r: Tensor) -> tuple[Tensor, Tensor]:
    """The mean magnitude of each row relative to that of all, ``(N,)``, and of each column, ``(C,)``, as sent."""
    column, row = r.abs().mean(0), r.abs().mean(1)
    return (row / (row.mean() + 1e-6)).half(), column.half()


def _scale_of_each(r: Tensor) -> Tensor:
    row, column = mean_scales(r)
    return row.float()[:, None] * column.float()


def binary(r: Tensor) -> tuple[Tensor, int]:
    """Sign bits; mean scales (rank -1)."""
    scale = _scale_of_each(r)
    return torch.where(r >= 0, scale, -scale), r.numel() + 16 * sum(r.shape)


def int2(r: Tensor) -> tuple[Tensor, int]:
    """Sign, and whether the magnitude is above the scale S; magnitudes 0.5 S and 2 S."""
    scale = _scale_of_each(r)
    size = torch.where(r.abs() > scale, 2 * scale, 0.5 * scale)
    return torch.where(r < 0, -size, size), 2 * r.numel() + 16 * sum(r.shape)


def min_max_codes(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Four bits between the smallest and the largest value of each column: codes ``(N, C)``, scales, minima."""
    low, high = torch.aminmax(x, dim=0)
    scale = (high - low) / (15 + 1e-6)
    return ((x - low) / scale).round().clamp(0, 15).to(torch.uint8), scale.half(), low.half()


def _from_codes(codes: Tensor, scale: Tensor, low: Tensor) -> Tensor:
    return codes.float() * scale.float() + low.float()


def int4(r: Tensor) -> tuple[Tensor, int]:
    """Four bits between the ends of each column."""
    return _from_codes(*min_max_codes(r)), 4 * r.numel() + 32 * r.shape[1]


def factors(r: Tensor, rank: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """``U (N, rank)`` and ``V (rank, C)`` by two subspace iterations from random directions: 6 products, 4 QRs.

    Args:
        r: ``(N, C)``, float32.
        rank: components.
        generator: of the directions, on the device of ``r``; ``None``: the global one, as theirs.
    """
    q = torch.linalg.qr(torch.randn(r.shape[1], rank, generator=generator, device=r.device))[0]
    for _ in range(ITERATIONS):
        q = torch.linalg.qr(r.T @ (r @ q))[0]
    u = torch.linalg.qr(r @ q)[0]
    return u, u.T @ r


def lowrank(r: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, int]:
    """Factors in float16."""
    rank = min(rank, *r.shape)
    u, v = factors(r, rank, generator)
    return _half(u) @ _half(v), 16 * rank * sum(r.shape)


def encode_lowrank_int4(r: Tensor, rank: int, generator: torch.Generator) -> tuple[tuple[Tensor, Tensor, Tensor], ...]:
    """What is timed: both factors, coded by component."""
    u, v = factors(r, min(rank, *r.shape), generator)
    return min_max_codes(u), min_max_codes(v.T)


def lowrank_int4(r: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, int]:
    """Factors in four bits between the ends of each component."""
    u, v = encode_lowrank_int4(r, rank, generator)
    rank = u[0].shape[1]
    return _from_codes(*u) @ _from_codes(*v).T, 4 * rank * sum(r.shape) + 64 * rank
