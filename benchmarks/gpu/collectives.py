"""Every collective of a wrapped group as a call whose right result all ranks know, for ``benchmarks.gpu.check``.

A call is ``call(run)``: it makes the collective once on ``run.group`` and returns what arrived and what should have.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor
from torch.distributed import distributed_c10d as c10d
from torch.distributed.device_mesh import DeviceMesh


@dataclass
class Run:
    """What a call needs.

    Attributes:
        group: the wrapped group, or the plain one.
        rank: this rank, of two.
        device: of all tensors.
        step: of the denoising loop; tensors change little from one to the next.
        numel: elements of a tensor; an exchange sends halves and quarters of one.
        mesh: over the group, from the first call that needs one.
    """

    group: Any
    rank: int
    device: torch.device
    step: int = 0
    numel: int = 64 * 96
    mesh: DeviceMesh | None = None

    @property
    def peer(self) -> int:
        """The other rank."""
        return 1 - self.rank

    def x(self, rank: int, numel: int | None = None, seed: int = 0) -> Tensor:
        """The tensor that a rank sends in this step, [numel] bfloat16; every rank can make it."""
        numel, which = numel or self.numel, 1000 * seed + rank
        base = torch.randn(numel, generator=torch.Generator().manual_seed(which))
        change = torch.randn(numel, generator=torch.Generator().manual_seed(which + 10 * (self.step + 1)))
        return (base * (1 + 0.02 * self.step) + 0.05 * change).bfloat16().to(self.device)

    def mine(self, numel: int | None = None, seed: int = 0) -> Tensor:
        """What this rank sends."""
        return self.x(self.rank, numel, seed)

    def all(self, numel: int | None = None, seed: int = 0) -> Tensor:
        """What all ranks send, in their order."""
        return torch.cat([self.x(rank, numel, seed) for rank in range(2)])

    def nothing(self, numel: int | None = None) -> Tensor:
        """An output that holds NaN."""
        return torch.full((numel or self.numel,), torch.nan, dtype=torch.bfloat16, device=self.device)


Result = tuple[Tensor, Tensor]
CALLS: dict[str, tuple[Callable[[Run], Result], int]] = {}
"""By name: the call, and how many frames a rank sends in it."""


def call(name: str, frames: int = 1) -> Callable[[Callable[[Run], Result]], Callable[[Run], Result]]:
    """Enter a call into the table."""

    def enter(made: Callable[[Run], Result]) -> Callable[[Run], Result]:
        CALLS[name] = made, frames
        return made

    return enter


def _wait(work: Any) -> None:
    if work is not None:
        work.wait()


def _both_ways(name: str, frames: int = 1) -> Callable[[Callable[[Run, bool], Result]], None]:
    """Enter a call twice: synchronous and asynchronous."""

    def enter(made: Callable[[Run, bool], Result]) -> None:
        call(name, frames)(lambda run: made(run, False))
        call(f"{name}, async", frames)(lambda run: made(run, True))

    return enter


@_both_ways("all_gather_into_tensor")
def _gather(run: Run, async_op: bool) -> Result:
    out = run.nothing(2 * run.numel)
    _wait(dist.all_gather_into_tensor(out, run.mine(), group=run.group, async_op=async_op))
    return out, run.all()


@_both_ways("all_gather (list)")
def _gather_list(run: Run, async_op: bool) -> Result:
    outs = [run.nothing(), run.nothing()]
    _wait(dist.all_gather(outs, run.mine(), group=run.group, async_op=async_op))
    return torch.cat(outs), run.all()


@_both_ways("all_to_all_single")
def _exchange(run: Run, async_op: bool) -> Result:
    out = run.nothing()
    _wait(dist.all_to_all_single(out, run.mine(), group=run.group, async_op=async_op))
    return out, torch.cat([run.x(rank).chunk(2)[run.rank] for rank in range(2)])


@_both_ways("all_to_all_single, uneven")
def _exchange_unevenly(run: Run, async_op: bool) -> Result:
    """Rank r sends a quarter of its tensor to rank r and the rest to the other."""
    quarter = run.numel // 4
    splits = [quarter, 3 * quarter] if run.rank == 0 else [3 * quarter, quarter]
    out = run.nothing()
    _wait(dist.all_to_all_single(out, run.mine(), splits, splits, group=run.group, async_op=async_op))
    first, second = run.x(0).split([quarter, 3 * quarter]), run.x(1).split([3 * quarter, quarter])
    return out, torch.cat([first[run.rank], second[run.rank]])


@_both_ways("all_to_all (list)")
def _exchange_list(run: Run, async_op: bool) -> Result:
    outs = [run.nothing(run.numel // 2), run.nothing(run.numel // 2)]
    _wait(dist.all_to_all(outs, list(run.mine().chunk(2)), group=run.group, async_op=async_op))
    return torch.cat(outs), torch.cat([run.x(rank).chunk(2)[run.rank] for rank in range(2)])


@_both_ways("broadcast")
def _broadcast(run: Run, async_op: bool) -> Result:
    x = run.x(1) if run.rank == 1 else run.nothing()
    _wait(dist.broadcast(x, group=run.group, group_src=1, async_op=async_op))
    return x, run.x(1)


@call("send, recv")
def _send(run: Run) -> Result:
    out = run.nothing()
    if run.rank == 0:
        dist.send(run.mine(), group=run.group, group_dst=1)
        dist.recv(out, group=run.group, group_src=1)
    else:
        dist.recv(out, group=run.group, group_src=0)
        dist.send(run.mine(), group=run.group, group_dst=0)
    return out, run.x(run.peer)


@call("batch_isend_irecv", frames=2)
def _batch(run: Run) -> Result:
    outs = [run.nothing(), run.nothing()]
    sends = [dist.P2POp(dist.isend, run.mine(seed=i), group=run.group, group_peer=run.peer) for i in range(2)]
    receives = [dist.P2POp(dist.irecv, out, group=run.group, group_peer=run.peer) for out in outs]
    for work in dist.batch_isend_irecv([*sends, *receives]):
        work.wait()
    return torch.cat(outs), torch.cat([run.x(run.peer, seed=i) for i in range(2)])


def _coalesced(run: Run, device: torch.device | None, async_ops: bool) -> Result:
    outs = [run.nothing(2 * run.numel), run.nothing(2 * run.numel)]
    with c10d._coalescing_manager(run.group, device, async_ops=async_ops) as manager:
        for seed, out in enumerate(outs):
            dist.all_gather_into_tensor(out, run.mine(seed=seed), group=run.group)
    if async_ops:
        manager.wait()
    return torch.cat(outs), torch.cat([run.all(seed=seed) for seed in range(2)])


@_both_ways("coalescing manager", frames=2)
def _coalescing(run: Run, async_op: bool) -> Result:
    return _coalesced(run, None, async_op)


@_both_ways("coalescing manager, device=", frames=2)
def _coalescing_with_a_device(run: Run, async_op: bool) -> Result:
    return _coalesced(run, run.device, async_op)


@call("functional all_gather_tensor")
def _functional_gather(run: Run) -> Result:
    return funcol.all_gather_tensor(run.mine(), 0, run.group) + 0, run.all()


@call("functional all_gather, coalesced", frames=2)
def _functional_coalesced(run: Run) -> Result:
    pair: Sequence[Tensor] = funcol.all_gather_into_tensor_coalesced([run.mine(), run.mine(seed=1)], run.group)
    return torch.cat([y + 0 for y in pair]), torch.cat([run.all(), run.all(seed=1)])


@call("functional all_to_all_single")
def _functional_exchange(run: Run) -> Result:
    out = funcol.all_to_all_single(run.mine(), None, None, run.group) + 0
    return out, torch.cat([run.x(rank).chunk(2)[run.rank] for rank in range(2)])


@call("functional all_gather over a DeviceMesh")
def _mesh(run: Run) -> Result:
    run.mesh = run.mesh or DeviceMesh.from_group(run.group, run.device.type)
    return funcol.all_gather_tensor(run.mine(), 0, (run.mesh, 0)) + 0, run.all()


@call("all_reduce, passed through", frames=0)
def _reduce(run: Run) -> Result:
    x = run.mine().float()
    dist.all_reduce(x, group=run.group)
    return x, run.x(0).float() + run.x(1).float()


@call("all_gather_object", frames=0)
def _objects(run: Run) -> Result:
    out: list[Any] = [None, None]
    dist.all_gather_object(out, run.rank, group=run.group)
    return torch.tensor(out), torch.tensor([0, 1])
