"""Ranks agree on plans through the store: what it costs, whom it makes wait, and what it leaves there."""

from __future__ import annotations

import datetime
import functools
import logging
import re
import threading
import time

import pytest
import torch
import torch.distributed
import torch.distributed as plain

import compactdist
from compactdist.errors import PlanMismatchError, PlanTimeoutError
from compactdist.group.agreement import _MOST_LEFT, Agreement, Subject
from tests.group.lifecycle import kit
from tests.launch import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")


def in_a_process(test):
    """Run a test in a process of its own: stores have threads, which must not be there when other tests fork."""

    @functools.wraps(test)
    def run(*args, **kwargs):
        def body(rank, world):
            test(*args, **kwargs)

        run_ranks(body, world_size=1, init=False, timeout=110)

    return run


def together(size, work, timeout=60.0):
    """``work(agreement, rank, store)`` in a thread for each of ``size`` ranks; results or errors by rank."""
    store = plain.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    results: list = [None] * size

    def run(rank):
        own = plain.TCPStore("127.0.0.1", store.port, is_master=False, wait_for_workers=False)
        try:
            results[rank] = work(Agreement(own, "here", rank, size, f"rank {rank}", timeout), rank, own)
        except BaseException as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100)
        assert not thread.is_alive()
    return results, store


@pytest.mark.parametrize("size", [2, 16])
@in_a_process
def test_many_agreements_leave_a_constant_number_of_keys(size):
    epochs, each = (50, 20) if size == 2 else (5, 20)

    def work(agreement, rank, store):
        counts = []
        for epoch in range(epochs):
            for n in range(each):
                agreement.agree(Subject(epoch, {"site": f"{n}", "step": n}))
            counts.append(store.num_keys())
        agreement.close()
        return counts

    results, store = together(size, work)
    assert all(isinstance(r, list) for r in results), results
    assert max(max(counts) for counts in results) <= (2 + _MOST_LEFT) * size + 6
    # only what the store itself keeps is left
    assert store.num_keys() <= 2


@pytest.mark.slow
@in_a_process
def test_ten_thousand_agreements():
    def work(agreement, rank, store):
        for n in range(10_000):
            agreement.agree(Subject(0, {"site": f"{n}"}))
        return store.num_keys()

    results, _ = together(2, work)
    assert max(results) <= 2 * (2 + _MOST_LEFT) + 6, results


@in_a_process
def test_a_difference_raises_on_every_rank_and_names_it():
    def work(agreement, rank, store):
        agreement.agree(Subject(0, {"site": "a", "step": 0}))
        agreement.agree(Subject(0, {"site": "b", "step": 1 + (rank == 2), "tensor": "4 x float32"}))

    results, _ = together(3, work)
    for rank, error in enumerate(results):
        assert isinstance(error, PlanMismatchError), results
        if rank != 2:
            assert "step: 1 here, 2 on rank 2" in str(error)
            assert "this rank missed a step()" in str(error)
        assert "reset() on all ranks" in str(error)


@in_a_process
def test_who_agrees_with_the_one_that_objected_is_told_of_the_other():
    """The first is in another epoch, the second objects, and the third does what the second does."""
    turns = [threading.Event() for _ in range(3)]

    def work(agreement, rank, store):
        if rank:
            turns[rank].wait(30)
        if rank == 0:
            threading.Timer(0.3, turns[1].set).start()
        try:
            agreement.agree(Subject(3 if rank == 0 else 1, {"site": "a", "step": 0, "epoch": 3 if rank == 0 else 1}))
        finally:
            if rank == 1:
                turns[2].set()

    results, _ = together(3, work)
    assert all(isinstance(error, PlanMismatchError) for error in results), results
    assert "epoch: 1 here, 3 on rank 0 (reset() was not called on all ranks)" in str(results[2])


@in_a_process
def test_after_an_error_a_new_epoch_is_agreed_on_again():
    """Two ranks differ, the third never comes; after the reset all three agree."""
    failed = threading.Barrier(3)

    def work(agreement, rank, store):
        agreement.agree(Subject(0, {"site": "a"}))
        if rank != 2:
            with pytest.raises((PlanMismatchError, PlanTimeoutError)):
                agreement.agree(Subject(0, {"site": f"b{rank}"}))
            with pytest.raises(PlanMismatchError, match="since the last reset"):
                agreement.refuse(0)
        failed.wait(30)
        for n in range(5):
            agreement.refuse(1)
            agreement.agree(Subject(1, {"site": f"{n}"}))
        return True

    results, _ = together(3, work)
    assert results == [True] * 3


@in_a_process
def test_a_rank_that_comes_after_the_others_gave_up():
    """What two ranks have given up at the same time, the third does not take for agreed on."""
    gave_up = threading.Barrier(3)

    def work(agreement, rank, store):
        agreement._timeout = 0.3
        if rank == 2:
            gave_up.wait(30)
        try:
            agreement.agree(Subject(0, {"site": "a"}))
        except (PlanMismatchError, PlanTimeoutError) as error:
            return type(error), str(error)
        finally:
            if rank != 2:
                gave_up.wait(30)

    results, _ = together(3, work)
    *before, (kind, text) = results
    assert PlanTimeoutError in [kind for kind, _ in before], results
    assert kind is PlanMismatchError
    assert re.search("ranks have not agreed: rank [01] has waited for it in vain", text), text


@in_a_process
def test_who_does_not_come_is_named(caplog):
    def work(agreement, rank, store):
        agreement.agree(Subject(0, {"site": "first", "step": 7}))
        agreement._timeout = 1.0
        if rank == 0:
            agreement.agree(Subject(0, {"site": "second", "step": 8}))

    results, _ = together(2, work)
    assert isinstance(results[0], PlanTimeoutError)
    for word in ("second", "missing: rank 1", "first", "step 7", "reset() on all ranks"):
        assert word in str(results[0])


@in_a_process
def test_pairs_are_compared():
    def work(agreement, rank, store):
        pairs = [("", ""), ("3 elements", "5 elements")] if rank == 0 else [("4 elements", "3 elements"), ("", "")]
        agreement.agree(Subject(0, {"site": "a"}, pairs))

    results, _ = together(2, work)
    for error in results:
        assert isinstance(error, PlanMismatchError)
        assert "rank 1 sends 4 elements to rank 0, which expects 5 elements" in str(error)


def agreements(dist):
    return dist._agreement._number


def step_of(dist, rank, step, sites=3):
    dist.step()
    for _ in range(sites):
        kit.gather(dist, kit.tensor(rank, step))
    dist.all_to_all_single(torch.empty(2 * kit.N), kit.tensor(rank, step, 2 * kit.N))
    dist.broadcast(kit.tensor(rank, step), src=0)


@pytest.mark.parametrize("warmup_steps", [0, 1, 3])
def test_steady_calls_agree_on_nothing(warmup_steps):
    """Once for each site, once at the end of the warm-up, once after a reset."""

    def body(rank, world):
        with kit.wrap(warmup_steps=warmup_steps) as dist:
            counts = []
            for step in range(5):
                step_of(dist, rank, step)
                counts.append(agreements(dist))
            # one for each site, and one on the gloo group that frames travel on
            expected = [6 + (0 < warmup_steps <= step) for step in range(5)]
            assert counts == expected, counts
            dist.reset()
            for step in range(5):
                step_of(dist, rank, step)
            assert agreements(dist) == (2 if warmup_steps else 1)
            assert dist.stats().compressed_calls == 50

    run_ranks(body)


def test_requests_agree_once_each():
    def body(rank, world):
        with kit.wrap() as dist:
            for n in range(4):
                before = agreements(dist)
                with dist.request(str(n)):
                    for step in range(3):
                        step_of(dist, rank, step)
                assert agreements(dist) - before == (7 if n == 0 else 2)
            assert len(dist._plans._stages) == 0

    run_ranks(body)


def test_an_asynchronous_call_does_not_wait_for_a_peer_that_waits_for_a_message():
    """Rank 1 receives first and gathers then; rank 0 gathers first, without waiting, and sends then."""

    def body(rank, world):
        with kit.wrap(codec="int8") as dist:
            for step in range(3):
                dist.step()
                x, out, y = kit.tensor(rank, step), torch.empty(2 * kit.N), torch.empty(kit.N)
                if rank == 0:
                    work = dist.all_gather_into_tensor(out, x, async_op=True)
                    dist.send(x, 1)
                else:
                    dist.recv(y, 0)
                    assert kit.nmse(y, kit.tensor(0, step)) < 1e-3
                    work = dist.all_gather_into_tensor(out, x, async_op=True)
                work.wait()
                for peer in range(2):
                    assert kit.nmse(out[peer * kit.N :][: kit.N], kit.tensor(peer, step)) < 1e-3
            dist.check()

    run_ranks(body)


@pytest.mark.parametrize("op", ["gather", "broadcast", "all_to_all"])
def test_asynchronous_calls_of_two_groups_in_opposite_order(op):
    def call(dist, rank, step):
        x, out = kit.tensor(rank, step), torch.empty(2 * kit.N)
        if op == "gather":
            return dist.all_gather_into_tensor(out, x, async_op=True)
        if op == "broadcast":
            return dist.broadcast(x, src=0, async_op=True)
        return dist.all_to_all_single(out, kit.tensor(rank, step, 2 * kit.N), async_op=True)

    def body(rank, world):
        groups = [compactdist.wrap(plain.new_group([0, 1]), codec="int8") for _ in range(2)]
        for step in range(3):
            works = {}
            for n in (0, 1) if rank else (1, 0):
                groups[n].step()
                works[n] = call(groups[n], rank, step)
            for n in range(2):
                works[n].wait()
        for dist in groups:
            assert dist.stats().compressed_calls == 3
            dist.check()
            dist.close()

    run_ranks(body)


def test_later_collectives_do_not_overtake_one_that_waits_for_an_agreement():
    """Rank 1 comes late to the first gather. Rank 0 has issued three more calls by then, in order."""

    def body(rank, world):
        with kit.wrap(codec="int8") as dist:
            for step in range(2):
                dist.step()
                if rank == 1:
                    time.sleep(0.3)
                outs = [torch.empty(2 * kit.N) for _ in range(2)]
                works = [dist.all_gather_into_tensor(out, kit.tensor(rank, step), async_op=True) for out in outs]
                total = torch.full((4,), float(rank + 1))
                dist.all_reduce(total)  # passes through
                flags = [torch.empty(4) for _ in range(2)]
                dist.all_gather(flags, torch.full((4,), float(rank)))  # passes through: it is small
                assert total.tolist() == [3.0] * 4
                assert [f[0].item() for f in flags] == [0.0, 1.0]
                for work in works:
                    work.wait()
                for out in outs:
                    assert kit.nmse(out[: kit.N], kit.tensor(0, step)) < 1e-3
            dist.check()

    run_ranks(body)


def test_closing_with_a_call_that_cannot_leave():
    def body(rank, world):
        dist = kit.wrap()
        dist.step()
        if rank == 0:
            work = dist.all_gather_into_tensor(torch.empty(2 * kit.N), kit.tensor(rank), async_op=True)
            began = time.monotonic()
            dist.close()
            assert time.monotonic() - began < 20
            with pytest.raises(PlanTimeoutError):
                work.wait()
        else:
            dist.close()

    run_ranks(body)


def test_a_site_whose_shape_varies_passes_through_until_the_reset():
    def body(rank, world):
        with kit.wrap() as dist:
            for epoch in range(2):
                for step in range(14):
                    dist.step()
                    n = kit.N + 16 * step
                    out = kit.gather(dist, kit.tensor(rank, step, n))
                    assert kit.nmse(out[:n], kit.tensor(0, step, n)) < 1e-2
                # nine shapes, and passing through; at first the gloo group that frames travel on
                assert agreements(dist) == 10 + (epoch == 0), agreements(dist)
                passed = dist.stats().sites["all_gather#0"].passed
                assert passed == {"shape-varies": 5 * (epoch + 1)}, passed
                dist.reset()

    run_ranks(body)


def test_switching_between_training_and_inference():
    def body(rank, world):
        with kit.wrap() as dist:
            for step in range(6):
                dist.step()
                x = kit.tensor(rank, step).requires_grad_(step in (2, 3))
                dist.all_gather([torch.empty(kit.N) for _ in range(world)], x)
            assert dist.stats().sites["all_gather#0"].calls == 4
            assert agreements(dist) == 5, "first, frames' gloo group, end of warm-up, to training and back"

    run_ranks(body)


def test_a_tensor_that_requires_grad_on_one_rank_only():
    def body(rank, world):
        with kit.wrap(agree_timeout=2.0) as dist:
            for step in range(2):
                dist.step()
                kit.gather(dist, kit.tensor(rank, step))
            dist.step()
            x = kit.tensor(rank, 1).requires_grad_(rank == 0)
            with pytest.raises((PlanTimeoutError, RuntimeError)) as caught:
                dist.all_gather([torch.empty(kit.N) for _ in range(world)], x)
        return isinstance(caught.value, PlanTimeoutError)

    assert run_ranks(body, pg_timeout=4) == [True, False]


def test_it_can_be_switched_off():
    def body(rank, world):
        with kit.wrap(agree="off") as dist:
            assert dist._agreement is None
            for step in range(3):
                step_of(dist, rank, step)
            assert dist.stats().compressed_calls == 15

    run_ranks(body)


@in_a_process
def test_a_late_rank_is_warned_about(caplog, monkeypatch):
    monkeypatch.setattr("compactdist.group.agreement._WARN_SECONDS", 0.5)

    def work(agreement, rank, store):
        if rank == 1:
            time.sleep(2.5)
        agreement.agree(Subject(0, {"site": "a", "step": 3}))
        return True

    with caplog.at_level(logging.WARNING, "compactdist"):
        results, _ = together(2, work)
    assert results == [True, True]
    assert any("missing: rank 1" in record.message and "site 'a'" in record.message for record in caplog.records)


def uneven(dist, rank, sizes, step):
    """An all-to-all of chunks ``sizes[source][target]``; every rank checks what it got."""
    world = dist.size()
    leaving, arriving = sizes[rank], [sizes[source][rank] for source in range(world)]
    out = torch.empty(sum(arriving))
    dist.all_to_all_single(out, kit.tensor(rank, step, sum(leaving)), arriving, leaving)
    for source, chunk in enumerate(out.split(arriving)):
        sent = kit.tensor(source, step, sum(sizes[source])).split(sizes[source])[rank]
        assert not len(sent) or kit.nmse(chunk, sent) < 1e-2


def test_a_rank_whose_chunks_are_empty_at_first():
    """As with experts that get no token: what one rank sees change is nothing that the others could agree on."""

    def body(rank, world):
        with kit.wrap(codec="int8") as dist:
            for step in range(5):
                dist.step()
                n = 4000 if step > 1 else 0
                uneven(dist, rank, [[0, 4000, n], [4000, 0, 0], [n, 0, 0]], step)
            dist.check()

    run_ranks(body, world_size=3, pg_timeout=20)


def test_a_policy_for_one_pair_that_begins_later():
    def body(rank, world):
        with kit.wrap(codec="int8", policy=compactdist.Rule("int4", between=((0, 1),), first_step=2)) as dist:
            for step in range(5):
                dist.step()
                uneven(dist, rank, [[2048] * 3] * 3, step)
            dist.check()

    run_ranks(body, world_size=3, pg_timeout=20)


@in_a_process
def test_a_late_rank_does_not_end_what_the_others_agree_on_by_now():
    """Two ranks differ and begin a new epoch; the third comes to the old one only then."""

    def work(agreement, rank, store):
        if rank == 2:
            time.sleep(1.0)
        with pytest.raises(PlanMismatchError):
            agreement.agree(Subject(0, {"site": f"a{rank}"}))
        agreement.agree(Subject(1, {"site": "b"}))
        return True

    results, _ = together(3, work)
    assert results == [True] * 3


def test_differentiable_calls_after_one_that_waits_for_an_agreement():
    def body(rank, world):
        with kit.wrap(codec="int8", keyframe="raw") as dist:
            dist.step()
            if rank == 1:
                time.sleep(0.5)
            outs = [torch.empty(kit.N) for _ in range(world)]
            work = dist.all_gather(outs, kit.tensor(rank), async_op=True)
            dist.step()
            dist.all_gather([torch.empty(kit.N) for _ in range(world)], kit.tensor(rank).requires_grad_())
            work.wait()
            assert torch.equal(outs[1 - rank], kit.tensor(1 - rank))

    run_ranks(body, pg_timeout=20)


def test_a_request_that_ends_while_a_call_waits_for_an_agreement():
    def body(rank, world):
        with kit.wrap(codec="int8") as dist:
            for _ in range(3):
                with dist.request("same name"):
                    if rank == 1:
                        time.sleep(0.3)
                    dist.step()
                    work = dist.all_gather_into_tensor(torch.empty(2 * kit.N), kit.tensor(rank), async_op=True)
                work.wait()

    run_ranks(body, pg_timeout=20)


def test_waiting_again_after_a_wait_that_was_too_short():
    def body(rank, world):
        with kit.wrap(codec="int8", keyframe="raw") as dist:
            dist.step()
            if rank == 1:
                time.sleep(1.0)
            out = torch.empty(2 * kit.N)
            work = dist.all_gather_into_tensor(out, kit.tensor(rank), async_op=True)
            if rank == 0:
                with pytest.raises(TimeoutError, match="wait for it again"):
                    work.wait(datetime.timedelta(milliseconds=100))
            work.wait()
            assert torch.equal(out[kit.N :], kit.tensor(1))
            dist.check()

    run_ranks(body)


@in_a_process
def test_pairs_are_read_in_peace():
    """A rank that is through may begin the next agreement, of another epoch, while a slow one still compares pairs."""

    def work(agreement, rank, store):
        compare = agreement._compare_pairs

        def slowly(*args):
            time.sleep(0.1 * rank)
            compare(*args)

        agreement._compare_pairs = slowly
        pairs = [("", ""), ("a", "b")] if rank == 0 else [("b", "a"), ("", "")]
        for epoch in range(4):
            for n in range(3):
                agreement.agree(Subject(epoch, {"site": f"{n}"}, pairs if n else ()))
        agreement.agree(Subject(4, {"site": "without pairs"}))
        agreement.close()
        return True

    results, store = together(2, work)
    assert results == [True] * 2
    assert store.num_keys() <= 2
