"""A wrapped group on an inner one with NCCL's manners: no work for synchronous calls, groups of calls, exact sizes."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch.distributed import distributed_c10d as c10d

import compactdist
from compactdist import _torch
from compactdist.errors import CallGroupError, FrameError, UnforeseenSizeError
from compactdist.exchange.work import Job, PendingWork
from compactdist.testing import UnequalSizesError, act_like_nccl, remove
from tests.group.kit import COALESCES_ASYNCHRONOUSLY, NUMEL, Counted, close, data, exchanged, gathered
from tests.launch import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:torch.*")


def wrapped(codec="int8", *, delay=0.001, **options):
    """An inner group that acts like NCCL, and a wrapped group on it."""
    inner = act_like_nccl(dist.group.WORLD, delay=delay)
    return inner, compactdist.wrap(inner, codec, min_numel=64, **options)


def nan(times=1, numel=NUMEL):
    return torch.full((times * numel,), torch.nan)


def _lists(rank, size, g):
    out = [torch.empty(NUMEL) for _ in range(size)]
    dist.all_gather(out, data(rank), group=g)
    return torch.cat(out), gathered(size)


def _single(rank, size, g):
    out = torch.empty(size * NUMEL)
    dist.all_gather_into_tensor(out, data(rank), group=g)
    return out, gathered(size)


def _coalesced(rank, size, g):
    """Two that are compressed, and one between them that is too small."""
    numels = NUMEL, 8, 2 * NUMEL
    outs = [torch.empty(size * n) for n in numels]
    with c10d._coalescing_manager(g):
        for out, n in zip(outs, numels, strict=True):
            _torch.public_function("all_gather_single")(out, data(rank, n), group=g)
    return torch.cat(outs), torch.cat([gathered(size, n) for n in numels])


def _coalesced_lists(rank, size, g):
    outs = [[torch.empty(NUMEL), torch.empty(8)] for _ in range(size)]
    dist.all_gather_coalesced(outs, [data(rank), data(rank, 8)], group=g)
    flat = torch.cat([t for per_rank in outs for t in per_rank])
    return flat, torch.cat([t for peer in range(size) for t in (data(peer), data(peer, 8))])


def _chunks(rank, size, g):
    out = [torch.empty(NUMEL // size) for _ in range(size)]
    dist.all_to_all(out, list(data(rank).chunk(size)), group=g)
    return torch.cat(out), exchanged(rank, size)


def _exchange(rank, size, g):
    out = torch.empty(NUMEL)
    dist.all_to_all_single(out, data(rank), group=g)
    return out, exchanged(rank, size)


def _broadcast(rank, size, g):
    x = data(1) if rank == 1 else torch.empty(NUMEL)
    dist.broadcast(x, 1, group=g)
    return x, data(1)


CALLS = {
    "all_gather": (_lists, 1),
    "all_gather_single": (_single, 1),
    "all_gather_single_coalesced": (_coalesced, 2),
    "all_gather_coalesced": (_coalesced_lists, 1),
    "all_to_all": (_chunks, 1),
    "all_to_all_single": (_exchange, 1),
    "broadcast": (_broadcast, 1),
}


def test_synchronous_calls_are_done_without_a_work():
    def body(rank, size):
        inner, g = wrapped()
        for name, (call, compressed) in CALLS.items():
            for _ in range(3):
                before = inner.nones
                with g.step(), Counted(g) as counted:
                    got, expected = call(rank, size, g)
                assert close(got, expected), name
                assert counted.compressed == compressed, name
                assert (inner.nones > before) == (name not in COALESCES_ASYNCHRONOUSLY), name
        g.close()
        assert remove(inner) is dist.group.WORLD

    run_ranks(body, 2, timeout=60)


def test_what_else_a_group_is_asked_for():
    """Asynchronous and functional calls, sends, and calls that pass through, between synchronous ones."""

    def body(rank, size):
        _, g = wrapped()
        for _ in range(3):
            g.step()
            assert close(*_single(rank, size, g))
            out, received = nan(size), nan()
            work = dist.all_gather_into_tensor(out, data(rank), group=g, async_op=True)
            y = funcol.all_gather_tensor(data(rank), 0, g) + 0
            assert close(y, gathered(size))
            work.wait()
            assert work.is_completed()
            assert close(out, gathered(size))
            receive = dist.irecv(received, 1 - rank, group=g)
            dist.send(data(rank), 1 - rank, group=g)
            receive.wait()
            assert close(received, data(1 - rank))
            dist.all_reduce(total := torch.ones(1), group=g)
            assert total == size
            dist.barrier(group=g)
        g.close()

    run_ranks(body, 2, timeout=40)


def test_a_future_is_not_done_before_its_data():
    """The inner call takes 50 ms: a future that does not wait for it would hold what was there before."""

    def body(rank, size):
        _, g = wrapped(delay=0.05)
        for seed in range(3):
            g.step()
            out, received = nan(size), nan()
            gather = dist.all_gather_into_tensor(out, data(rank, seed=seed), group=g, async_op=True)
            sent = dist.isend(data(rank, seed=seed), 1 - rank, group=g)
            receive = dist.irecv(received, 1 - rank, group=g)
            for work, expected in ((gather, gathered(size, seed=seed)), (receive, data(1 - rank, seed=seed))):
                future = work.get_future()
                assert not future.done()
                assert close(future.then(lambda done: done.value()[0].clone()).wait(), expected)
            sent.wait()
            assert close(out, gathered(size, seed=seed))
        assert g.stats().compressed_calls == 6
        g.close()

    run_ranks(body, 2, timeout=40)


# --- groups of calls --------------------------------------------------------------------------------------------------


def _coalesced_with(g, device, outs, rank, *, async_ops):
    """Gathers of all kinds: two that are compressed, and one between them that is too small."""
    with c10d._coalescing_manager(g, device, async_ops=async_ops) as manager:
        for seed, (out, n) in enumerate(zip(outs, (NUMEL, 8, 2 * NUMEL), strict=True)):
            dist.all_gather_into_tensor(out, data(rank, n, seed), group=g)
    return manager


@pytest.mark.parametrize("async_ops", [False, True])
def test_the_end_of_a_coalescing_manager_settles_its_calls(async_ops):
    def body(rank, size):
        inner, g = wrapped(delay=0.02)
        for _ in range(3):
            for device in (None, torch.device("cpu")):
                outs = [nan(size, n) for n in (NUMEL, 8, 2 * NUMEL)]
                with g.key(f"{device}"), Counted(g) as counted:
                    g.step()
                    manager = _coalesced_with(g, device, outs, rank, async_ops=async_ops)
                if async_ops:
                    # a rank's own chunk may be there as soon as its frame is
                    assert all(bool(out.view(size, -1)[1 - rank].isnan().all()) for out in outs)
                    assert len(manager.works) == 1
                    manager.wait()
                for seed, (out, n) in enumerate(zip(outs, (NUMEL, 8, 2 * NUMEL), strict=True)):
                    assert close(out, gathered(size, n, seed)), (device, n)
                assert counted.compressed == 2
        assert inner.issued.count("start") == inner.issued.count("end") == 3
        g.check()
        g.close()

    run_ranks(body, 2, timeout=40)


@pytest.mark.parametrize("names", [("start_coalescing", "end_coalescing"), ("_start_coalescing", "_end_coalescing")])
def test_every_kind_of_call_in_a_group_of_calls(names):
    """Under the names of torch 2.14 and under those before: lists, chunks, broadcasts, messages and sums together."""

    def body(rank, size):
        _, g = wrapped(delay=0.01, policy=lambda info: "int8")
        start, end = (getattr(g, name) for name in names)
        device = torch.device("cpu")
        for seed in range(3):
            g.step()
            lists, chunks = [nan() for _ in range(size)], nan()
            root, received, sums = data(rank, seed=seed), nan(), data(rank, seed=seed)
            with Counted(g) as counted:
                start(device)
                dist.all_gather(lists, data(rank, seed=seed), group=g)
                inside = dist.all_to_all_single(chunks, data(rank, seed=seed), group=g, async_op=True)
                dist.broadcast(root, 1, group=g)
                g.isend(data(rank, seed=seed), 1 - rank)
                g.irecv(received, 1 - rank)
                g.allreduce([sums], c10d.AllreduceOptions())
                for too_early in (inside.wait, inside.get_future):
                    with pytest.raises(CallGroupError, match="group"):
                        too_early()
                assert not inside.is_completed()
                work = end(device)
            results = work.get_future().wait()
            assert close(torch.cat(lists), gathered(size, seed=seed))
            assert close(chunks, exchanged(rank, size, seed=seed))
            assert close(root, data(1, seed=seed))
            assert close(received, data(1 - rank, seed=seed))
            assert close(sums, data(0, seed=seed) + data(1, seed=seed))
            assert any(result is received for result in results)
            assert work.is_success()
            # a sum takes two legs, which cannot be issued together
            assert (counted.compressed, counted.passed) == (4, {("all_reduce", "op"): 1})
        g.close()

    run_ranks(body, 2, timeout=40)


def test_groups_of_calls_in_the_wrong_place():
    def body(rank, size):
        inner, g = wrapped()
        device = torch.device("cpu")
        with pytest.raises(CallGroupError, match="not begun"):
            g.end_coalescing(device)
        g.start_coalescing(device)
        with pytest.raises(CallGroupError, match="inside another"):
            g.start_coalescing(device)
        g.end_coalescing(device)
        # a group that torch's C++ code begins on the backend, past the wrapped group
        inner.start_coalescing(device)
        g.step()
        with pytest.raises(CallGroupError, match="was not told of"):
            g.isend(data(rank), 1 - rank)
        inner._open = None
        g.close()

    run_ranks(body, 2, timeout=40)


# --- exact sizes ------------------------------------------------------------------------------------------------------


def test_a_send_of_unforeseen_size_is_refused_before_it_leaves():
    def body(rank, size):
        _, g = wrapped()
        for t in range(3):
            g.step()
            x = data(0, seed=t)
            if rank == 0 and t < 2:
                with pytest.raises(UnforeseenSizeError, match=r"rank 0, site .send/0>1.* 2176 bytes.* rank 1 "):
                    g.send(x.clone().requires_grad_(), 1)  # a coded frame is due, and this tensor must travel as it is
            if rank == 0:
                with torch.no_grad():
                    g.send(x.clone().requires_grad_(t == 0), 1)
            else:
                g.recv(out := nan(), 0)
                assert close(out, x)
        assert g.stats().compressed_calls == (3 if rank == 0 else 0)
        g.close()

    run_ranks(body, 2, timeout=40)


@pytest.mark.parametrize("codec", ["int8", "raw"])
def test_a_tensor_that_requires_grad_is_the_keyframe_of_its_own_bytes(codec):
    """Sizes alone would not tell the receiver that a message touches no history."""

    def body(rank, size):
        _, g = wrapped(codec, keyframe="raw")
        for t in range(4):
            g.step()
            x, requires_grad = data(0, seed=t), t == 0 or (codec == "raw" and t == 2)
            if rank == 0:
                g.send(x.clone().requires_grad_(requires_grad), 1)
            else:
                g.recv(out := nan(), 0)
                assert close(out, x)
                assert torch.equal(out, x) == (requires_grad or codec == "raw")
        g.check()
        stats = g.stats()
        if rank == 0:
            assert stats.passed_reasons == {"autograd": 1 + (codec == "raw")}
            assert (stats.state_bytes > 0) == (codec == "int8")
        g.close()

    run_ranks(body, 2, timeout=40)


@pytest.mark.parametrize("keyframe", ["int8", "raw"])
@pytest.mark.parametrize("later", [False, True])
def test_without_budget_the_first_message_says_so_in_the_keyframe_that_is_expected(keyframe, later):
    def body(rank, size):
        _, g = wrapped(state_budget_bytes=0, keyframe=keyframe)
        works = []
        for t in range(3):
            g.step()
            if rank == 0:
                works.append(g.isend(data(0, seed=t), 1))
                if not later:
                    works.pop().wait()
            else:
                g.recv(out := nan(), 0)
                assert torch.equal(out, data(0, seed=t)) == (t > 0 or keyframe == "raw")
                assert close(out, data(0, seed=t))
        for work in works:
            work.wait()
        stats = g.stats()
        assert stats.state_bytes == 0
        if rank == 0:
            assert stats.passed_reasons == {"state-budget-pair": 2}
        g.close()

    run_ranks(body, 2, timeout=40)


def test_both_ends_can_tell_after_a_receive_of_another_size():
    """Rank 1 misses a step: it expects a keyframe where rank 0 sends a residual. NCCL would give it anything."""

    def body(rank, size):
        _, g = wrapped(warmup_steps=2, keyframe="raw")
        errors = []
        for t in range(4):
            if rank == 0 or t != 1:
                g.step()
            try:
                if rank == 0:
                    g.send(data(0, seed=t), 1)
                else:
                    g.recv(nan(), 0)
            except (UnequalSizesError, FrameError) as error:
                errors.append(type(error).__name__)
        assert errors == ([] if rank == 0 else ["FrameError", "UnequalSizesError", "FrameError"])
        dist.barrier()
        g.reset()
        g.step()
        if rank == 0:
            g.send(data(0), 1)
        else:
            g.recv(out := nan(), 0)
            assert close(out, data(0))
        g.close()

    run_ranks(body, 2, timeout=40)


def test_works_without_an_inner_one():
    ended: list[bool] = []
    job = Job(None, ended.append, None)
    work = PendingWork([job, None], [], lambda: pytest.fail("no future is asked for"))
    assert job.is_ready()
    assert work.wait(timedelta(seconds=1))
    assert ended == [True]
    assert work.is_success()
    with pytest.raises(RuntimeError, match="named rank"):
        PendingWork([None], [], lambda: pytest.fail("no future is asked for")).source_rank()
