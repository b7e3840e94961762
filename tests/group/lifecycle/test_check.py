"""check() compares both ends of every stream, and names what differs."""

from __future__ import annotations

import pytest
import torch
import torch.distributed

from compactdist.errors import StateMismatchError
from tests.group.lifecycle import kit
from tests.launch import run_ranks
from tests.quick import quick_for

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")


def traffic(dist, rank, steps=3):
    """Every kind of call, asynchronous ones among them."""
    world = dist.size()
    for t in range(steps):
        dist.step()
        with dist.key("kv"):
            work = dist.all_gather_into_tensor(torch.empty(world * kit.N), kit.tensor(rank, t), async_op=True)
        dist.all_to_all_single(torch.empty(world * kit.N), kit.tensor(rank, t, world * kit.N))
        dist.broadcast(kit.tensor(rank, t), src=1)
        ops = [
            dist.P2POp(dist.isend, kit.tensor(rank, t), (rank + 1) % world),
            dist.P2POp(dist.irecv, torch.empty(kit.N), (rank - 1) % world),
        ]
        for one in dist.batch_isend_irecv(ops):
            one.wait()
        if t < steps - 1:
            work.wait()
    return work


@pytest.mark.parametrize("options", [{}, {"order": 2}, {"state": "int8"}, {"error_feedback": False}, {"codec": "raw"}])
@pytest.mark.parametrize("world_size", quick_for([2], [2, 3]))
def test_it_passes_where_all_is_well(world_size, options):
    def body(rank, world):
        with kit.wrap(**options) as dist:
            dist.check()
            work = traffic(dist, rank)
            before = dist._store.num_keys()
            torch.distributed.barrier()
            dist.check()
            work.wait()
            dist.check()
            assert dist._store.num_keys() == before, "names go to the store only where something differs"
            dist.reset()
            dist.check()
            traffic(dist, rank)
            dist.check()

    run_ranks(body, world_size=world_size)


@pytest.mark.parametrize("what", ["history", "digest", "sequence", "view", "lost site"])
def test_it_names_site_and_ranks_on_every_rank(what):
    def body(rank, world):
        with kit.wrap() as dist:
            traffic(dist, rank)
            for _ in range(2):  # twice: what was posted for the first difference is no answer to the second
                if rank == 1:
                    site = dist._engine.store.find("kv/all_gather#0")
                    stream = site.decoders[2]
                    if what == "history":
                        with torch.inference_mode():
                            stream.predictor.base[17] += 1e-6
                    elif what == "digest":
                        stream.digest ^= 1
                    elif what == "sequence":
                        stream.sequence += 1
                    elif what == "view":
                        stream.view = None
                    else:
                        dist._engine.store.known.pop(site.key)
                with pytest.raises(StateMismatchError) as caught:
                    dist.check()
                text = str(caught.value)
                for word in ("kv/all_gather#0", "rank 2", "rank 1", "reset() on all ranks"):
                    assert word in text, text
                assert "broadcast" not in text
                dist.reset()
                traffic(dist, rank)
                dist.check()

    run_ranks(body, world_size=3)


def test_a_lost_message_is_counted():
    def body(rank, world):
        with kit.wrap() as dist:
            for t in range(3):
                dist.step()
                work = dist.isend(kit.tensor(rank, t), 1) if rank == 0 else None
                if rank == 1 and t < 2:
                    dist.recv(torch.empty(kit.N), 0)
            with pytest.raises(StateMismatchError, match="rank 0 has sent 3 frames, rank 1 has applied 2"):
                dist.check()
            if rank == 1:
                dist.recv(torch.empty(kit.N), 0)
            if work:
                work.wait()
            dist.check()

    run_ranks(body)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_a_stream_that_has_not_passed_on_what_arrived_last_raises_no_alarm(order):
    """Its history is the other stream's, which has moved on: only its receiver has what both held."""

    def hop(dist, x, name):
        with dist.key(name):
            return kit.hop(dist, x)

    def body(rank, world):
        with kit.wrap(order=order) as dist:
            for t in range(9):
                dist.step()
                arrived = hop(dist, kit.tensor(rank, t), "a")
                dist.check()
                if t not in (4, 6):
                    again = hop(dist, arrived, "b")
                    assert kit.nmse(again, kit.tensor((rank - 2) % world, t)) < 2e-2
                dist.check()
            assert dist.stats().forwarded
            if rank == 1 and order:  # what is not shared is compared
                with torch.inference_mode():
                    dist._engine.store.sites()[0].streams[0].predictor.held[0].add_(1)
            if order:
                with pytest.raises(StateMismatchError, match="site 'a/"):
                    dist.check()

    run_ranks(body, world_size=3)
