"""Compressed calls settle over an inner group that returns no work for a synchronous call, as NCCL does."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch.distributed import distributed_c10d as c10d

import compactdist
from compactdist import _torch
from compactdist.exchange.work import Job, PendingWork, WaitOnce
from tests.group.kit import NUMEL, Counted, close, data, exchanged, gathered
from tests.launch import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:torch.*")

FORWARDED = (
    "allgather",
    "all_gather_single",
    "all_gather_single_coalesced",
    "alltoall",
    "all_to_all_single",
    "broadcast",
    "allreduce",
    "barrier",
    "send",
    "recv",
)


class NoneWhenSynchronous(dist.ProcessGroup):
    """A gloo group with NCCL's manners: it waits for a synchronous call itself and returns ``None``.

    Attributes:
        nones: how many calls it answered so.
    """

    group_name = "nones"
    group_desc = "nones"

    def __init__(self, plain: Any) -> None:
        super().__init__(plain.rank(), plain.size())
        self.plain = plain
        self.nones = 0
        _torch.adopt_backends(self, plain)
        _torch.register(self, plain, self.group_name)

    def answer(self, name: str, *args: Any) -> Any:
        work = getattr(self.plain, name)(*args)
        if getattr(args[-1], "asyncOp", True):
            return work
        work.wait()
        self.nones += 1
        return None


def _forwarding(name: str) -> Callable[..., Any]:
    return lambda self, *args: self.answer(name, *args)


for _name in FORWARDED:
    setattr(NoneWhenSynchronous, _name, _forwarding(_name))


def _lists(rank, size, g):
    out = [torch.empty(NUMEL) for _ in range(size)]
    dist.all_gather(out, data(rank), group=g)
    return torch.cat(out), gathered(size)


def _single(rank, size, g):
    out = torch.empty(size * NUMEL)
    dist.all_gather_into_tensor(out, data(rank), group=g)
    return out, gathered(size)


def _coalesced(rank, size, g):
    """Two that are compressed, and one between them that is too small."""
    numels = NUMEL, 8, 2 * NUMEL
    outs = [torch.empty(size * n) for n in numels]
    with c10d._coalescing_manager(g):
        for out, n in zip(outs, numels, strict=True):
            c10d.all_gather_single(out, data(rank, n), group=g)
    return torch.cat(outs), torch.cat([gathered(size, n) for n in numels])


def _coalesced_lists(rank, size, g):
    outs = [[torch.empty(NUMEL), torch.empty(8)] for _ in range(size)]
    dist.all_gather_coalesced(outs, [data(rank), data(rank, 8)], group=g)
    flat = torch.cat([t for per_rank in outs for t in per_rank])
    return flat, torch.cat([t for peer in range(size) for t in (data(peer), data(peer, 8))])


def _chunks(rank, size, g):
    out = [torch.empty(NUMEL // size) for _ in range(size)]
    dist.all_to_all(out, list(data(rank).chunk(size)), group=g)
    return torch.cat(out), exchanged(rank, size)


def _exchange(rank, size, g):
    out = torch.empty(NUMEL)
    dist.all_to_all_single(out, data(rank), group=g)
    return out, exchanged(rank, size)


def _broadcast(rank, size, g):
    x = data(1) if rank == 1 else torch.empty(NUMEL)
    dist.broadcast(x, 1, group=g)
    return x, data(1)


CALLS = {
    "all_gather": (_lists, 1),
    "all_gather_single": (_single, 1),
    "all_gather_single_coalesced": (_coalesced, 2),
    "all_gather_coalesced": (_coalesced_lists, 1),
    "all_to_all": (_chunks, 1),
    "all_to_all_single": (_exchange, 1),
    "broadcast": (_broadcast, 1),
}


@pytest.mark.parametrize("name", CALLS)
def test_synchronous_calls(name):
    call, compressed = CALLS[name]

    def body(rank, size):
        inner = NoneWhenSynchronous(dist.group.WORLD)
        g = compactdist.wrap(inner, "int8", min_numel=64)
        for _ in range(3):
            before = inner.nones
            with g.step(), Counted(g) as counted:
                got, expected = call(rank, size, g)
            assert close(got, expected)
            assert counted.compressed == compressed
            assert inner.nones > before
        g.close()

    run_ranks(body, 2, timeout=40)


def test_what_else_a_group_is_asked_for():
    """Asynchronous and functional calls, sends, and calls that pass through, between synchronous ones."""

    def body(rank, size):
        inner = NoneWhenSynchronous(dist.group.WORLD)
        g = compactdist.wrap(inner, "int8", min_numel=64)
        for _ in range(3):
            g.step()
            assert close(*_single(rank, size, g))
            out, received = torch.empty(size * NUMEL), torch.empty(NUMEL)
            work = dist.all_gather_into_tensor(out, data(rank), group=g, async_op=True)
            y = funcol.all_gather_tensor(data(rank), 0, g) + 0
            assert close(y, gathered(size))
            work.wait()
            assert work.is_completed()
            assert close(out, gathered(size))
            receive = dist.irecv(received, 1 - rank, group=g)
            dist.send(data(rank), 1 - rank, group=g)
            receive.wait()
            assert close(received, data(1 - rank))
            dist.all_reduce(total := torch.ones(1), group=g)
            assert total == size
            dist.barrier(group=g)
        g.close()

    run_ranks(body, 2, timeout=40)


def test_works_without_an_inner_one():
    ended: list[bool] = []
    job = Job(None, ended.append, None)
    work = PendingWork([job, None], [], lambda: pytest.fail("no future is asked for"))
    assert job.is_ready()
    assert work.wait(timedelta(seconds=1))
    assert ended == [True]
    assert work.is_success()
    together = WaitOnce([None, None])
    job.replace_inner(None)
    assert together.is_completed()
    assert together.wait()
    assert job.is_ready()
    with pytest.raises(RuntimeError, match="named rank"):
        PendingWork([None], [], lambda: pytest.fail("no future is asked for")).source_rank()
