"""Threads that share a process, or even a group, do not meet."""

from __future__ import annotations

import sys
import threading

import pytest
import torch
import torch.distributed

import compactdist
from compactdist.errors import CallGroupError, ClosedGroupError
from compactdist.testing import act_like_nccl
from tests.group.lifecycle import kit
from tests.launch import run_ranks
from tests.lockstep import compare

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")


def in_threads(*jobs):
    """Run all at once; raises what any of them raised."""
    errors = []

    def guarded(job):
        try:
            job()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(job,), daemon=True) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive(), "a thread hangs"
    if errors:
        raise errors[0]


def test_two_threads_on_two_groups():
    def body(rank, world_size):
        second = torch.distributed.new_group([0, 1])
        with kit.wrap() as a, kit.wrap(codec="binary", group=second) as b:

            def work(dist, offset):
                for t in range(25):
                    dist.step()
                    with dist.key("kv"):
                        out = kit.gather(dist, kit.tensor(rank + offset, t))
                    expected = torch.cat([kit.tensor(r + offset, t) for r in range(world_size)])
                    assert kit.nmse(out, expected) < 0.05

            in_threads(lambda: work(a, 0), lambda: work(b, 5))
            for dist in (a, b):
                assert kit.keyframes(dist) == {"kv/all_gather#0": (25, 1)}
            return kit.finish(a), kit.finish(b)

    for held in zip(*run_ranks(body), strict=True):
        compare.check(list(held))


def test_two_threads_with_prefixes_on_one_group():
    """Point-to-point on tags of their own: each thread's order is its own affair."""

    def body(rank, world_size):
        with kit.wrap() as dist:
            dist.step()
            steps = threading.Barrier(3, timeout=20)

            def work(name, tag):
                for t in range(20):
                    for call in range(3):
                        with dist.branch(name):
                            y = torch.empty(kit.N)
                            receiving = dist.irecv(y, 1 - rank, tag=tag)
                            sending = dist.isend(kit.tensor(rank + tag + 10 * call, t), 1 - rank, tag=tag)
                            receiving.wait()
                            sending.wait()
                        assert kit.nmse(y, kit.tensor(1 - rank + tag + 10 * call, t)) < 1e-2
                    steps.wait()
                    steps.wait()

            def clock():
                for _ in range(20):
                    steps.wait()
                    dist.step()
                    steps.wait()

            in_threads(lambda: work("a", 100), lambda: work("b", 200), clock)
            assert len(kit.keys_of(dist)) == 12
            sent = {key: v for key, v in kit.keyframes(dist).items() if f"{rank}>" in key}
            assert set(sent.values()) == {(20, 1)}
            return kit.finish(dist)

    compare.check(run_ranks(body))


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_batch_of_one_thread_beside_collectives_of_another(asynchronous):
    """Where the backend groups calls, it would issue whatever comes meanwhile together with the batch."""

    def body(rank, world):
        inner = act_like_nccl(torch.distributed.group.WORLD, delay=0.0005)
        with compactdist.wrap(inner, codec="int4") as dist:
            dist.step()

            def batches():
                for t in range(40):
                    with dist.branch("batches"):
                        y, x = torch.empty(kit.N), kit.tensor(rank, t)
                        ops = [dist.P2POp(dist.isend, x, 1 - rank), dist.P2POp(dist.irecv, y, 1 - rank)]
                        for work in dist.batch_isend_irecv(ops):
                            work.wait()
                    assert kit.nmse(y, kit.tensor(1 - rank, t)) < 1e-2

            def gathers():
                for t in range(40):
                    with dist.branch("gathers"):
                        out = torch.full((world * kit.N,), 7e3)
                        work = dist.all_gather_into_tensor(out, kit.tensor(rank + 9, t), async_op=asynchronous)
                        if asynchronous:
                            work.wait()
                    assert kit.nmse(out, torch.cat([kit.tensor(r + 9, t) for r in range(world)])) < 1e-2

            switches = sys.getswitchinterval()
            sys.setswitchinterval(1e-5)
            try:
                in_threads(batches, gathers)
            finally:
                sys.setswitchinterval(switches)
            assert inner.issued.count("start") == 40
            dist.check()

    run_ranks(body, timeout=60)


def test_a_call_while_another_thread_has_a_group_of_calls_open():
    """Nothing tells when that thread will end it, so the call is refused, and may be made again."""

    def body(rank, world):
        inner = act_like_nccl(torch.distributed.group.WORLD)
        with compactdist.wrap(inner, codec="int4") as dist:
            for t in range(3):
                dist.step()
                assert kit.nmse(kit.gather(dist, kit.tensor(rank, t))[: kit.N], kit.tensor(0, t)) < 1e-2
            dist.start_coalescing(torch.device("cpu"))
            told = []

            def other():
                with pytest.raises(CallGroupError, match=r"thread 'MainThread' has .* thread 'Thread-"):
                    kit.gather(dist, kit.tensor(rank, 3))
                told.append(True)

            in_threads(other)
            assert told == [True]
            dist.end_coalescing(torch.device("cpu"))
            dist.step()
            assert kit.nmse(kit.gather(dist, kit.tensor(rank, 4))[: kit.N], kit.tensor(0, 4)) < 1e-2
            dist.check()

    run_ranks(body, timeout=60)


def test_closing_while_another_thread_waits_for_works():
    """Of which it takes one after the other from those of a site."""

    class Taken:
        def __init__(self, pending):
            self.pending = pending

        def is_ready(self):
            self.pending.popleft()  # as the thread that waits for it does
            return True

    def body(rank, world):
        dist = kit.wrap()
        dist.step()
        kit.gather(dist, kit.tensor(rank))
        (site,) = dist._engine.store.sites()
        for _ in range(3):
            site.pending.append(Taken(site.pending))
        dist.close()
        assert not site.pending
        with pytest.raises(ClosedGroupError):
            kit.gather(dist, kit.tensor(rank))

    run_ranks(body, timeout=40)
