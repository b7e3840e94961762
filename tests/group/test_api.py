"""`dist = compactdist.wrap()` in place of the module `torch.distributed`."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.distributed

import compactdist
from tests.group.kit import GLOO_HAS_ALL_TO_ALL, Counted, close, data
from tests.launch import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

N = 256


def work_of_a_training_script(dist, x):
    """Ordinary code on whatever `dist` is; returns what it computed, by name."""
    rank, size = dist.get_rank(), dist.get_world_size()
    right, left = (rank + 1) % size, (rank - 1) % size
    got = {}

    total = x.clone()
    dist.all_reduce(total, op=dist.ReduceOp.SUM)
    got["sum"] = total
    largest = x.clone()
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=dist.group.WORLD)
    got["max"] = largest

    parts = [torch.empty_like(x) for _ in range(size)]
    dist.all_gather(parts, x)
    got["all_gather"] = torch.stack(parts)
    flat = x.new_empty(size * x.numel())
    dist.all_gather_into_tensor(flat, x, group=dist.group.WORLD)
    got["all_gather_into_tensor"] = flat

    exchanged = torch.empty_like(x)
    if dist is torch.distributed and not GLOO_HAS_ALL_TO_ALL:
        dist.all_to_all_single(exchanged, x)
    else:
        dist.all_to_all(list(exchanged.chunk(size)), list(x.chunk(size)))
    got["all_to_all"] = exchanged

    received = torch.empty_like(x)
    works = [dist.irecv(received, left, tag=1), dist.isend(x, right, tag=1)]
    for work in works:
        work.wait()
    got["isend"] = received
    ring = torch.empty_like(x)
    batch = [dist.P2POp(dist.isend, x, right), dist.P2POp(op=dist.irecv, tensor=ring, peer=left)]
    for work in dist.batch_isend_irecv(batch):
        work.wait()
    got["batch"] = ring

    handle = dist.broadcast(cast := x.clone(), src=1, async_op=True)
    assert isinstance(handle, dist.Work)
    handle.wait()
    got["broadcast"] = cast

    names = [None] * size
    dist.all_gather_object(names, f"rank {rank}")
    got["objects"] = names
    dist.barrier()
    return got


def test_code_for_the_module_runs_on_the_group():
    def body(rank, size):
        plain = work_of_a_training_script(torch.distributed, data(rank, N))
        dist = compactdist.wrap(codec="int8", min_numel=16)
        for _ in range(2):
            with dist.step(), Counted(dist) as counted:
                wrapped = work_of_a_training_script(dist, data(rank, N))
            assert counted.compressed == 6
            assert counted.passed == {
                ("all_reduce", "op"): 2,
                ("all_gather", "dtype"): 2,
                ("barrier", "op"): 1,
            }
            for name, value in plain.items():
                got = wrapped[name]
                assert close(got, value) if isinstance(value, torch.Tensor) else got == value, name

    run_ranks(body, 2, pg_timeout=15)


def test_ranks_are_global_on_a_subgroup():
    def body(rank, size):
        group = torch.distributed.new_group([1, 2])
        if rank == 0:
            return
        dist = compactdist.wrap(group, codec="int8", min_numel=16)
        peer = 3 - rank
        assert (dist.get_rank(), dist.get_world_size()) == (rank - 1, 2)
        assert dist.get_process_group_ranks(dist) == [1, 2]
        assert dist.get_global_rank(dist, 0) == 1
        assert dist.get_backend() == "gloo"
        dist.step()
        out, batched, by_group_rank = (torch.empty(N) for _ in range(3))
        for work in (dist.irecv(out, peer), dist.isend(data(rank, N), peer)):
            work.wait()
        ops = [dist.P2POp(dist.isend, data(rank, N), peer), dist.P2POp(dist.irecv, batched, peer)]
        for work in dist.batch_isend_irecv(ops):
            work.wait()
        receive = dist.irecv(by_group_rank, group_src=peer - 1)
        dist.isend(data(rank, N), group_dst=peer - 1).wait()
        receive.wait()
        assert all(close(x, data(peer, N)) for x in (out, batched, by_group_rank))
        assert dist.stats().compressed_calls == 3
        for wrong in (lambda: dist.isend(out, 0), lambda: dist.irecv(out, 0)):
            with pytest.raises(ValueError, match=r"rank 0|part of"):
                wrong()

    run_ranks(body, 3, pg_timeout=15)


def test_p2p_ops_are_torchs():
    def body(rank, size):
        dist = compactdist.wrap()
        x = torch.ones(4)
        op = dist.P2POp(dist.isend, x, 0)
        assert isinstance(op, torch.distributed.P2POp)
        assert isinstance(op, dist.P2POp)
        assert op.op is torch.distributed.isend
        assert op.group is dist
        assert dist.P2POp(torch.distributed.irecv, x, 0).op is torch.distributed.irecv
        assert dist.P2POp(dist.irecv, x, 0, torch.distributed.group.WORLD).group is dist
        with pytest.raises(ValueError, match=r"(?i)op"):
            dist.P2POp(dist.all_reduce, x, 0)

    run_ranks(body, 1)


def test_attributes_are_torchs_public_names_and_no_others():
    def body(rank, size):
        dist = compactdist.wrap()
        for name in ("ReduceOp", "GroupMember", "Work", "is_initialized", "Backend", "is_gloo_available"):
            assert getattr(dist, name) is getattr(torch.distributed, name), name
        assert dist.group.WORLD is not None
        assert dist.is_initialized()
        for name in ("nonsense", "_private", "sys", "os", "distributed_c10d", "_world", "all_gatherr"):
            with pytest.raises(AttributeError, match=name):
                getattr(dist, name)
            assert not hasattr(dist, name)
        assert isinstance(dist, torch.distributed.ProcessGroup)
        bound = dist.get_rank
        assert functools.partial(bound)() == 0
        assert bound(torch.distributed.group.WORLD) == 0
        plain = dist.new_group([0])
        assert not isinstance(plain, compactdist.CompressedProcessGroup)
        assert dist.get_world_size(plain) == 1

    run_ranks(body, 1)


def test_every_method_with_a_group_accepts_none_the_inner_and_itself():
    def body(rank, size):
        dist = compactdist.wrap(codec="int8", min_numel=16)
        inner = torch.distributed.group.WORLD
        other = torch.distributed.new_group()
        for group, compressed in ((None, 1), (inner, 1), (dist, 1), (other, 0)):
            calls = [
                lambda g: dist.all_gather([torch.empty(N) for _ in range(2)], data(rank, N), group=g),
                lambda g: dist.all_gather_into_tensor(torch.empty(2 * N), data(rank, N), g),
                lambda g: dist.all_gather_single(torch.empty(2 * N), data(rank, N), g),
                lambda g: dist.all_to_all_single(torch.empty(N), data(rank, N), group=g),
                lambda g: dist.broadcast(data(rank, N), 0, g),
            ]
            if compressed or GLOO_HAS_ALL_TO_ALL:
                calls.append(lambda g: dist.all_to_all([torch.empty(N // 2)] * 2, list(data(rank, N).chunk(2)), g))
            for call in calls:
                dist.step()
                with Counted(dist) as counted:
                    call(group)
                assert (counted.compressed, counted.passed) == (compressed, {})

    run_ranks(body, 2, pg_timeout=15)
