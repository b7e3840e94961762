"""Works and functional results nobody waits for: streams stay in step, sends arrive, no buffer is written late."""

from __future__ import annotations

import gc
import time

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol

import compactdist
from tests.group.kit import NUMEL, close, data, exchanged, gathered
from tests.launch import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

ops = torch.ops._c10d_functional
STEPS = 6


def slow_change(rank, step):
    """A tensor whose residuals are small, so that a missed one shows."""
    return data(rank) + 0.5 * step


def fresh():
    return compactdist.wrap(codec="int8", min_numel=64)


def test_a_dropped_functional_output_leaves_the_streams_in_step():
    def body(rank, size):
        g = fresh()
        seen = []
        for step in range(STEPS):
            g.step()
            x = slow_change(rank, step)
            if step % 2:
                y = ops.all_gather_into_tensor(x, size, g.group_name)
                z = ops.all_to_all_single(x, [NUMEL // size] * size, [NUMEL // size] * size, g.group_name)
                del y, z
                gc.collect()
                continue
            gather = funcol.all_gather_tensor(x, 0, g) + 0
            exchange = funcol.all_to_all_single(x, None, None, g) + 0
            assert close(gather, gathered(size) + 0.5 * step), step
            assert close(exchange, exchanged(rank, size) + 0.5 * step), step
            seen.append(gather)
        assert g.stats().compressed_calls == 2 * STEPS
        return torch.stack(seen)

    one, two = run_ranks(body, pg_timeout=15)
    assert torch.equal(one, two)  # to the bit: both ends hold the same history


def test_a_dropped_work_never_writes_to_its_output():
    def body(rank, size):
        g, peer = fresh(), 1 - rank
        for step in range(STEPS):
            g.step()
            x = slow_change(rank, step)
            gather, exchange, received = (torch.full((n,), torch.nan) for n in (2 * NUMEL, NUMEL, NUMEL))
            works = [
                g.all_gather_into_tensor(gather, x, async_op=True),
                g.all_to_all_single(exchange, x, async_op=True),
                g.irecv(received, peer),
                g.isend(x, peer),
            ]
            if step % 2:
                del works
                gc.collect()
                for output in (gather, exchange, received):
                    output.fill_(7)
                late = [gather, exchange, received]
                continue
            for work in works:
                work.wait()
            assert close(gather, gathered(2) + 0.5 * step), step
            assert close(exchange, exchanged(rank, 2) + 0.5 * step), step
            assert close(received, data(peer) + 0.5 * step), step
            if step:
                assert all(bool((output == 7).all()) for output in late)

    run_ranks(body, pg_timeout=15)


@pytest.mark.parametrize("many", [1, 200])
def test_dropped_isends_are_delivered(many):
    def body(rank, size):
        g = fresh()
        rounds = 2
        for step in range(rounds):
            g.step()
            if rank == 0:
                for i in range(many):
                    g.isend(slow_change(i, step), 1)
                gc.collect()
                g.inner.barrier().wait()
            else:
                if many < 64:
                    g.inner.barrier().wait()  # all were sent before the first is received
                    time.sleep(0.05)
                for i in range(many):
                    out = torch.full((NUMEL,), torch.nan)
                    g.recv(out, 0)
                    assert close(out, slow_change(i, step)), f"{step}: message {i}"
                if many >= 64:
                    g.inner.barrier().wait()
        if rank == 0:
            assert g.stats().compressed_calls == rounds * many

    run_ranks(body, timeout=60, pg_timeout=20)


def test_close_delivers_what_is_under_way():
    def body(rank, size):
        g = fresh()
        g.step()
        if rank == 0:
            for i in range(10):
                g.isend(data(i), 1)
            g.close()
        else:
            outs = [torch.full((NUMEL,), torch.nan) for _ in range(10)]
            for i, out in enumerate(outs):
                g.recv(out, 0)
                assert close(out, data(i))
            g.close()
        dist.barrier()  # the inner group is alive

    run_ranks(body, pg_timeout=15)


def test_a_dropped_exchange_that_fails_is_told_to_the_log(caplog):
    def body(rank, size):
        caplog.clear()
        g = fresh()
        bad = data(rank)
        bad[-3] = torch.nan
        for step in range(2):
            g.step()
            work = g.all_gather_into_tensor(torch.empty(2 * NUMEL), bad if step else data(rank), async_op=True)
            if step == 0:
                work.wait()
        del work
        gc.collect()
        g.step()
        out = torch.empty(2 * NUMEL)
        g.all_gather_into_tensor(out, data(rank))
        assert close(out, gathered(2))
        return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]

    for messages in run_ranks(body, pg_timeout=15):
        assert any("dropped" in message for message in messages)
