"""Sizes: odd ones, uneven ones, strided tensors, and wrong ones, which give an error and no wrong data."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

import compactdist
from compactdist.errors import BadOutputError, CompactDistError
from tests.group.kit import Counted, close, data, exchanged, gathered
from tests.launch import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

ODD = (1, 2, 3, 7, 13, 31, 33, 101, 257, 1023, 1025)


def fresh(min_numel=1, **options):
    return compactdist.wrap(codec="int8", min_numel=min_numel, **options)


def exchange(g, x, out, peer):
    works = [g.irecv(out, peer), g.isend(x, peer)]
    for work in works:
        work.wait()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_odd_sizes(dtype):
    def body(rank, size):
        g = fresh()
        for seed in range(3):
            g.step()
            for n in ODD:
                with g.key(f"n{n}"):
                    x = data(rank, n, seed).to(dtype)
                    out, rows = x.new_empty(size * n), [torch.empty_like(x) for _ in range(size)]
                    g.all_gather_into_tensor(out, x)
                    assert close(out, gathered(size, n, seed)), n
                    g.all_gather(rows, x)
                    assert close(torch.cat(rows), gathered(size, n, seed)), n
                    out = x.new_empty(size * n)
                    g.all_to_all_single(out, data(rank, size * n, seed).to(dtype))
                    assert close(out, exchanged(rank, size, size * n, seed)), n
                    out = torch.empty_like(x)
                    exchange(g, x, out, 1 - rank)
                    assert close(out, data(1 - rank, n, seed)), n
                    cast = x.clone()
                    g.broadcast(cast, 1)
                    assert close(cast, data(1, n, seed)), n
        assert g.stats().compressed_calls == 3 * 5 * len(ODD)
        assert g.stats().passed_through == 0

    run_ranks(body, timeout=90, pg_timeout=30)


def test_empty_tensors_pass():
    def body(rank, size):
        g = fresh()
        g.step()
        g.all_gather_into_tensor(torch.empty(0), torch.empty(0))
        g.all_to_all_single(torch.empty(0), torch.empty(0))
        g.broadcast(torch.empty(0), 0)
        assert g.stats().compressed_calls == 0
        assert g.stats().passed_through == 3

    run_ranks(body, pg_timeout=15)


def test_uneven_and_explicitly_equal_splits():
    def body(rank, size):
        g = fresh(min_numel=64)
        for seed in range(2):
            g.step()
            for splits, compressed in (([128, 128], 1), ([200, 56], 1), ([0, 256], 1)):
                # rank r sends splits[p] to p, so it gets splits[r] from everyone
                with g.key(str(splits)), Counted(g) as counted:
                    x = data(rank, 256, seed)
                    out = torch.full((2 * splits[rank],), torch.nan)
                    g.all_to_all_single(out, x, [splits[rank]] * 2, splits)
                    expected = torch.cat([data(p, 256, seed).split(splits)[rank] for p in range(2)])
                    assert close(out, expected) if out.numel() else not expected.numel()
                peers_chunk = splits[1 - rank]
                assert counted.compressed == (compressed if peers_chunk >= 64 else 0), splits

    run_ranks(body, pg_timeout=15)


def test_uneven_outputs_of_all_gather_fail_or_pass_as_on_a_plain_group():
    def body(rank, size):
        g = fresh(min_numel=64)
        g.step()
        n = 128 if rank == 0 else 100
        results = []
        for group in (g.inner, g):
            outs = [torch.full((128,), torch.nan), torch.full((100,), torch.nan)]
            try:
                dist.all_gather(outs, data(rank, n), group=group)
                results.append(outs)
            except RuntimeError as error:
                results.append(str(error)[:80])
        plain, wrapped = results
        if isinstance(plain, str):
            assert wrapped == plain
        else:
            assert all(torch.equal(a, b) for a, b in zip(plain, wrapped, strict=True))
        assert g.stats().passed_reasons == {"uneven": 1}

    run_ranks(body, pg_timeout=15)


def test_strided_inputs_and_outputs():
    def body(rank, size):
        g = fresh(min_numel=64)
        for seed in range(2):
            g.step()
            x = data(rank, 64 * 32, seed).view(32, 64).T
            rows = [torch.full((32, 64), torch.nan).T for _ in range(size)]
            g.all_gather(rows, x)
            for peer, row in enumerate(rows):
                assert close(row, data(peer, 64 * 32, seed).view(32, 64).T)
            out = torch.full((64, 32), torch.nan)
            exchange(g, x.contiguous(), out, 1 - rank)
            assert close(out, data(1 - rank, 64 * 32, seed).view(32, 64).T)
        assert g.stats().compressed_calls == 4

    run_ranks(body, pg_timeout=15)


def test_wrong_outputs_are_refused_before_anything_is_sent():
    def body(rank, size):
        g = fresh(min_numel=64)
        g.step()
        x = data(rank)
        for wrong in (
            lambda: g.all_gather_into_tensor(torch.empty(2 * 512 + 1), x),
            lambda: g.all_gather([torch.empty(512), torch.empty(511)][:1] * 2, x[:256]),
            lambda: g.all_gather_single([torch.empty(1)], x),
            lambda: g.allgather([[torch.empty(256)] * 2], [x]),
            lambda: g.all_gather_single(torch.empty(1024, dtype=torch.float64), x, c10d_options()),
            lambda: g.all_to_all_single(torch.empty(511), x[:511]),
            lambda: g.all_to_all_single(torch.empty(512), x, [256, 256], [500, 13]),
            lambda: g.alltoall([torch.empty(256)], [x[:256]], None),
        ):
            with pytest.raises((BadOutputError, ValueError, TypeError, AttributeError)):
                wrong()
        assert g.stats().compressed_calls == 0
        out = torch.empty(1024)
        g.all_gather_into_tensor(out, x)  # nothing is out of step
        assert close(out, gathered(2))
        assert list(g.stats().sites) == ["all_gather#0"]  # nor was an ordinal used up

    def c10d_options():
        return torch.distributed.distributed_c10d.AllgatherOptions()

    run_ranks(body, pg_timeout=15)


@pytest.mark.parametrize("numel", [511, 513, 1024, 4096])
def test_a_receive_buffer_of_the_wrong_size_is_an_error_and_not_an_abort(numel):
    def body(rank, size):
        g = fresh(min_numel=64)
        for seed in range(2):  # a keyframe, then a residual
            g.step()
            with g.key(f"wrong{seed}"):
                if seed:  # the streams agree first
                    if rank == 0:
                        g.send(data(0), 1)
                    else:
                        g.recv(torch.empty(512), 0)
                    g.step()
                if rank == 0:
                    g.isend(data(0), 1).wait()
                else:
                    out = torch.full((numel,), torch.nan)
                    with pytest.raises(CompactDistError, match=r"512|wrong"):
                        g.recv(out, 0)
                    assert bool(out.isnan().all())
            dist.barrier()

    run_ranks(body, pg_timeout=15)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_much_smaller_receive_buffer_fails_hard_as_on_a_plain_gloo_group(wrapped):
    def body(rank, size):
        g = fresh(min_numel=64, keyframe="raw") if wrapped else dist.group.WORLD  # a coded one fits into the buffer
        if wrapped:
            g.step()
        if rank == 0:
            dist.isend(data(0), 1, group=g)
            dist.barrier()
        else:
            dist.recv(torch.empty(256), 0, group=g)

    _, receiver = run_ranks(body, timeout=20, pg_timeout=3, expect_error=True)
    assert not receiver.ok  # gloo aborts, or times out if the message came before the receive was posted
    assert receiver.error_type in ("Killed", "RuntimeError")
