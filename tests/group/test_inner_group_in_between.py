"""Plain calls on the inner group while a compressed one waits for its agreement: gloo needs one order on all ranks."""

from __future__ import annotations

import datetime
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
        for in_between in ("gather", "sum", "broadcast", "barrier"):
            with kit.wrap(codec="int8") as dist, kit.wrap(codec="int4") as other:
                for step in range(2):
                    dist.step()
                    other.step()
                    if rank == world - 1:
                        time.sleep(0.2)
                    work, out, expected = begin(compressed, dist, rank, step, world)
                    for n in (100, kit.N, 1092):
                        assert plainly(in_between, dist.inner, rank, world, n), (in_between, n)
                    gathered = kit.gather(other, kit.tensor(rank, step))
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
                second = kit.gather(dist, kit.tensor(rank, step))
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
            assert dist._engine.link.own is None

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
            assert dist._engine.link.own is not None

    run_ranks(body)


@pytest.mark.parametrize("before", ["nothing", "reset", "small chunks"])
def test_closing_with_a_frame_under_way_does_not_wait_for_it(before):
    """Rank 1 comes to the call when it has a message that rank 0 sends once it has closed."""

    def call(dist, rank, step):
        if before != "small chunks":
            return begin("gather", dist, rank, step, 2)
        out, small = torch.empty(32), torch.full((32,), float(rank))
        return dist.all_to_all_single(out, small, async_op=True), out, torch.tensor([0.0, 1.0]).repeat_interleave(16)

    def body(rank, world):
        dist, note = kit.wrap(codec="int8"), torch.zeros(1)
        kept = begin("gather", dist, rank, 0, world)[0]  # passes: no step has begun
        for step in range(2):
            dist.step()
            call(dist, rank, step)[0].wait()
            kit.gather(dist, kit.tensor(rank, step))
        dist.step()
        if rank == 1:
            plain.recv(note, 0)
        work, out, expected = call(dist, rank, 2)
        if rank == 0:
            began = time.monotonic()
            if before == "reset":
                dist.reset()
            dist.close()
            assert time.monotonic() - began < 2
            plain.send(note, 1)
        work.wait()
        kept.wait()
        assert kit.nmse(out, expected) < 1e-3

    run_ranks(body)


def test_gloo_groups_of_closed_wraps_do_not_pile_up():
    """The last call of each is finished after it was closed."""

    def body(rank, world):
        left = []
        for _ in range(12):
            dist = kit.wrap(codec="int8")
            dist.step()
            kit.gather(dist, kit.tensor(rank))
            work, out, expected = begin("gather", dist, rank, 1, world)
            dist.close()
            work.wait()
            assert kit.nmse(out, expected) < 1e-3
            left.append(len(_torch._left))
        assert max(left) <= 2, left

    run_ranks(body)


def test_a_timeout_that_changes_reaches_frames_at_the_next_step():
    def body(rank, world):
        with kit.wrap(codec="int8") as dist:
            for step in range(3):
                if step == 2:
                    dist.inner._get_backend(torch.device("cpu"))._set_default_timeout(datetime.timedelta(seconds=30))
                    time.sleep(4 * rank)
                dist.step()
                out = kit.gather(dist, kit.tensor(rank, step))
                assert kit.nmse(out[: kit.N], kit.tensor(0, step)) < 1e-3

    run_ranks(body, pg_timeout=2, timeout=60)


def test_gloo_that_connects_late_has_no_second_group(monkeypatch):
    monkeypatch.setenv("TORCH_GLOO_LAZY_INIT", "1")

    def body(rank, world):
        with kit.wrap(codec="int8") as dist:
            for step in range(2):
                dist.step()
                out = kit.gather(dist, kit.tensor(rank, step))
                assert kit.nmse(out[: kit.N], kit.tensor(0, step)) < 1e-3
            assert dist._engine.link.own is None

    run_ranks(body)


def test_where_one_rank_cannot_connect_all_raise_and_reset_mends_it(monkeypatch):
    """Rank 0 fails once it has connected, and the others have."""
    connect = _torch.second_gloo

    def body(rank, world):
        def fail(gloo, store):
            made = connect(gloo, store)
            if rank == 0:
                raise RuntimeError("too many open files")
            return made

        with kit.wrap(codec="int8") as dist:
            with monkeypatch.context() as patch:
                patch.setattr(_torch, "second_gloo", fail)
                dist.step()
                with pytest.raises(compactdist.errors.CompactDistError, match="too many open files"):
                    kit.gather(dist, kit.tensor(rank))
            dist.reset()
            dist.step()
            assert kit.nmse(kit.gather(dist, kit.tensor(rank))[: kit.N], kit.tensor(0)) < 1e-3
            dist.check()

    run_ranks(body, world_size=3)


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
