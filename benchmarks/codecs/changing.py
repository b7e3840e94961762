"""Tensors that change from step to step, for benchmarks of streams."""

from __future__ import annotations

import torch
from torch import Tensor


def tensors(rows: int, channels: int, count: int, steady: float = 0.0) -> list[Tensor]:
    """Flat bfloat16 tensors that change from one to the next, with a spectrum that falls as activations' do.

    Args:
        rows, channels: of each.
        count: how many.
        steady: how much of a change the next change repeats, 0 to 1.
    """
    g = torch.Generator().manual_seed(0)
    mixed = torch.randn(channels, channels, generator=g) / channels**0.5
    mixed *= torch.arange(1, channels + 1).pow(-0.6)[:, None]
    x, change, out = torch.randn(rows, channels, generator=g) @ mixed, None, []
    for _ in range(count):
        out.append(x.bfloat16().view(-1))
        new = 0.2 * torch.randn(rows, channels, generator=g) @ mixed
        change = new if change is None else steady * change + (1 - steady**2) ** 0.5 * new
        x = x + change
    return out
