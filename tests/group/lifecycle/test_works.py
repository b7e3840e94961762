"""Asynchronous calls: dropped, waited for out of order, twice, and across steps."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed

from tests.group.lifecycle import kit
from tests.launch import run_ranks
from tests.lockstep import compare

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")


def start(dist, rank, t, call=0):
    out = torch.full((dist.size() * kit.N,), 7.0)
    x = kit.tensor(rank + 10 * call, t)
    return dist.all_gather_into_tensor(out, x, async_op=True), out, x


def test_waits_out_of_order_and_twice():
    def body(rank, world_size):
        with kit.wrap() as dist:
            for t in range(4):
                dist.step()
                issued = [start(dist, rank, t, call) for call in range(3)]
                order = [2, 0, 1] if rank == 0 else [1, 2, 0]
                for i in order:
                    work, out, _ = issued[i]
                    assert work.wait()
                    first = out.clone()
                    out.fill_(3.0)
                    assert work.wait(), "a second wait is harmless"
                    assert (out == 3.0).all(), "and writes nothing"
                    assert work.is_completed()
                    assert work.is_success()
                    assert kit.nmse(first, torch.cat([kit.tensor(r + 10 * i, t) for r in range(2)])) < 1e-3
            return kit.finish(dist)

    compare.check(run_ranks(body))


def test_outputs_are_written_by_wait_and_the_input_is_free_at_once():
    def body(rank, world_size):
        with kit.wrap(local="exact") as dist:
            for t in range(3):
                dist.step()
                work, out, x = start(dist, rank, t)
                sent = x.clone()
                x.fill_(float("nan"))
                theirs = out.view(world_size, -1)[1 - rank]
                assert (theirs == 7.0).all()
                work.wait()
                assert kit.nmse(theirs, kit.gather_exact(sent).view(world_size, -1)[1 - rank]) < 1e-3
            return kit.finish(dist)

    compare.check(run_ranks(body))


def test_input_is_free_after_isend():
    def body(rank, world_size):
        with kit.wrap() as dist:
            for t in range(3):
                dist.step()
                x, y = kit.tensor(rank, t), torch.empty(kit.N)
                sending = dist.isend(x, 1 - rank)
                x.fill_(float("nan"))
                dist.recv(y, 1 - rank)
                sending.wait()
                assert kit.nmse(y, kit.tensor(1 - rank, t)) < 1e-3
            return kit.finish(dist)

    compare.check(run_ranks(body))


@pytest.mark.parametrize("op", ["gather", "to all", "broadcast", "ring"])
def test_dropped_works_move_the_stream_on_and_write_nothing(op):
    def issue(dist, rank, t):
        x = kit.tensor(rank, t)
        if op == "gather":
            return start(dist, rank, t)[:2]
        if op == "to all":
            out = torch.full((2 * kit.N,), 7.0)
            return dist.all_to_all_single(out, x.repeat(2), async_op=True), out
        if op == "broadcast":
            out = x if rank == 1 else torch.full((kit.N,), 7.0)
            return dist.broadcast(out, src=1, async_op=True), out
        out = torch.full((kit.N,), 7.0)
        works = [dist.irecv(out, 1 - rank), dist.isend(x, 1 - rank)]
        return works, out

    def body(rank, world_size):
        with kit.wrap() as dist:
            dropped = []
            for t in range(8):
                dist.step()
                works, out = issue(dist, rank, t)
                if t in (2, 3, 6):
                    dropped.append((out, out.clone()))
                    works = None
                    continue
                for work in works if isinstance(works, list) else [works]:
                    work.wait()
            for out, before in dropped:
                assert torch.equal(out, before)
            torch.distributed.barrier()
            return kit.finish(dist)

    compare.check(run_ranks(body))


def test_a_step_does_not_wait_for_a_receive():
    def body(rank, world_size):
        with kit.wrap(keyframe="raw") as dist:
            dist.step()
            y = torch.empty(kit.N)
            if rank == 0:
                pending = dist.irecv(y, 1)
                begin = time.monotonic()
                for t in range(5):
                    dist.step()
                    with dist.key("pair"):
                        dist.isend(kit.tensor(0, t), 1)
                assert time.monotonic() - begin < 5
                assert not pending.is_completed()
                torch.distributed.barrier()
                pending.wait()
                assert torch.equal(y, kit.tensor(1))
            else:
                torch.distributed.barrier()
                dist.send(kit.tensor(1), 0)
                for t in range(5):
                    dist.step()
                    with dist.key("pair"):
                        dist.recv(y, 0)
                    assert kit.nmse(y, kit.tensor(0, t)) < 1e-3
            return kit.finish(dist)

    compare.check(run_ranks(body))


def test_receives_prefetched_across_a_step_under_explicit_keys():
    """Rank 0 posts the receives of step t + 1 in step t."""

    def body(rank, world_size):
        with kit.wrap(warmup_steps=0) as dist:
            dist.step()
            posted = None
            for t in range(6):
                if rank == 0:
                    with dist.key("kv"):
                        y = torch.empty(kit.N)
                        following = dist.irecv(y, 1), y
                    if posted is not None:
                        posted[0].wait()
                        assert kit.nmse(posted[1], kit.tensor(1, t - 1)) < 1e-3
                    posted = following
                    dist.step()
                else:
                    with dist.key("kv"):
                        dist.send(kit.tensor(1, t), 0)
                    dist.step()
            if rank == 0:
                posted[0].wait()
            assert kit.keys_of(dist) == ["kv/send/1>0/t0#0"]
            return kit.finish(dist)

    compare.check(run_ranks(body))


def test_stale_gathers_cross_steps():
    """PipeFusion's pattern: what was gathered in step t is used in step t + 1."""

    def body(rank, world_size):
        with kit.wrap() as dist:
            late = None
            for t in range(5):
                dist.step()
                if late is not None:
                    late[0].wait()
                    assert kit.nmse(late[1], kit.gather_exact(late[2])) < 1e-3
                with dist.key(f"phase{t % 2}"):
                    late = start(dist, rank, t)
            late[0].wait()
            return kit.finish(dist)

    compare.check(run_ranks(body))


def test_futures_and_polling():
    def body(rank, world_size):
        with kit.wrap() as dist:
            for t in range(3):
                dist.step()
                work, out, x = start(dist, rank, t, 0)
                (got,) = work.get_future().wait()
                assert got is out or torch.equal(got, out)
                assert kit.nmse(out, kit.gather_exact(x)) < 1e-3
                work, out, x = start(dist, rank, t, 1)
                deadline = time.monotonic() + 20
                while not work.is_completed():
                    assert time.monotonic() < deadline
                    time.sleep(0.001)
                assert kit.nmse(out, kit.gather_exact(x)) < 1e-3
            return kit.finish(dist)

    compare.check(run_ranks(body))


def test_a_call_takes_note_of_what_dropped_works_said():
    """Frame 0 says that rank 0 keeps no history; nobody waits for it, yet from call 1 on all ranks pass through."""

    def body(rank, world_size):
        with kit.wrap_short(rank == 0, 0, warmup_steps=0) as dist:
            for t in range(4):
                dist.step()
                start(dist, rank, t)
            torch.distributed.barrier()
            assert dist.stats().passed_reasons == {"state-budget": 3}
            return kit.finish(dist)

    compare.check(run_ranks(body))
