"""Plain ring code, as frameworks write it, and what the tests of forwarding ask about it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import compactdist

N = 4096
Touch = Callable[[int, int, Tensor], Any]


def chunk(rank: int, step: int, numel: int = N, dtype: torch.dtype = torch.float32) -> Tensor:
    """What a rank owns at a step: changing slowly, 32 channels of unequal energy."""

    def noise(seed: int) -> Tensor:
        return torch.randn(numel // 32, 32, generator=torch.Generator().manual_seed(seed))

    energies = 0.1 + torch.arange(32) ** 2 / 100
    return ((noise(rank) + 0.05 * noise(1000 * step + rank + 10)) * energies).flatten().to(dtype)


def hop(g: Any, tensors: list[Tensor]) -> list[Tensor]:
    """Send to the next rank, receive from the previous one, as yunchang's RingComm does."""
    rank, size = g.rank(), g.size()
    received = [torch.empty_like(x) for x in tensors]
    ops = []
    for x, y in zip(tensors, received, strict=True):
        ops.append(dist.P2POp(dist.isend, x, group=g, group_peer=(rank + 1) % size))
        ops.append(dist.P2POp(dist.irecv, y, group=g, group_peer=(rank - 1) % size))
    for work in dist.batch_isend_irecv(ops):
        work.wait()
    return received


def ring(
    g: Any, own: list[Tensor], touch: Callable[[int, list[Tensor]], Any] = lambda h, t: None
) -> list[list[Tensor]]:
    """All hops of one step: ``[hop][i]``, copies; ``touch(hop, tensors)`` may write before they go on."""
    held, seen = own, []
    for h in range(g.size() - 1):
        held = hop(g, held)
        seen.append([x.clone() for x in held])
        touch(h, held)
    return seen


def site(g: Any, hop: int, prefix: str = "", each: int = 1, i: int = 0) -> str:
    """Name of the site a rank sends at in a hop, when every hop sends ``each`` tensors."""
    rank = g.rank()
    name = f"send/{rank}>{(rank + 1) % g.size()}/t0#{each * hop + i}"
    return f"{prefix}/{name}" if prefix else name


def counts(g: Any, hop: int) -> tuple[int, int, int]:
    """(calls, keyframes, forwarded) at the site of a hop."""
    record = g.stats().sites[site(g, hop)]
    return record.calls, record.keyframes, record.forwarded


def wrap(**options: Any) -> Any:
    return compactdist.wrap(**{"codec": "int4", "min_numel": 1} | options)


def relative(x: Tensor, true: Tensor) -> float:
    return float((x.double() - true.double()).norm() / true.double().norm())
