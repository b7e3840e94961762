"""Small helpers of the life-cycle tests; all run on a rank."""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.distributed

import compactdist
from tests.lockstep import compare

N = 2048


def wrap(**options: Any) -> Any:
    return compactdist.wrap(**{"codec": "int4", "agree_timeout": 20.0, **options})


def wrap_short(short: bool, nbytes: int, **options: Any) -> Any:
    """Wrap; a rank that is ``short`` has no more than so many bytes for histories, which the other ranks cannot know.

    So it is with a rank whose budget is used up by point-to-point messages or uneven exchanges.
    """
    dist = wrap(**options)
    if short:
        dist._engine.store.budget_bytes = nbytes
    return dist


def tensor(rank: int, t: int = 0, n: int = N, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Slowly changing, different on every rank."""
    base = torch.randn(n, generator=torch.Generator().manual_seed(rank))
    return (base + 0.01 * t * torch.randn(n, generator=torch.Generator().manual_seed(100 + t))).to(dtype)


def gather(dist: Any, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    out = torch.empty(dist.size() * x.numel(), dtype=x.dtype)
    dist.all_gather_into_tensor(out, x, **kwargs)
    return out


def hop(dist: Any, x: torch.Tensor) -> torch.Tensor:
    """One hop of a ring: what the rank before this one sends, while this one sends ``x`` to the next."""
    rank, world, y = dist.rank(), dist.size(), torch.empty_like(x)
    sends = dist.P2POp(dist.isend, x, (rank + 1) % world)
    receives = dist.P2POp(dist.irecv, y, (rank - 1) % world)
    for work in dist.batch_isend_irecv([sends, receives]):
        work.wait()
    return y


def gather_exact(x: torch.Tensor) -> torch.Tensor:
    out = torch.empty(torch.distributed.get_world_size() * x.numel(), dtype=x.dtype)
    torch.distributed.all_gather_into_tensor(out, x)
    return out


def keys_of(dist: Any) -> list[str]:
    return [site.key for site in dist._engine.store.sites()]


def keyframes(dist: Any) -> dict[str, tuple[int, int]]:
    """Per site: calls and keyframes."""
    return {key: (site.calls, site.keyframes) for key, site in dist.stats().sites.items()}


def nmse(y: torch.Tensor, x: torch.Tensor) -> float:
    return float((y.double() - x.double()).square().sum() / x.double().square().sum())


def warnings_from_now_on() -> list[str]:
    """A list that grows by the text of every warning of ours."""
    texts: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: texts.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("compactdist").addHandler(handler)
    return texts


def finish(dist: Any) -> dict[str, Any]:
    """What this rank holds, once all ranks are through; return it from a test's body for `compare.check`."""
    held = compare.of_group(dist)
    torch.distributed.barrier()
    return held
