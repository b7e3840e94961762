"""batch_isend_irecv: receives first, works in the order given, and one group of calls where the backend can group."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

import compactdist
from compactdist.errors import ConfigError
from compactdist.testing import act_like_nccl
from tests.group.kit import NUMEL, Watch, close, data
from tests.launch import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def nan():
    return torch.full((NUMEL,), torch.nan)


def batch(g, rank, seed, outs):
    """Sends before receives: the worst order for gloo, the usual one in ring code."""
    peer = 1 - rank
    sends = [dist.P2POp(dist.isend, data(rank, seed=10 * seed + i), peer, g) for i in range(len(outs))]
    return [*sends, *(dist.P2POp(dist.irecv, out, peer, g) for out in outs)]


def right(outs, rank, seed):
    return all(close(out, data(1 - rank, seed=10 * seed + i)) for i, out in enumerate(outs))


def test_both_ways_to_call_it():
    def body(rank, size):
        g = compactdist.wrap(codec="int8", min_numel=64)
        watch = Watch(g)
        for seed in range(3):
            for batch_isend_irecv in (g.batch_isend_irecv, dist.batch_isend_irecv):
                g.step()
                outs = [nan(), nan()]
                ops = batch(g, rank, seed, outs)

                def run(post=batch_isend_irecv, ops=ops):
                    works = post(ops)
                    assert len(works) == 4
                    for work, op in zip(works, ops, strict=True):
                        assert work.result()[0] is op.tensor  # in the order given
                    for work in (*works, *works):  # twice: gloo would hang
                        work.wait()

                seen = watch(run)
                assert seen.error == ""
                assert right(outs, rank, seed)
                assert (seen.compressed, seen.passed) == (2, {})
                one_by_one = ["send", "send", "recv", "recv"]  # torch's own function, which knows nothing of batches
                assert seen.reached == ([] if batch_isend_irecv == g.batch_isend_irecv else one_by_one)

    run_ranks(body, pg_timeout=15)


def test_small_and_integer_messages_in_a_batch_pass_through():
    def body(rank, size):
        g = compactdist.wrap(codec="int8", min_numel=64)
        watch = Watch(g)
        g.step()
        peer = 1 - rank
        small, whole, big = torch.zeros(8), torch.zeros(NUMEL, dtype=torch.int64), nan()
        ops = [
            dist.P2POp(dist.isend, torch.full((8,), float(rank)), peer, g),
            dist.P2POp(dist.isend, torch.full((NUMEL,), rank), peer, g),
            dist.P2POp(dist.isend, data(rank), peer, g),
            *(dist.P2POp(dist.irecv, out, peer, g) for out in (small, whole, big)),
        ]
        seen = watch(lambda: [work.wait() for work in g.batch_isend_irecv(ops)])
        assert seen.error == ""
        assert bool((small == peer).all())
        assert bool((whole == peer).all())
        assert close(big, data(peer))
        assert seen.compressed == 1
        assert g.stats().passed_reasons == {"small": 2, "dtype": 2}

    run_ranks(body, pg_timeout=15)


def test_operations_of_another_group_are_refused():
    def body(rank, size):
        g = compactdist.wrap(codec="int8", min_numel=64)
        other = dist.new_group()
        g.step()
        with pytest.raises(ConfigError, match="another group"):
            g.batch_isend_irecv([dist.P2POp(dist.isend, data(0), 1 - rank, other)])
        # the wrapped group itself means this group
        out = nan()
        ops = [
            dist.P2POp(dist.irecv, out, 1 - rank, dist.group.WORLD),
            dist.P2POp(dist.isend, data(rank), 1 - rank),
        ]
        for work in g.batch_isend_irecv(ops):
            work.wait()
        assert close(out, data(1 - rank))
        assert g.stats().compressed_calls == 1

    run_ranks(body, pg_timeout=15)


def grouping_group():
    """A wrapped group on a backend that groups calls; what is patched here is patched in this rank's process only."""
    return compactdist.wrap(act_like_nccl(dist.group.WORLD), "int8", min_numel=64)


def test_a_backend_that_groups_gets_the_whole_batch_in_one_group():
    def body(rank, size):
        g = grouping_group()
        log = g.inner.issued
        for seed in range(3):
            for batch_isend_irecv in (g.batch_isend_irecv, dist.batch_isend_irecv, c10d.batch_isend_irecv):
                with g.key(f"{batch_isend_irecv.__module__}"):
                    g.step()
                log.clear()
                outs = [nan(), nan()]
                works = batch_isend_irecv(batch(g, rank, seed, outs))
                assert log == ["start", "recv", "recv", "send", "send", "end"]
                for work in (*works, *works):
                    work.wait()
                assert right(outs, rank, seed)
        assert g.stats().compressed_calls == 18

    run_ranks(body, pg_timeout=15)


def test_a_grouped_batch_may_mix_compressed_and_passed_messages():
    def body(rank, size):
        g = grouping_group()
        peer = 1 - rank
        for seed in range(2):
            g.step()
            pairs, big = torch.full((NUMEL, 2), -1), nan()
            ops = [
                dist.P2POp(dist.isend, torch.full((NUMEL, 2), rank)[:, 0], peer, g),  # strided
                dist.P2POp(dist.isend, data(rank, seed=seed), peer, g),
                dist.P2POp(dist.irecv, pairs[:, 0], peer, g),
                dist.P2POp(dist.irecv, big, peer, g),
            ]
            for work in dist.batch_isend_irecv(ops):
                work.wait()
            assert bool((pairs == torch.tensor([peer, -1])).all())
            assert close(big, data(peer, seed=seed))
        assert g.inner.issued == ["start", "recv", "recv", "send", "send", "end"] * 2

    run_ranks(body, pg_timeout=15)


def test_a_plain_group_beside_it_keeps_its_own_way():
    def body(rank, size):
        grouping_group()
        out = nan()
        for work in dist.batch_isend_irecv(batch(dist.group.WORLD, rank, 0, [out])):
            work.wait()
        assert torch.equal(out, data(1 - rank))

    run_ranks(body, pg_timeout=15)


def test_gloo_leaves_torch_unpatched():
    def body(rank, size):
        before = dist.batch_isend_irecv
        compactdist.wrap()
        assert dist.batch_isend_irecv is before is c10d.batch_isend_irecv

    run_ranks(body, 1)


def test_complex_tensors_travel_as_pairs_of_reals_in_a_batch_too():
    def body(rank, size):
        g = compactdist.wrap(codec="int8", min_numel=64)
        peer = 1 - rank

        def z(of: int, seed: int) -> torch.Tensor:
            return torch.complex(data(of, seed=seed), data(of, seed=seed + 7))

        for seed in range(3):
            g.step()
            out = torch.empty(NUMEL, dtype=torch.complex64)
            if rank == 0:  # one end in a batch, the other alone
                g.send(z(0, seed), 1)
                g.recv(out, 1)
            else:
                for work in g.batch_isend_irecv([g.P2POp(g.irecv, out, 0), g.P2POp(g.isend, z(1, seed), 0)]):
                    work.wait()
            assert close(torch.view_as_real(out), torch.view_as_real(z(peer, seed)))
        assert g.stats().compressed_calls == 3

    run_ranks(body, pg_timeout=15)
