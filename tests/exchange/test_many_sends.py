"""Many sends under way: those whose works the caller holds block nothing, those it dropped are kept, to a bound."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
import torch.distributed as dist

import compactdist
from compactdist.exchange.work import Job, Outbox, PendingWork
from tests.group.kit import NUMEL, close, data
from tests.launch import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch.*")


@pytest.mark.timeout(60)
def test_a_hundred_sends_then_a_hundred_receives():
    """On both ranks, which a plain group takes at once."""

    def body(rank, size):
        g = compactdist.wrap(codec="int8", min_numel=64)
        for step in range(2):
            g.step()
            sends = [dist.isend(data(rank, seed=i + step), 1 - rank, group=g) for i in range(100)]
            outs = [torch.empty(NUMEL) for _ in range(100)]
            for out in outs:
                dist.irecv(out, 1 - rank, group=g).wait()
            for send in sends:
                send.wait()
            for i, out in enumerate(outs):
                assert close(out, data(1 - rank, seed=i + step))
        assert g.stats().compressed_calls == 200
        g.close()

    run_ranks(body, 2, timeout=30)


@pytest.mark.timeout(60)
def test_a_batch_of_150_sends_and_150_receives():
    def body(rank, size):
        g = compactdist.wrap(codec="int8", min_numel=64)
        g.step()
        outs = [torch.empty(NUMEL) for _ in range(150)]
        ops = [dist.P2POp(dist.isend, data(rank, seed=i), 1 - rank, group=g) for i in range(150)]
        ops += [dist.P2POp(dist.irecv, out, 1 - rank, group=g) for out in outs]
        for work in dist.batch_isend_irecv(ops):
            work.wait()
        for i, out in enumerate(outs):
            assert close(out, data(1 - rank, seed=i))
        g.close()

    run_ranks(body, 2, timeout=30)


class _Inner:
    """An inner work that counts how often it was waited for."""

    def __init__(self) -> None:
        self.waits = 0

    def wait(self, *timeout: Any) -> bool:
        self.waits += 1
        return True

    def is_completed(self) -> bool:
        return self.waits > 0


def _send(outbox: Outbox, peer: int = 1) -> tuple[_Inner, PendingWork]:
    inner = _Inner()
    job = Job(inner, None, None)
    outbox.add(peer, job)
    return inner, PendingWork([job], [], lambda: pytest.fail("no future is asked for"))


def test_dropped_sends_are_bounded_and_held_ones_left_alone():
    outbox = Outbox(depth=4)
    held = [_send(outbox) for _ in range(20)]
    dropped = [_send(outbox)[0] for _ in range(10)]
    gc.collect()
    # The newest has not been dropped when it is added, and the others are more than four from the sixth on.
    assert [inner.waits for inner in dropped] == [1, 1, 1, 1, 1, 0, 0, 0, 0, 0]
    other = _send(outbox, peer=2)[0]
    assert (other.waits, [inner.waits for inner, _ in held]) == (0, [0] * 20)
    for _, work in held:
        work.wait()
    newest = _send(outbox)
    assert [inner.waits for inner in dropped] == [1] * 6 + [0] * 4
    outbox.flush()
    assert all(inner.waits == 1 for inner in (*dropped, other, newest[0], *(inner for inner, _ in held)))


def test_a_send_of_a_batch_still_being_made_is_not_waited_for():
    """Its works are made when the whole batch has been posted; until then nobody could have dropped them."""
    outbox = Outbox(depth=4)
    inners = [_Inner() for _ in range(20)]
    jobs = [Job(inner, None, None) for inner in inners]
    for job in jobs:
        outbox.add(1, job)
    assert sum(inner.waits for inner in inners) == 0
    PendingWork(jobs, [], lambda: pytest.fail("no future is asked for"))
    gc.collect()
    _send(outbox)
    assert [inner.waits for inner in inners] == [1] * 16 + [0] * 4


def test_a_queue_of_sends_that_are_done_is_emptied():
    outbox = Outbox(depth=4)
    for _ in range(200):
        _send(outbox)[1].wait()
    assert len(outbox._queues[1].jobs) == 1
    first = _send(outbox)
    for _ in range(200):
        _send(outbox)[1].wait()
    assert len(outbox._queues[1].jobs) <= 6
    assert first[0].waits == 0


@pytest.mark.timeout(60)
def test_dropped_sends_arrive():
    """Their works are gone before anybody receives; gloo alone would lose them."""

    def body(rank, size):
        g = compactdist.wrap(codec="int8", min_numel=64)
        g.step()
        if rank == 0:
            for i in range(80):
                dist.isend(data(0, seed=i), 1, group=g)
            gc.collect()
        else:
            for i in range(80):
                dist.recv(out := torch.empty(NUMEL), 0, group=g)
                assert close(out, data(0, seed=i))
        g.close()

    run_ranks(body, 2, timeout=30)
