"""Threads that share a process, or even a group, do not meet."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.distributed

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
