"""Control traffic shares the methods of tensors: it passes untouched, is counted, and behaves as on a plain group."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import compactdist
from tests.group.kit import NUMEL, Counted, close, data
from tests.launch import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:torch.*")

PLAIN_DTYPES = (torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool)
ODD_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16)


def fresh(**options):
    return compactdist.wrap(codec="int8", min_numel=64, **options)


def every_kind(group, x, rank):
    """One call of every kind that compresses floats: name -> what it gave, or how it failed."""
    peer = 1 - rank
    single, rows = x.new_empty(2 * x.numel()), [torch.empty_like(x) for _ in range(2)]
    exchange, cast, received = torch.empty_like(x), x.clone(), torch.empty_like(x)

    def exchange_messages():
        works = [dist.irecv(received, peer, group=group), dist.isend(x, peer, group=group)]
        for work in works:
            work.wait()
        return received

    results = {}
    for name, call in {
        "all_gather_into_tensor": lambda: dist.all_gather_into_tensor(single, x, group=group) or single,
        "all_gather": lambda: dist.all_gather(rows, x, group=group) or torch.cat(rows),
        "all_to_all_single": lambda: dist.all_to_all_single(exchange, x, group=group) or exchange,
        "broadcast": lambda: dist.broadcast(cast, 0, group=group) or cast,
        "p2p": exchange_messages,
    }.items():
        try:
            results[name] = call().clone()
        except Exception as error:
            results[name] = f"{type(error).__name__}: {str(error).split(' at ')[0][:60]}"
    return results


def same(a, b):
    return a == b if isinstance(a, str) or isinstance(b, str) else torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def test_other_dtypes_pass_exactly_or_fail_as_on_a_plain_group():
    def body(rank, size):
        g = fresh()
        told = []
        for dtype in (*PLAIN_DTYPES, *ODD_DTYPES):
            g.step()
            x = torch.randint(0, 2, (NUMEL,)).to(dtype)
            plain = every_kind(g.inner, x, rank)
            with Counted(g) as counted:
                wrapped = every_kind(g, x, rank)
            for name, value in plain.items():
                assert same(value, wrapped[name]), f"{dtype} {name}: {value} {wrapped[name]}"
            assert counted.compressed == 0
            assert {reason for _, reason in counted.passed} == {"dtype"}
            assert sum(counted.passed.values()) == 6, dtype
            told += [str(dtype)] if any(isinstance(value, str) for value in plain.values()) else []
        return told

    zero, _ = run_ranks(body, pg_timeout=15)
    assert not {str(dtype) for dtype in PLAIN_DTYPES} & set(zero)


def test_complex_tensors_are_compressed_where_torch_views_them_as_pairs_of_floats():
    def body(rank, size):
        g = fresh()
        for seed in range(2):
            g.step()
            x = torch.complex(data(rank, seed=seed), data(rank, seed=seed + 10))
            plain = every_kind(g.inner, x, rank)
            with Counted(g) as counted:
                wrapped = every_kind(g, x, rank)
            assert (counted.compressed, counted.passed) == (5, {})
            for name, value in plain.items():
                assert close(torch.view_as_real(value), torch.view_as_real(wrapped[name])), name

    run_ranks(body, pg_timeout=15)


def test_object_collectives_of_any_size():
    def body(rank, size):
        g = fresh()
        g.step()
        big = {"rank": rank, "text": "x" * (5000 + rank)}
        out = [None] * size
        g.all_gather_object(out, big)
        assert [o["rank"] for o in out] == [0, 1]
        assert len(out[1]["text"]) == 5001
        cast = [big, rank]
        g.broadcast_object_list(cast, 1)
        assert (cast[0]["rank"], cast[1]) == (1, 1)
        share = [None]
        g.scatter_object_list(share, [{"for": 0}, {"for": 1}] if rank == 0 else None, 0)
        assert share == [{"for": rank}]
        assert g.stats().compressed_calls == 0
        assert g.stats().passed_through > 0

    run_ranks(body, pg_timeout=15)


def test_ddp_trains_as_on_a_plain_group():
    def body(rank, size):
        g = fresh()
        results = []
        for group in (dist.group.WORLD, g):
            torch.manual_seed(0)
            model = DistributedDataParallel(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8)), process_group=group)
            with Counted(g) as counted:
                for seed in range(2):
                    g.step()
                    model(data(rank, 64 * 4, seed).view(4, 64)).square().sum().backward()
            results.append([p.grad.clone() for p in model.parameters()])
        assert counted.compressed == 0
        assert counted.passed[("all_reduce", "op")] >= 2
        for plain, wrapped in zip(*results, strict=True):
            torch.testing.assert_close(wrapped, plain)

    run_ranks(body, pg_timeout=15)


def test_ddp_reads_the_model_exactly_when_it_is_built():
    def body(rank, size):
        g = fresh()
        g.step()
        torch.manual_seed(rank)
        model = nn.Linear(64, 64)
        torch.manual_seed(0)
        expected = nn.Linear(64, 64)
        with Counted(g) as counted:
            DistributedDataParallel(model, process_group=g)
        torch.testing.assert_close(model.weight, expected.weight, atol=0.05, rtol=0)
        assert counted.passed[("all_gather", "dtype")] >= 1  # the check of the parameters' shapes

    run_ranks(body, pg_timeout=15)


def test_dtensor_redistributes_through_it():
    def body(rank, size):
        g = fresh()
        mesh = DeviceMesh.from_group(g, "cpu")
        assert mesh.get_group() is g
        whole = data(0, 64 * 32).view(64, 32)
        for _ in range(2):
            g.step()
            x = distribute_tensor(whole, mesh, [Shard(0)])
            with Counted(g) as counted:
                assert close(x.redistribute(mesh, [Replicate()]).to_local(), whole)
            assert counted.compressed == 1
            with Counted(g) as counted:
                y = x.redistribute(mesh, [Shard(1)])
                assert close(y.to_local(), whole.chunk(size, dim=1)[rank])
            assert counted.compressed == 1
            product = x @ DTensor.from_local(whole.T.contiguous(), mesh, [Replicate()])
            assert close(product.to_local() / 32, (whole @ whole.T).chunk(size)[rank] / 32)

    run_ranks(body, pg_timeout=15)
