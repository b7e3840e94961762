"""Works: waited for twice, in any order, from any thread, by polling or future; outputs are written only then."""

from __future__ import annotations

import threading
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch.distributed import distributed_c10d as c10d

import compactdist
from compactdist.errors import NonFiniteError
from tests.group.kit import NUMEL, close, data, exchanged, gathered
from tests.launch import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def fresh(**options):
    return compactdist.wrap(codec="int8", min_numel=64, **options)


def nan(numel=NUMEL):
    return torch.full((numel,), torch.nan)


def untouched(x):
    return bool(x.isnan().all())


def calls(g, rank, size, seed=0):
    """One asynchronous call of every compressed kind: name -> (works, remote part of the output, what it will hold)."""
    x, peer = data(rank, seed=seed), 1 - rank
    single, rows, exchange, cast, received = nan(2 * NUMEL), [nan(), nan()], nan(), data(1, seed=seed), nan()
    if rank == 0:
        cast = nan()
    made = {
        "all_gather_into_tensor": (
            [g.all_gather_into_tensor(single, x, async_op=True)],
            single.view(2, -1)[peer],
            data(peer, seed=seed),
        ),
        "all_gather": ([g.all_gather(rows, x, async_op=True)], rows[peer], data(peer, seed=seed)),
        "all_to_all_single": (
            [g.all_to_all_single(exchange, x, async_op=True)],
            exchange.view(2, -1)[peer],
            exchanged(rank, 2, seed=seed).view(2, -1)[peer],
        ),
        "p2p": ([g.irecv(received, peer), g.isend(x, peer)], received, data(peer, seed=seed)),
    }
    broadcast = [g.broadcast(cast, 1, async_op=True)]
    if rank == 0:
        made["broadcast"] = (broadcast, cast, data(1, seed=seed))
    return made


def test_remote_parts_are_untouched_before_wait_and_waiting_twice_is_fine():
    def body(rank, size):
        g = fresh()
        for seed in range(3):
            with g.step():
                made = calls(g, rank, size, seed)
                g.barrier()  # of this group: what waits for an agreement leaves before it
                time.sleep(0.05)  # all is on its way: still nothing may be written
                for name, (_, output, _) in made.items():
                    assert untouched(output), name
                for name, (works, output, expected) in made.items():
                    for work in (*works, *works):
                        assert work.wait() is True
                    assert close(output, expected), name
                    assert all(work.is_completed() and work.is_success() for work in works), name
                    assert works[0].result()[0].data_ptr() is not None

    run_ranks(body, pg_timeout=15)


def test_waits_in_any_order_decode_in_the_order_of_issue():
    def body(rank, size):
        g = fresh()
        for step in range(4):
            pending = []
            outputs = []
            with g.key("a"):
                for ahead in range(2):  # two steps of the same sites in flight
                    g.step()
                    made = calls(g, rank, size, seed=2 * step + ahead)
                    outputs += [(name, o, e) for name, (_, o, e) in made.items()]
                    pending += [work for works, _, _ in made.values() for work in works]
            for work in reversed(pending):
                work.wait()
            for name, output, expected in outputs:
                assert close(output, expected), f"{step} {name}"

    run_ranks(body, pg_timeout=15)


def test_another_thread_may_wait():
    def body(rank, size):
        g = fresh()
        for seed in range(2):
            g.step()
            made = calls(g, rank, size, seed)
            works = [work for works, _, _ in made.values() for work in works]
            threads = [threading.Thread(target=work.wait) for work in works]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(10)
                assert not thread.is_alive()
            assert all(close(output, expected) for _, output, expected in made.values())

    run_ranks(body, pg_timeout=15)


def test_polling_makes_progress_and_tells_the_truth():
    def body(rank, size):
        g, store = fresh(), c10d._get_default_store()
        for seed in range(2):
            g.step()
            if rank == 1:
                store.wait([f"looked{seed}"])
            out = nan(2 * NUMEL)
            work = g.all_gather_into_tensor(out, data(rank, seed=seed), async_op=True)
            if rank == 0:
                assert not work.is_completed()  # rank 1 has sent nothing yet
                assert untouched(out[NUMEL:])
                store.set(f"looked{seed}", "")
            deadline = time.monotonic() + 10
            while not work.is_completed():
                assert time.monotonic() < deadline, "polling never ends"
            assert close(out, gathered(2, seed=seed))
            work.wait()

    run_ranks(body, pg_timeout=15)


def test_point_to_point_is_complete_only_once_decoded():
    def body(rank, size):
        g = fresh()
        g.step()
        out = nan()
        receive, sent = g.irecv(out, 1 - rank), g.isend(data(rank), 1 - rank)
        dist.barrier()
        assert receive.is_completed() is not untouched(out)
        sent.wait()
        receive.wait()
        assert receive.is_completed()
        assert close(out, data(1 - rank))

    run_ranks(body, pg_timeout=15)


def test_futures_of_collectives_and_point_to_point():
    def body(rank, size):
        g = fresh()
        for seed in range(2):
            g.step()
            made = calls(g, rank, size, seed)
            for name, (works, output, expected) in made.items():
                futures = [work.get_future() for work in works]
                then = futures[0].then(lambda f, o=output, e=expected: close(o, e) and len(f.value()) > 0)
                for future in futures:
                    future.wait()
                assert then.wait(), name
                assert works[0].get_future() is futures[0]
                for work in works:
                    work.wait()

    run_ranks(body, pg_timeout=15)


def test_errors_from_wait_arrive_as_they_were_raised():
    def body(rank, size):
        g = fresh()
        bad = data(rank)
        if rank == 0:
            bad[-3] = torch.nan  # in the chunk for rank 1
        said = []

        def attempt(code):
            good = data(rank)
            with g.step():  # a keyframe takes NaN, a residual cannot
                g.all_gather_into_tensor(nan(2 * NUMEL), good)
                g.all_to_all_single(nan(), good)
            g.step()
            with pytest.raises(Exception) as info:  # noqa: PT011 - the type is the subject
                code()
            said.append(type(info.value))
            dist.barrier()

        def future():
            work = g.all_gather_into_tensor(nan(2 * NUMEL), bad, async_op=True)
            try:
                work.get_future().wait()
            finally:
                with pytest.raises(Exception, match=r"NaN|finite"):
                    work.wait()

        attempt(lambda: g.all_gather_into_tensor(nan(2 * NUMEL), bad))
        attempt(lambda: funcol.all_gather_tensor(bad, 0, g) + 0)
        attempt(lambda: g.all_to_all_single(nan(), bad))
        attempt(lambda: funcol.all_to_all_single(bad, None, None, g) + 0)
        attempt(future)
        work = None

        def twice():
            nonlocal work
            work = g.all_gather_into_tensor(nan(2 * NUMEL), bad, async_op=True)
            work.wait()

        attempt(twice)
        with pytest.raises(said[-1]):
            work.wait()
        assert isinstance(work.exception(), said[-1])
        assert not work.is_success()
        g.step()  # and the group goes on
        out = nan(2 * NUMEL)
        g.all_gather_into_tensor(out, data(rank))
        assert close(out, gathered(2))
        return [t.__name__ for t in said]

    zero, one = run_ranks(body, pg_timeout=15)
    assert set(zero[:4]) == {NonFiniteError.__name__}
    assert all("Error" in name for name in one)


def test_a_wait_that_times_out_says_so():
    def body(rank, size):
        g = fresh()
        g.step()
        if rank == 0:
            work = g.irecv(nan(), 1)
            started = time.monotonic()
            with pytest.raises(RuntimeError, match=r"(?i)timeout|timed out"):
                work.wait(timedelta(seconds=0.3))
            assert time.monotonic() - started < 5

    run_ranks(body, pg_timeout=15)


def test_inference_mode():
    def body(rank, size):
        g = fresh()
        for seed in range(3):
            with torch.inference_mode(), g.step():
                x = data(rank, seed=seed) * 1
                out, exchange, received = nan(2 * NUMEL), nan(), nan()
                g.all_gather_into_tensor(out, x)
                g.all_to_all_single(exchange, x)
                works = [g.irecv(received, 1 - rank), g.isend(x, 1 - rank)]
                for work in works:
                    work.wait()
                y = funcol.all_gather_tensor(x, 0, g) + 0
                assert close(out, gathered(2, seed=seed))
                assert close(y, gathered(2, seed=seed))
                assert close(exchange, exchanged(rank, 2, seed=seed))
                assert close(received, data(1 - rank, seed=seed))
        assert g.stats().compressed_calls == 12

    run_ranks(body, pg_timeout=15)
