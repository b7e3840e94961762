"""state_budget_bytes evicts the sites used least recently, on all ranks at the same call."""

from __future__ import annotations

import contextlib

import pytest
import torch

from compactdist import Layout, Rule
from compactdist.errors import BadOutputError, NonFiniteError
from tests.group.lifecycle import kit
from tests.launch import run_ranks
from tests.lockstep import compare

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")

ONE = 4 * kit.N  # bytes of one history


def _steps(dist, name, rank, steps, exchange=kit.gather):
    outs = []
    for t in steps:
        dist.step()
        with dist.key(name):
            outs.append(exchange(dist, kit.tensor(rank, t)))
    return outs


def _swap(dist, x):
    out = torch.empty_like(x)
    dist.all_to_all_single(out, x)
    return out


def test_an_idle_site_makes_room_and_begins_anew_when_it_returns():
    """What an evicted site sends is, to the bit, what a fresh group would send."""

    def body(rank, world_size):
        with kit.wrap(warmup_steps=0, state_budget_bytes=2 * ONE) as dist:
            _steps(dist, "a", rank, range(3))
            assert dist.stats().state_bytes == 2 * ONE
            _steps(dist, "b", rank, range(3), _swap)
            assert kit.keys_of(dist) == ["b/all_to_all#0"], "the memory of a is freed"
            assert dist.stats().state_bytes == ONE
            back = _steps(dist, "a", rank, range(3, 7))
            dist.check()
            assert dist.stats().state_bytes == 2 * ONE
            stats = dist.stats()
            a, b = stats.sites["a/all_gather#0"], stats.sites["b/all_to_all#0"]
            assert (a.evictions, b.evictions, stats.evictions) == (1, 1, 2)
            assert (b.calls, b.keyframes, b.passed) == (3, 1, {})
            assert (a.calls, a.keyframes, a.passed) == (7, 3, {})
            assert "evicted: 1 x to make room for other sites" in dist.explain()
            assert dist.explain().split()[-2:] == ["2", "evictions"]
            held = kit.finish(dist)
        with kit.wrap(warmup_steps=0) as fresh:
            again = _steps(fresh, "a", rank, range(4, 7))
        assert all(torch.equal(x, y) for x, y in zip(back[1:], again, strict=True))
        return held

    compare.check(run_ranks(body))


def test_a_server_alternates_requests_within_its_budget():
    def body(rank, world_size):
        with kit.wrap(state_budget_bytes=4 * ONE) as dist:
            for name in ("one", "two", "three"):
                request = dist.request(name)  # it never ends: nobody told the group that its client has gone
                for t in range(4):
                    with request.resume():
                        dist.step()
                        for _ in range(2):
                            kit.gather(dist, kit.tensor(rank, t))
                    assert dist.stats().state_bytes <= 4 * ONE
            stats = dist.stats()
            assert (stats.evictions, stats.sites["request:three/all_gather#0"].calls) == (4, 4)
            dist.reset()
            _steps(dist, "a", rank, range(2))
            stats = dist.stats()
            assert (stats.evictions, stats.state_bytes) == (4, 2 * ONE), "the reset made room"
            return kit.finish(dist)

    compare.check(run_ranks(body))


def _start(dist, name, rank, t):
    x = kit.tensor(rank, t)
    out = torch.empty(dist.size() * kit.N)
    with dist.key(name):
        work = dist.all_gather_into_tensor(out, x, async_op=True)
    expected = torch.cat([kit.tensor(r, t) for r in range(dist.size())])
    return work, out, expected


def test_sites_in_flight_become_victims_and_works_are_waited_for_in_any_order():
    def body(rank, world_size):
        with kit.wrap(codec="int8", state_budget_bytes=2 * world_size * ONE, warmup_steps=0) as dist:
            for t in range(4):
                first, second = f"a{t}", f"b{t}"
                dist.step()
                under_way = [_start(dist, name, rank, t) for name in (first, second)]
                sites = [dist._engine.store.known[f"{name}/all_gather#0"] for name in (first, second)]
                dist.step()
                under_way += [_start(dist, f"{name}{t}", rank, t) for name in ("e", "f")]
                assert kit.keys_of(dist) == [f"e{t}/all_gather#0", f"f{t}/all_gather#0"], "the others are evicted"
                assert all(site.pending for site in sites), "while their exchanges were under way"
                for i in [(3, 0, 2, 1), (0, 1, 2, 3), (1, 3, 0, 2)][(rank + t) % 3]:
                    work, out, expected = under_way[i]
                    work.wait()
                    assert kit.nmse(out, expected) < 3e-4
                assert not any(site.pending for site in sites)
                assert dist.stats().state_bytes == 2 * world_size * ONE
            dist.check()
            assert dist.stats().evictions == 4 * 2 + 3 * 2
            return kit.finish(dist)

    compare.check(run_ranks(body, world_size=3))


def test_compressed_sums_evict_and_return():
    policy = [Rule(op="all_reduce", codec="int8"), Rule(op="reduce_scatter", codec="int8")]
    n = 3 * kit.N

    def sums(dist, rank, steps):
        for t in steps:
            dist.step()
            with dist.key("sum"):
                dist.all_reduce(x := kit.tensor(rank, t, n))
            assert kit.nmse(x, sum(kit.tensor(r, t, n) for r in range(3))) < 3e-4

    def body(rank, world_size):
        both_legs, scattered = 4 * ONE + 3 * ONE, 4 * ONE
        with kit.wrap(policy=policy, warmup_steps=0, state_budget_bytes=both_legs) as dist:
            sums(dist, rank, range(2))
            assert dist.stats().state_bytes == both_legs
            for t in range(2, 4):
                dist.step()
                with dist.key("part"):
                    dist.reduce_scatter_tensor(out := torch.empty(kit.N), kit.tensor(rank, t, n))
                expected = sum(kit.tensor(r, t, n) for r in range(3)).chunk(3)[rank]
                assert kit.nmse(out, expected) < 3e-4
            # one leg made room, the other still has its own
            assert kit.keys_of(dist) == ["sum/all_reduce/sums#0", "part/reduce_scatter#0"]
            assert dist.stats().state_bytes == 3 * ONE + scattered
            sums(dist, rank, range(4, 7))
            stats = dist.stats()
            assert (stats.evictions, stats.state_bytes) == (2, both_legs)
            # the first of its three calls found no site that had stood idle since, and said so in a keyframe
            assert kit.keyframes(dist)["sum/all_reduce#0"] == (5, 3)
            assert kit.keyframes(dist)["sum/all_reduce/sums#0"] == (5, 1)
            assert stats.passed_reasons == {}
            dist.check()
            return kit.finish(dist)

    compare.check(run_ranks(body, world_size=3))


def test_requests_end_and_groups_are_reset_in_the_midst_of_evictions():
    def body(rank, world_size):
        with kit.wrap(state_budget_bytes=4 * ONE) as dist:
            book = dist._engine.ledger

            def go_on(request, sites=2):
                with request.resume():
                    dist.step()
                    for _ in range(sites):
                        kit.gather(dist, kit.tensor(rank, 0))

            first, second = dist.request("first"), dist.request("second")
            go_on(first)
            for _ in range(2):
                go_on(second, sites=1)
            assert list(book.held()) == ["request:first/all_gather#1", "request:second/all_gather#0"]
            first.end()  # one of its sites was evicted before, the other was not
            assert list(book.held()) == ["request:second/all_gather#0"]
            assert dist.stats().state_bytes == 2 * ONE
            first = dist.request("first")
            go_on(first, sites=1)
            assert dist.stats().evictions == 1, "the end made room"
            for _ in range(2):
                go_on(first)
            assert list(book.held()) == [f"request:first/all_gather#{n}" for n in (0, 1)]
            dist.step()
            work, out, expected = _start(dist, "late", rank, 0)  # evicts, and is under way at the reset
            dist.reset()
            assert book.held() == {}
            work.wait()
            assert kit.nmse(out, expected) < 1e-2
            assert (dist.stats().state_bytes, dist._engine.store._reserved) == (0, 0)
            go_on(first)
            go_on(second, sites=1)
            assert dist.stats().evictions == 3, "nobody is known to have been evicted, and none is in its first step"
            second.end()
            first.end()
            first.end()
            assert (book.held(), dist.stats().state_bytes, dist._engine.store._reserved) == ({}, 0, 0)
            assert dist.stats().evictions == 3, "ended requests are still counted"
            return kit.finish(dist)

    compare.check(run_ranks(body))


def test_a_predicted_site_is_evicted_and_what_came_late_is_reported_once():
    """Rank 0 sends NaN; the others learn of it when the site is evicted, make that call again, and all go on."""

    def body(rank, world_size):
        with kit.wrap(codec="int8", mode="predict-now", warmup_steps=0, state_budget_bytes=world_size * ONE) as dist:
            request = dist.request("other")
            with request.resume():
                for _ in range(3):
                    dist.step()
            for t in range(2):
                dist.step()
                with dist.key("a"):
                    x = kit.tensor(rank, t)
                    if t == 1 and rank == 0:
                        x[5] = float("nan")
                        with pytest.raises(NonFiniteError):
                            kit.gather(dist, x)
                    else:
                        kit.gather(dist, x)
            with request.resume(), dist.key("b"):
                if rank != 0:
                    with pytest.raises(NonFiniteError, match="a/all_gather"):
                        kit.gather(dist, kit.tensor(rank, 1))
                for t in range(1, 4):
                    out = kit.gather(dist, kit.tensor(rank, t))
                    expected = torch.cat([kit.tensor(r, max(t - 1, 1)) for r in range(world_size)])
                    assert kit.nmse(out[rank * kit.N :][: kit.N], kit.tensor(rank, t)) < 3e-4
                    if t > 1:
                        assert dist.stats().sites["request:other/b/all_gather#0"].predicted == t - 1
                    assert kit.nmse(out, expected) < 1e-2
                    dist.step()
            back = _steps(dist, "a", rank, range(5, 8))
            dist.check()
            assert kit.nmse(back[-1], kit.gather_exact(kit.tensor(rank, 7))) < 1e-1
            stats = dist.stats()
            assert [stats.sites[key].evictions for key in ("a/all_gather#0", "request:other/b/all_gather#0")] == [1, 1]
            return kit.finish(dist)

    compare.check(run_ranks(body, world_size=3))


def test_all_that_are_evicted_at_once_are_waited_for_whatever_one_of_them_met():
    """Rank 0 has sent NaN at the first of two sites that are answered with their predictions."""

    def body(rank, world_size):
        options = {"mode": "predict-now", "warmup_steps": 0, "state_budget_bytes": 2 * world_size * ONE}
        with kit.wrap(codec="int8", **options) as dist:
            request = dist.request("other")
            with request.resume():
                dist.step()
            for t in range(2):
                dist.step()
                for name in "ab":
                    x = kit.tensor(rank, t)
                    is_bad = (name, t, rank) == ("a", 1, 0)
                    if is_bad:
                        x[5] = float("nan")
                    with dist.key(name), pytest.raises(NonFiniteError) if is_bad else contextlib.nullcontext():
                        kit.gather(dist, x)
            big = kit.tensor(rank, 1, 2 * kit.N)
            with request.resume(), dist.key("c"):
                if rank != 0:
                    with pytest.raises(NonFiniteError, match="a/all_gather"):
                        kit.gather(dist, big)
                    assert not dist._engine.late._jobs
                kit.gather(dist, big)
            sites = dist.stats().sites
            assert [sites[f"{name}/all_gather#0"].evictions for name in "ab"] == [1, 1]
            dist.check()
            return kit.finish(dist)

    compare.check(run_ranks(body))


def test_two_groups_have_a_budget_each():
    def body(rank, world_size):
        other = torch.distributed.new_group([0, 1])
        with kit.wrap(state_budget_bytes=2 * ONE) as one, kit.wrap(group=other, state_budget_bytes=4 * ONE) as two:
            for t in range(6):
                works = []
                for dist in (one, two):
                    dist.step()
                    works += [_start(dist, name, rank, t) for name in ("ab"[t % 2], "always")[: 1 + (dist is two)]]
                for work, out, expected in reversed(works):
                    work.wait()
                    assert kit.nmse(out, expected) < 1e-2
            counts = [{key: site.evictions for key, site in dist.stats().sites.items()} for dist in (one, two)]
            assert counts[0]["b/all_gather#0"] + counts[0]["a/all_gather#0"] == one.stats().evictions > 0
            assert counts[1]["always/all_gather#0"] == 0
            assert two.stats().sites["always/all_gather#0"].passed == {}
            assert (one.stats().state_bytes, two.stats().state_bytes) == (2 * ONE, 4 * ONE)
            one.check()
            two.check()
            return kit.finish(one), kit.finish(two)

    for held in zip(*run_ranks(body), strict=True):
        compare.check(list(held))


def test_broadcasts_make_room_for_one_another():
    def body(rank, world_size):
        with kit.wrap(codec="int8", state_budget_bytes=2 * ONE, error_feedback=False) as dist:
            book = dist._engine.ledger
            for t in range(6):
                root = t // 3
                dist.step()
                dist.broadcast(x := kit.tensor(rank, t), src=root)
                assert kit.nmse(x, kit.tensor(root, t)) < 3e-4
                assert book.held() == {f"broadcast/{root}#0": 2 * ONE}, "a sender without feedback holds twice as much"
                assert dist.stats().state_bytes == (2 * ONE if rank == root else ONE)
            stats = dist.stats()
            assert (stats.passed_reasons, stats.evictions) == ({}, 1)
            return kit.finish(dist)

    compare.check(run_ranks(body, world_size=3))


def test_a_site_whose_shape_varies_gives_its_room_back():
    def body(rank, world_size):
        with kit.wrap(codec="int8", state_budget_bytes=2 * ONE, warmup_steps=0) as dist:
            for t in range(11):
                dist.step()
                with dist.key("varies"):
                    kit.gather(dist, kit.tensor(rank, t, kit.N - 16 * t))
            assert dist.stats().passed_reasons == {"shape-varies": 2}
            assert (dist.stats().state_bytes, dist._engine.ledger.held()) == (0, {})
            _steps(dist, "a", rank, range(2))
            assert (dist.stats().state_bytes, dist.stats().evictions) == (2 * ONE, 0)
            return kit.finish(dist)

    compare.check(run_ranks(body))


def test_a_call_that_one_rank_makes_again_counts_once():
    """Else rank 1 would count a call too many of its site, and evict the other site a call too early."""

    def body(rank, world_size):
        with kit.wrap(state_budget_bytes=2 * ONE, warmup_steps=0) as dist:
            for t, name in enumerate("abaabbaaa"):
                dist.step()
                with dist.key(name):
                    if (rank, t) == (1, 6):
                        with pytest.raises(BadOutputError):
                            dist.all_gather([torch.empty(1)] * world_size, kit.tensor(rank, t))
                    kit.gather(dist, kit.tensor(rank, t))
                assert list(dist._engine.ledger.held()) == [f"{'abbaabbba'[t]}/all_gather#0"]
            dist.check()
            return kit.finish(dist)

    compare.check(run_ranks(body))


@pytest.mark.parametrize("by_pair", [False, True])
def test_what_a_codec_learns_is_booked_as_it_is_reserved(by_pair):
    """Else a site would have room in the book, evict others for it, and then be refused."""

    def hint(call):
        wide = by_pair and (call.source, call.target) == (0, 1)
        return Layout("(n c) -> 1 n c", c=64 if wide else 16)

    def body(rank, world_size):
        n = world_size * kit.N
        one = 2 * (world_size - 1) * (ONE + 260 * (64 if by_pair else 16))
        with kit.wrap(codec="transform", layouts=hint, warmup_steps=0, state_budget_bytes=2 * one) as dist:
            book, store = dist._engine.ledger, dist._engine.store
            for t in range(12):
                dist.step()
                with dist.key("abc"[t // 4]):
                    _swap(dist, kit.tensor(rank, t, n))
                held = book.held()
                for site in store.sites():
                    reserved = sum(nbytes for _, nbytes in site.reserved.values())
                    assert site.state_bytes <= reserved <= held[site.key] <= one
                    assert by_pair or reserved == held[site.key]
            stats = dist.stats()
            assert (stats.passed_reasons, stats.evictions, len(held)) == ({}, 1, 2)
            dist.check()
            return kit.finish(dist)

    compare.check(run_ranks(body, world_size=3))
