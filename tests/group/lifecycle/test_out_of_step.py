"""A rank that skips a call, misses a step or sends to another group: nobody takes one tensor for another."""

from __future__ import annotations

import pytest
import torch
import torch.distributed

from compactdist.errors import CompactDistError, FrameError
from tests.group.lifecycle import kit
from tests.launch import run_ranks
from tests.quick import quick_for

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")

STEPS = 6
NEAR = 1e-3
"""NMSE below which a value is the one that was sent; the tensors of two steps are a hundred times farther apart."""


def tensor(rank, step):
    return torch.randn(kit.N, generator=torch.Generator().manual_seed(1000 * rank + step))


def exchange(dist, op, rank, step):
    """One call of this step; what arrived, by the rank that sent it."""
    world, x = dist.size(), tensor(rank, step)
    if op == "gather":
        return dict(enumerate(kit.gather(dist, x).view(world, -1)))
    if op == "all_to_all":
        out = torch.empty(world * kit.N)
        dist.all_to_all_single(out, x.repeat(world))
        return dict(enumerate(out.view(world, -1)))
    if op == "broadcast":
        y = x.clone() if rank == 0 else torch.empty(kit.N)
        dist.broadcast(y, src=0)
        return {0: y}
    return {(rank - 1) % world: kit.hop(dist, x)}


def seen(dist, op, rank, step):
    """``right``, ``refused`` (an error of ours), ``failed`` (of the inner group), or ``wrong``: other values."""
    try:
        arrived = exchange(dist, op, rank, step)
    except CompactDistError:
        return "refused"
    except RuntimeError:
        return "failed"
    near = all(kit.nmse(y, tensor(source, step)) < NEAR for source, y in arrived.items())
    return "right" if near else "wrong"


@pytest.mark.parametrize("op", ["gather", "all_to_all", "ring", "broadcast"])
@pytest.mark.parametrize("at", quick_for([1], [0, 1, 3]))
@pytest.mark.parametrize("world_size", quick_for([2], [2, 3]))
def test_a_skipped_call_gives_no_wrong_value(op, at, world_size):
    """The last rank skips one call and goes on with the next step, and the others catch their errors and go on."""

    def body(rank, world):
        results = []
        with kit.wrap(codec="int8") as dist:
            for step in range(STEPS):
                dist.step()
                if rank == world - 1 and step == at:
                    continue
                results.append(seen(dist, op, rank, step))
                if results[-1] == "failed":
                    break
        return results

    for rank, results in enumerate(run_ranks(body, world_size=world_size, pg_timeout=2)):
        assert "wrong" not in results, (rank, results)
        if op != "broadcast" or rank == world_size - 1:
            assert set(results) & {"refused", "failed"}, (rank, results)


@pytest.mark.parametrize("op", ["gather", "all_to_all", "ring", "broadcast"])
def test_a_missed_step_is_noticed(op):
    """Rank 1 forgets step() once: the tensors are the same, but its clock is not."""

    def body(rank, world):
        results = []
        with kit.wrap(codec="int8", warmup_steps=4) as dist:
            for step in range(3):
                if rank == 0 or step != 1:
                    dist.step()
                with dist.key(str(step)):  # a name of its own, or the ordinal tells
                    results.append(seen(dist, op, rank, step))
        return results

    for results in run_ranks(body):
        assert results == ["right", "refused", "refused"]


def test_calls_of_two_wraps_of_one_group_are_told_apart():
    """By the frames, where plans are not agreed on."""

    def body(rank, world):
        one, two = (kit.wrap(codec="int8", agree="off") for _ in range(2))
        for dist in (one, two):
            dist.step()
            for n in range(2):
                kit.gather(dist, tensor(rank, n))
        for dist in (one, two) if rank else (two, one):
            with pytest.raises(FrameError, match=r"wrong stream.*groups in the same order"):
                kit.gather(dist, tensor(rank, 2))

    run_ranks(body)


def test_a_send_left_over_from_a_closed_wrap_is_not_taken_for_one_of_the_next():
    def body(rank, world):
        old = kit.wrap(codec="int8")
        old.step()
        work = old.isend(tensor(0, 0), 1) if rank == 0 else None
        torch.distributed.barrier()
        old.close()
        del work
        new = kit.wrap(codec="int8")
        new.step()
        work = new.isend(tensor(0, 1), 1) if rank == 0 else None
        if rank == 1:
            with pytest.raises(FrameError, match="wrong stream"):
                new.recv(torch.empty(kit.N), 0)
        return work is None

    run_ranks(body)


def deliver(dist, op, x, *, receives):
    """One message from rank 0 to rank 1."""
    if op == "broadcast":
        dist.broadcast(x, 0)
    elif op == "send":
        (dist.recv if receives else dist.send)(x, 0 if receives else 1)
    else:
        dist.batch_isend_irecv([dist.P2POp(dist.irecv if receives else dist.isend, x, 0 if receives else 1)])[0].wait()


@pytest.mark.parametrize("op", ["send", "batch", "broadcast"])
@pytest.mark.parametrize("why", ["policy", "dtype"])
def test_a_plain_receive_notices_a_frame(op, why):
    """Rank 0 compresses, rank 1 lets the message pass through: as its policy says so, or as it expects integers."""

    def policy(call):
        return "pass" if why == "policy" and torch.distributed.get_rank() == 1 else None

    def body(rank, world):
        with kit.wrap(codec="int2", policy=policy, agree="off") as dist:
            for step in range(2):
                dist.step()
                x = tensor(0, step)
                if rank == 0:
                    deliver(dist, op, x, receives=False)
                    continue
                # as large as a keyframe at least: gloo ends a process that is sent more than it expects
                y = torch.empty(kit.N, dtype=torch.int64 if why == "dtype" else torch.float64)
                with pytest.raises(FrameError, match=r"arrived as a frame.*reset\(\) on all ranks"):
                    deliver(dist, op, y, receives=True)

    run_ranks(body)


def test_a_stateless_frame_is_taken_once():
    """What requires grad is sent without history, and still in its place among the frames of its stream."""

    def body(rank, world):
        with kit.wrap(codec="int8") as dist:
            for step in range(4):
                dist.step()
                x = tensor(0, step).requires_grad_(step % 2 == 1)
                y = torch.empty(kit.N)
                if rank == 0:
                    dist.send(x, 1)
                else:
                    dist.recv(y, 0)
                    assert kit.nmse(y, x.detach()) < NEAR
            site = dist._engine.store.sites()[0]
            stream = site.encoders[1] if rank == 0 else site.decoders[0]
            assert stream.sequence == 4

    run_ranks(body)
