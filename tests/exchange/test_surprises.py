"""Tensors that change entirely without notice, under a target for an error: keyframes that nobody was told of."""

from __future__ import annotations

import gc
import math
import time
import weakref

import pytest
import torch

import compactdist
from compactdist.policy import Rule
from tests.launch import run_ranks
from tests.quick import quick_rows

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")

STEPS, CHANGE, ROWS, CHANNELS = 6, 3, 48, 64
TARGET = -26


def _values(rank: int, *, changes: bool = True) -> list[torch.Tensor]:
    """A tensor for each step, which moves slowly but for one step."""
    g = torch.Generator().manual_seed(rank)
    made, x = [], torch.randn(ROWS, CHANNELS, generator=g)
    for step in range(STEPS):
        x = x + 0.05 * torch.randn(ROWS, CHANNELS, generator=g)
        if step == CHANGE and changes:
            x = torch.randn(ROWS, CHANNELS, generator=g)
        made.append(x.clone())
    return made


def _decibels(y: torch.Tensor, x: torch.Tensor) -> float:
    return 20 * math.log10(float((y - x).norm() / x.norm()))


def _calls(dist, op: str, x: torch.Tensor, others: list[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What arrives in one call, each beside what was sent; ``others``: what each rank has."""
    rank, size = dist.rank(), dist.size()
    if op in ("all_gather_into_tensor", "parts"):
        gathered = torch.empty(size * ROWS, CHANNELS)
        dist.all_gather_into_tensor(gathered, x)
        return list(zip(gathered.chunk(size), others, strict=True))
    if op == "all_gather":
        outputs = [torch.empty(ROWS, CHANNELS) for _ in range(size)]
        dist.all_gather(outputs, x)
        return list(zip(outputs, others, strict=True))
    if op == "all_to_all_single":
        swapped = torch.empty(ROWS, CHANNELS)
        dist.all_to_all_single(swapped, x)
        return [(swapped, torch.cat([other.chunk(size)[rank] for other in others]))]
    if op == "broadcast":
        sent = x.clone()
        dist.broadcast(sent, 1)
        return [(sent, others[1])]
    if op == "all_reduce":
        summed = x.clone()
        dist.all_reduce(summed)
        return [(summed, torch.stack(others).sum(0))]
    if op == "reduce_scatter_tensor":
        chunk = torch.empty(ROWS // size, CHANNELS)
        dist.reduce_scatter_tensor(chunk, x)
        return [(chunk, torch.stack(others).sum(0).chunk(size)[rank])]
    pairs, held, seen = [], x, []
    for hop in range(1, size):  # a ring: what came is sent on
        came = torch.empty(ROWS, CHANNELS)
        pairs = [
            torch.distributed.P2POp(torch.distributed.isend, held, (rank + 1) % size, group=dist),
            torch.distributed.P2POp(torch.distributed.irecv, came, (rank - 1) % size, group=dist),
        ]
        for work in torch.distributed.batch_isend_irecv(pairs):
            work.wait()
        seen.append((came, others[(rank - hop) % size]))
        held = came
    return seen


OPS = (
    "all_gather_into_tensor",
    "all_gather",
    "parts",
    "all_to_all_single",
    "broadcast",
    "all_reduce",
    "reduce_scatter_tensor",
    "ring",
)


@pytest.mark.parametrize(
    ("op", "order"), quick_rows([(op, 1) for op in OPS], [(op, order) for op in OPS for order in (1, 2, "auto")])
)
def test_the_step_of_the_change_meets_the_target(op, order):
    def body(rank, size):
        everyones = [_values(peer, changes=peer < 2) for peer in range(size)]  # the third rank's goes on
        options = {"parts": 2} if op == "parts" else {}
        if "reduce" in op:
            options["policy"] = [Rule(codec="rates")]
        with compactdist.wrap(target=f"nmse_db={TARGET}", min_numel=64, order=order, **options) as dist:
            sent = []
            for step in range(STEPS):
                before = dist.stats().wire_bytes
                with dist.step():
                    seen = _calls(dist, op, everyones[rank][step], [values[step] for values in everyones])
                sent.append(dist.stats().wire_bytes - before)
                if step == CHANGE:  # 10 to 20 decibels above the target without a keyframe
                    for y, x in seen:
                        assert torch.equal(y, x) or _decibels(y, x) < TARGET + 1
            dist.check()
            if rank < 2 and not (op == "broadcast" and rank != 1):
                # the keyframe is counted; the ring's rank 0 passes on what the third rank has
                assert sent[CHANGE] > (0.5 if op == "ring" else 0.9) * sent[0]
                assert max(sent[CHANGE + 1 :]) < sent[CHANGE]
            assert dist._engine.behind.join(5), "what follows a stand-in is kept until it was received"

    run_ranks(body, 3)


def test_ranks_may_wait_in_any_order():
    """Each frame that follows goes from one rank to another: no other rank has to be there at that moment."""

    def body(rank, size):
        everyones = [[_values(10 * site + peer) for peer in range(size)] for site in range(3)]
        outputs = [torch.empty(size * ROWS, CHANNELS) for _ in range(3)]
        with compactdist.wrap(target=f"nmse_db={TARGET}", min_numel=64) as dist:
            for step in range(STEPS):
                with dist.step():
                    works = [
                        dist.all_gather_into_tensor(out, values[rank][step], async_op=True)
                        for out, values in zip(outputs, everyones, strict=True)
                    ]
                    for number in range(3):
                        works[(number + rank) % 3 if rank else 2 - number].wait()
                for out, values in zip(outputs, everyones, strict=True):
                    for chunk, theirs in zip(out.chunk(size), values, strict=True):
                        assert _decibels(chunk, theirs[step]) < TARGET + 9
            dist.check()

    run_ranks(body, 3)


def test_a_rank_that_a_broadcast_reaches_through_others_may_be_late():
    """Of four ranks gloo's root serves two; it knows nothing of the last one."""

    def body(rank, size):
        values = _values(0)
        with compactdist.wrap(target=f"nmse_db={TARGET}", min_numel=64) as dist:
            for step in range(STEPS):
                x = values[step].clone() if rank == 0 else torch.empty(ROWS, CHANNELS)
                with dist.step():
                    work = torch.distributed.broadcast(x, 0, group=dist, async_op=True)
                    if step == CHANGE and rank == size - 1:
                        time.sleep(1)
                    work.wait()
                assert rank == 0 or step not in (0, CHANGE) or _decibels(x, values[step]) < TARGET
            dist.check()

    run_ranks(body, 4, timeout=30)


@pytest.mark.parametrize("how", ["reset", "prefix", "close"])
def test_works_may_be_waited_for_after_their_site_was_forgotten(how):
    """Rank 1 waits for the call of the change long after rank 0, which has gone on, or closed its group."""

    def body(rank, size):
        everyones = [_values(peer) for peer in range(size)]
        dist = compactdist.wrap(target=f"nmse_db={TARGET}", min_numel=64)

        def call(step):
            out = torch.empty(size * ROWS, CHANNELS)
            with dist.step(), dist.key("a"):
                return out, dist.all_gather_into_tensor(out, everyones[rank][step], async_op=True)

        for step in range(CHANGE):
            call(step)[1].wait()
        out, work = call(CHANGE)
        if rank == 0:
            work.wait()
        if how == "close":
            if rank == 1:
                time.sleep(1)
            dist.close()
        else:
            dist.reset("a" if how == "prefix" else None)
            for step in range(CHANGE, STEPS):
                call(step)[1].wait()
        if rank == 1:
            work.wait()
        for chunk, theirs in zip(out.chunk(size), everyones, strict=True):
            assert _decibels(chunk, theirs[CHANGE]) < TARGET
        if how != "close":
            dist.check()
            dist.close()

    run_ranks(body, 2, timeout=30)


def test_nothing_is_kept_of_a_request_that_ends_so():
    def body(rank, size):
        values, out, sites = _values(rank), torch.empty(size * ROWS, CHANNELS), []
        with compactdist.wrap(target=f"nmse_db={TARGET}", min_numel=64) as dist:
            for number in range(3):
                with dist.request(f"request {number}"):
                    for step in range(CHANGE + 1):
                        with dist.step():
                            dist.all_gather_into_tensor(out, values[step])
                    sites += [weakref.ref(site) for site in dist._engine.store.sites()]
            torch.distributed.barrier()
            assert dist._engine.behind.join(5)
            gc.collect()
            assert len(sites) == 3
            assert not any(ref() for ref in sites)

    run_ranks(body, 2)


@pytest.mark.parametrize("threads", [16, 1])
def test_a_message_that_nobody_fetches_keeps_no_other(threads, monkeypatch):
    """Rank 1 drops the work of a call, and its history before it looked at the frame."""
    monkeypatch.setattr("compactdist.exchange.behind._THREADS", threads)
    monkeypatch.setattr("compactdist.exchange.behind._STUCK_SECONDS", 0.2)

    def body(rank, size):
        values, out = _values(rank), torch.empty(size * ROWS, CHANNELS)
        with compactdist.wrap(target=f"nmse_db={TARGET}", min_numel=64) as dist:
            for number in range(2):
                for step in range(CHANGE + 1):
                    with dist.step():
                        work = dist.all_gather_into_tensor(out, values[step], async_op=True)
                    if number or step < CHANGE or rank == 0:
                        work.wait()
                del work
                dist.reset()
                torch.distributed.barrier()
                time.sleep(0.3)
            assert len(dist._engine.behind) == (rank == 0)
            dist._engine.behind.join = lambda seconds: True  # it would wait for that message

    run_ranks(body, 2, timeout=30)


def test_what_is_sent_on_untouched_goes_on_as_it_came():
    """A rotation of chunks around three ranks: the keyframe is passed on, and the frames after it, too."""

    def body(rank, size):
        everyones = [_values(peer, changes=peer == 0) for peer in range(size)]
        with compactdist.wrap(target=f"nmse_db={TARGET}", min_numel=64) as dist:
            for step in range(STEPS):
                held = everyones[rank][step]
                with dist.step():
                    for hop in range(1, size):
                        came, leaving, arriving = torch.empty(ROWS, CHANNELS), [0] * size, [0] * size
                        leaving[(rank + 1) % size] = arriving[(rank - 1) % size] = ROWS
                        dist.all_to_all_single(came, held, arriving, leaving)
                        held, exact = came, everyones[(rank - hop) % size][step]
                        if step == CHANGE:
                            assert _decibels(came, exact) < TARGET + 1
            dist.check()
            first, second = dist.stats().sites.values()
            assert second.forwarded == STEPS
            return first.keyframes, second.keyframes

    assert run_ranks(body, 3) == [(2, 1), (1, 2), (1, 1)]


def test_a_call_that_is_answered_with_its_prediction_waits_where_its_own_tensor_changed():
    def body(rank, size):
        everyones, out = [_values(peer) for peer in range(size)], torch.empty(size * ROWS, CHANNELS)
        with compactdist.wrap(target=f"nmse_db={TARGET}", min_numel=64, mode="predict-now") as dist:
            for step in range(STEPS):
                with dist.step():
                    dist.all_gather_into_tensor(out, everyones[rank][step])
                if step == CHANGE:
                    for chunk, theirs in zip(out.chunk(size), everyones, strict=True):
                        assert _decibels(chunk, theirs[step]) < TARGET
            dist.check()
            (record,) = dist.stats().sites.values()
            return record.predicted, record.keyframes

    assert run_ranks(body, 2) == [(STEPS - 2, 2)] * 2


def test_a_size_is_kept():
    """Under a target for a size no keyframe comes unannounced."""

    def body(rank, size):
        values, out = _values(rank), torch.empty(size * ROWS, CHANNELS)
        with compactdist.wrap(target="bits=2", min_numel=64) as dist:
            for x in values:
                with dist.step():
                    dist.all_gather_into_tensor(out, x)
            (record,) = dist.stats().sites.values()
            return record.keyframes

    assert run_ranks(body, 2) == [1, 1]
