"""Plain calls on the inner group while a compressed one waits for its agreement: gloo needs one order on all ranks."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as plain

import compactdist
from compactdist import _torch
from tests.group.lifecycle import kit
from tests.launch import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")


def begin(op, dist, rank, step, world):
    """An asynchronous compressed call: its work, what it writes, and what that should hold."""
    x, everyones = kit.tensor(rank, step), torch.cat([kit.tensor(peer, step) for peer in range(world)])
    if op == "gather":
        out = torch.empty(world * kit.N)
        return dist.all_gather_into_tensor(out, x, async_op=True), out, everyones
    if op == "broadcast":
        out = x if rank == 0 else torch.empty(kit.N)
        return dist.broadcast(out, src=0, async_op=True), out, kit.tensor(0, step)
    if op == "all_to_all":
        out, chunks = torch.empty(world * kit.N), [kit.tensor(rank, step) for _ in range(world)]
        return dist.all_to_all_single(out, torch.cat(chunks), async_op=True), out, everyones
    outs, wholes = [torch.empty(kit.N) for _ in range(world)], [kit.tensor(peer, step) for peer in range(world)]
    return dist.all_gather(outs, x, async_op=True), outs, wholes


def plainly(op, group, rank, world, n):
    """A plain call, and whether it did what it should."""
    mine = torch.full((n,), float(rank + 1))
    if op == "gather":
        out = torch.empty(world * n)
        plain.all_gather_into_tensor(out, mine, group=group)
        return torch.equal(out, torch.arange(1.0, world + 1).repeat_interleave(n))
    if op == "sum":
        plain.all_reduce(mine, group=group)
        return torch.equal(mine, torch.full((n,), world * (world + 1) / 2))
    if op == "broadcast":
        plain.broadcast(mine, src=0, group=group)
        return torch.equal(mine, torch.ones(n))
    plain.barrier(group=group)
    return True


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("compressed", ["gather", "broadcast", "all_to_all", "list"])
def test_a_plain_call_is_not_overtaken(compressed, world):
    """The first step is agreed on, and the last rank comes late to it. The plain tensors are of a frame's size, too."""

    def body(rank, world):
        frame_nbytes = torch.Size([1092])
        for in_between in ("gather", "sum", "broadcast", "barrier"):
            with kit.wrap(codec="int8") as dist, kit.wrap(codec="int4") as other:
                for step in range(2):
                    dist.step()
                    other.step()
                    if rank == world - 1:
                        time.sleep(0.2)
                    work, out, expected = begin(compressed, dist, rank, step, world)
                    for n in (100, kit.N, *frame_nbytes):
                        assert plainly(in_between, dist.inner, rank, world, n), (in_between, n)
                    gathered = torch.empty(world * kit.N)
                    other.all_gather_into_tensor(gathered, kit.tensor(rank, step))
                    work.wait()
                    assert kit.nmse(gathered[: kit.N], kit.tensor(0, step)) < 1e-2
                    pairs = zip(out, expected, strict=True) if compressed == "list" else [(out, expected)]
                    assert all(kit.nmse(got, wanted) < 1e-3 for got, wanted in pairs)
                assert dist.stats().compressed_calls == 2
                dist.check()

    run_ranks(body, world_size=world, timeout=60)


def test_ranks_may_differ_in_what_is_asynchronous():
    """One rank waits where another does not, as they may on a plain group."""

    def body(rank, world):
        with kit.wrap(codec="int8") as dist:
            for step in range(3):
                dist.step()
                out = torch.empty(world * kit.N)
                work = dist.all_gather_into_tensor(out, kit.tensor(rank, step), async_op=rank == 0)
                assert plainly("sum", dist.inner, rank, world, kit.N)
                second = torch.empty(world * kit.N)
                dist.all_gather_into_tensor(second, kit.tensor(rank, step))
                if rank == 0:
                    work.wait()
                for got in (out, second):
                    assert kit.nmse(got[: kit.N], kit.tensor(0, step)) < 1e-3
            dist.check()

    run_ranks(body)


def test_a_group_that_gloo_does_not_carry_waits_where_a_call_is_issued(monkeypatch):
    """Its frames travel on the inner group itself, so that their order must be the program's."""
    monkeypatch.setattr(_torch, "gloo_of", lambda group: None)

    def body(rank, world):
        with kit.wrap(codec="int8") as dist:
            for step in range(2):
                dist.step()
                if rank == 1:
                    time.sleep(0.2)
                work, out, expected = begin("gather", dist, rank, step, world)
                assert not dist._departures.busy
                assert plainly("gather", dist.inner, rank, world, 1092)
                work.wait()
                assert kit.nmse(out, expected) < 1e-3
            assert not dist._engine.link.separated

    run_ranks(body)


def test_a_group_that_cannot_be_connected_says_so(monkeypatch):
    def fail(gloo, store):
        raise RuntimeError("no route to host")

    def body(rank, world):
        with kit.wrap(codec="int8") as dist:
            with monkeypatch.context() as patch:
                patch.setattr(_torch, "second_gloo", fail)
                dist.step()
                for _ in range(2):
                    with pytest.raises(compactdist.errors.CompactDistError, match=r"no route to host.*reset\(\)"):
                        kit.gather(dist, kit.tensor(rank))
            dist.reset()
            dist.step()
            assert kit.nmse(kit.gather(dist, kit.tensor(rank))[: kit.N], kit.tensor(0)) < 1e-3
            assert dist._engine.link.separated

    run_ranks(body)


def test_the_second_group_leaves_nothing_in_the_store():
    def body(rank, world):
        store = _torch.group_store(plain.group.WORLD)
        counts = []
        for _ in range(4):
            with kit.wrap(codec="int8") as dist:
                dist.step()
                kit.gather(dist, kit.tensor(rank))
            plain.barrier()
            counts.append(store.num_keys())
            plain.barrier()
        assert len(set(counts[1:])) == 1, counts

    run_ranks(body, world_size=3)
