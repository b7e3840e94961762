"""Groups that make the same all-gathers in turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["in_turns"]


def in_turns(
    groups: Sequence[Any], inputs: Iterable[Tensor], out: Tensor, order: Callable[[int], Sequence[int]], warmup: int
) -> list[list[float]]:
    """Milliseconds of each all-gather on the slower rank, for each group those of the steps after the warm-up.

    Args:
        groups: closed afterwards.
        inputs: of this rank, one for each step; every group gathers it.
        out: what all ranks gave goes there.
        order: of the groups in a step, by their places; the same on all ranks.
        warmup: steps that are not timed.
    """
    times: list[list[float]] = [[] for _ in groups]
    for step, x in enumerate(inputs):
        for which in order(step):
            groups[which].step()
            dist.barrier()
            start = time.perf_counter()
            dist.all_gather_into_tensor(out, x, group=groups[which])
            if step >= warmup:
                times[which].append(1e3 * (time.perf_counter() - start))
    for group in groups:
        group.close()
    slower = torch.tensor(times)
    dist.all_reduce(slower, dist.ReduceOp.MAX)
    made: list[list[float]] = slower.tolist()
    return made
