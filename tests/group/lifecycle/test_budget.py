"""state_budget_bytes: what does not fit passes through, on every rank, even where one rank alone is short of memory."""

from __future__ import annotations

import re

import pytest
import torch

from compactdist.errors import ConfigMismatchError
from compactdist.wire import HEADER_NBYTES
from tests.group.kit import METHODS
from tests.group.lifecycle import kit
from tests.launch import run_ranks
from tests.lockstep import compare

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")

ONE = 4 * kit.N  # bytes of one history


@pytest.mark.parametrize("short_rank", [0, 1, None])
def test_all_gather_beyond_one_ranks_budget_passes_on_all(short_rank):
    def body(rank, world_size):
        budget = 3 * ONE + 100
        short = {"state_budget_bytes": budget} if short_rank is None else {}
        with kit.wrap_short(rank == short_rank, budget, **short) as dist:
            for t in range(5):
                dist.step()
                for name in ("first", "second"):
                    with dist.key(name):
                        x = kit.tensor(rank, t)
                        out = kit.gather(dist, x)
                        exact = kit.gather_exact(x)
                        assert torch.equal(out, exact) == (t > 0 and name == "second")  # a keyframe says so
                assert short_rank not in (rank, None) or dist.stats().state_bytes <= budget
            first, second = dist.stats().sites.values()
            assert (first.calls, first.keyframes, first.passed) == (5, 1, {})
            assert (second.calls, second.keyframes, second.passed) == (1, 1, {"state-budget": 4})
            assert "4 x state-budget" in dist.explain()
            assert dist.stats().passed_reasons == {"state-budget": 4}
            return kit.finish(dist)

    compare.check(run_ranks(body, world_size=3))


@pytest.mark.parametrize("budgets", [[1000, 1000, 2000], [None, 0, 0]])
def test_ranks_with_different_budgets_are_told_before_a_byte_moves(budgets):
    def body(rank, world_size):
        sent, group = [], torch.distributed.ProcessGroup
        with pytest.MonkeyPatch.context() as spy:
            for name in METHODS:
                if hasattr(group, name):
                    spy.setattr(group, name, lambda *_, name=name: sent.append(name))
            with pytest.raises(ConfigMismatchError) as info:
                kit.wrap(state_budget_bytes=budgets[rank])
            assert not sent
            torch.distributed.group.WORLD.allreduce([torch.zeros(1)])
            assert sent == ["allreduce"]
        said = re.sub("group '.*?': ", "", str(info.value))
        others = [r for r in range(world_size) if budgets[r] != budgets[rank]]  # whichever has posted first
        named = [r for r in others if said.startswith(f"ranks {rank} and {r} asked wrap() for different things")]
        assert len(named) == 1, said
        assert f"state_budget_bytes: {budgets[rank]} here, {budgets[named[0]]} on rank {named[0]}" in said
        assert "Give all ranks the same options and versions (as state_budget_bytes, what the rank with" in said
        offloads = ", and either all of them or none state_offload: a rank with it drops nothing, so None is said"
        more = offloads * (None in (budgets[rank], budgets[named[0]]))
        assert said.endswith(f"the least memory can spare){more}; nothing was sent and the group is as it was")

    run_ranks(body, world_size=3)


def test_a_quantized_state_makes_room_for_more_sites():
    def body(rank, world_size):
        one = kit.N + 2 * kit.N // 128
        with kit.wrap(state_budget_bytes=3 * 2 * one, state="int8") as dist:
            for t in range(3):
                dist.step()
                for name in ("a", "b", "c", "d"):
                    with dist.key(name):
                        kit.gather(dist, kit.tensor(rank, t))
            assert dist.stats().state_bytes == 3 * 2 * one < 2 * ONE
            assert [bool(site.passed) for site in dist.stats().sites.values()] == [False, False, False, True]
            return kit.finish(dist)

    compare.check(run_ranks(body))


def test_reset_makes_room_again():
    def body(rank, world_size):
        with kit.wrap(state_budget_bytes=2 * ONE) as dist:
            for name in ("a", "b"):
                for t in range(3):
                    dist.step()
                    with dist.key(name):
                        kit.gather(dist, kit.tensor(rank, t))
                dist.reset()
            assert dist.stats().passed_reasons == {}

    run_ranks(body)


@pytest.mark.parametrize("short_rank", [0, 1, 2])
def test_all_to_all_refuses_pairs_of_the_short_rank(short_rank):
    def body(rank, world_size):
        with kit.wrap_short(rank == short_rank, 2 * ONE) as dist:
            for t in range(4):
                dist.step()
                x, out = kit.tensor(rank, t, 3 * kit.N), torch.empty(3 * kit.N)
                exact = torch.empty(3 * kit.N)
                dist.all_to_all_single(out, x)
                torch.distributed.all_to_all_single(exact, x)
                assert kit.nmse(out, exact) < 1e-3
            site = dist._engine.store.site("all_to_all#0")
            if rank == short_rank:
                assert len(site.refused) == 1
                assert dist.stats().state_bytes == 2 * ONE
            return kit.finish(dist), rank, site.refused

    results = run_ranks(body, world_size=3)
    compare.check([held for held, _, _ in results])
    refused = {(rank, peer) for _, rank, peers in results for peer in peers}
    assert refused == {(b, a) for a, b in refused}, "both ends of a pair refuse"
    assert len(refused) == 2


def test_send_beyond_the_senders_budget():
    def body(rank, world_size):
        with kit.wrap_short(rank == 0, ONE) as dist:
            for t in range(4):
                dist.step()
                for tag in (0, 1):
                    y = torch.empty(kit.N)
                    if rank == 0:
                        dist.send(kit.tensor(tag, t), 1, tag=tag)
                    else:
                        dist.recv(y, 0, tag=tag)
                        assert torch.equal(y, kit.tensor(tag, t)) == (tag == 1)
            if rank == 0:
                stats = dist.stats()
                assert stats.state_bytes == ONE
                assert stats.sites["send/0>1/t1#0"].passed == {"state-budget-pair": 4}
                assert stats.sites["send/0>1/t1#0"].raw_bytes == 4 * ONE
                assert stats.sites["send/0>1/t1#0"].wire_bytes == 4 * (ONE + HEADER_NBYTES)
            return kit.finish(dist)

    compare.check(run_ranks(body))


def test_a_message_received_after_the_reset_takes_no_budget():
    def body(rank, world_size):
        with kit.wrap(state_budget_bytes=2 * ONE) as dist:
            dist.step()
            y = torch.empty(kit.N)
            work = dist.isend(kit.tensor(0), 1) if rank == 0 else dist.irecv(y, 0)
            torch.distributed.barrier()
            dist.reset()
            work.wait()
            assert rank == 0 or kit.nmse(y, kit.tensor(0)) < 1e-3
            for t in range(2):
                dist.step()
                kit.gather(dist, kit.tensor(rank, t))
            stats = dist.stats()
            assert (stats.passed_reasons, stats.state_bytes) == ({}, 2 * ONE)
            return kit.finish(dist)

    compare.check(run_ranks(body))


def test_uneven_exchanges_beyond_the_budget_say_why_no_site_makes_room():
    def body(rank, world_size):
        sizes = [[500, 900], [700, 500]]
        with kit.wrap(codec="int8", min_numel=1, state_budget_bytes=2 * ONE) as dist:
            for t in range(3):
                dist.step()
                with dist.key("a"):
                    kit.gather(dist, kit.tensor(rank, t))
            for t in range(3, 6):
                dist.step()
                arriving = [sizes[sender][rank] for sender in range(world_size)]
                out = torch.empty(sum(arriving))
                x = [kit.tensor(r, t, sum(sizes[r])) for r in range(world_size)]
                dist.all_to_all_single(out, x[rank], arriving, sizes[rank])
                expected = torch.cat([x[r].split(sizes[r])[rank] for r in range(world_size)])
                assert kit.nmse(out, expected) < 1e-3
            stats = dist.stats()
            assert stats.passed_reasons == {"state-budget-pair": 2}
            assert (stats.evictions, stats.state_bytes) == (0, 2 * ONE)
            said = " ".join(dist.explain().split())
            assert "2 x state-budget-pair" in said
            assert "no site makes room: only two ranks know these bytes" in said

    run_ranks(body)


def test_broadcast_beyond_the_roots_budget():
    def body(rank, world_size):
        with kit.wrap_short(rank == 1, ONE) as dist:
            for t in range(4):
                dist.step()
                for name in ("a", "b"):
                    with dist.key(name):
                        x = kit.tensor(1, t) if rank == 1 else torch.empty(kit.N)
                        dist.broadcast(x, src=1)
                        assert torch.equal(x, kit.tensor(1, t)) == (rank == 1 or (name == "b" and t > 0))
            assert dist.stats().sites["b/broadcast/1#0"].passed == {"state-budget": 3}
            return kit.finish(dist)

    compare.check(run_ranks(body, world_size=3))


def test_budget_zero_keeps_nothing():
    def body(rank, world_size):
        with kit.wrap(state_budget_bytes=0) as dist:
            for t in range(3):
                dist.step()
                x = kit.tensor(rank, t)
                assert torch.equal(kit.gather(dist, x), kit.gather_exact(x)) == (t > 0)  # the first is a coded keyframe
                assert dist.stats().state_bytes == 0

    run_ranks(body)


def test_order_zero_needs_no_budget():
    def body(rank, world_size):
        with kit.wrap(state_budget_bytes=0, order=0) as dist:
            for t in range(3):
                dist.step()
                kit.gather(dist, kit.tensor(rank, t))
            assert dist.stats().passed_reasons == {}
            assert kit.keyframes(dist) == {"all_gather#0": (3, 1)}

    run_ranks(body)


def test_chunks_of_odd_bytes_beside_refused_pairs():
    """Refused pairs travel as plain bytes in the same exchange as frames, at offsets that are multiples of nothing."""

    def body(rank, world_size):
        n = 2003  # 4006 bytes in bfloat16
        with kit.wrap_short(rank == 0, 0, codec="int8", keyframe="raw") as dist:
            for t in range(4):
                dist.step()
                x = torch.cat([kit.tensor(10 * rank + peer, t, n, torch.bfloat16) for peer in range(world_size)])
                out = torch.empty_like(x)
                dist.all_to_all_single(out, x)
                for peer, chunk in enumerate(out.split(n)):
                    exact = kit.tensor(10 * peer + rank, t, n, torch.bfloat16)
                    if rank == 0 or peer in (0, rank):
                        assert torch.equal(chunk, exact)
                    else:
                        assert kit.nmse(chunk, exact) < 1e-3
            (site,) = dist.stats().sites.values()
            if rank == 0:
                assert (site.calls, site.passed) == (1, {"state-budget": 3})
                assert site.wire_bytes == 2 * (n * 2 + 10 + HEADER_NBYTES) + 3 * 2 * n * 2, "padding of keyframes only"
            else:
                assert (site.calls, site.passed) == (4, {})

    run_ranks(body, world_size=3)
