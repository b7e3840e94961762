"""Calls that belong together are all encoded before anything is sent: a bad one leaves nothing on the wire."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

import compactdist
from compactdist import Layout
from compactdist.errors import BadOutputError, LayoutError
from tests.group.kit import NUMEL, close, data
from tests.launch import run_ranks


def nan() -> torch.Tensor:
    return torch.full((NUMEL,), torch.nan)


def _misfit(call):
    return Layout("(a b) -> 1 a b", a=7) if call.key.startswith("misfit") and call.target == 0 else None


@pytest.mark.parametrize("entry", ["torch", "ours"])
def test_a_bad_send_of_a_batch_posts_no_receive(entry):
    """The hint does not fit what rank 1 sends, so its batch fails; rank 0's first batch waits for the retry."""

    def body(rank, size):
        g = compactdist.wrap(codec="int8", min_numel=64, layouts=_misfit, timeout=20)
        peer = 1 - rank

        def batch(seed: int, out: torch.Tensor) -> list[dist.P2POp]:
            return [
                dist.P2POp(dist.irecv, out, peer, g),
                dist.P2POp(dist.isend, data(rank, seed=seed), peer, g),
            ]

        for seed in range(3):
            g.step()
            if rank == 1:
                with g.key("misfit"), pytest.raises(LayoutError, match="does not describe"):
                    g.batch_isend_irecv(batch(seed, nan()))
            out = nan()
            post = g.batch_isend_irecv if entry == "ours" else dist.batch_isend_irecv
            for work in post(batch(seed, out)):
                work.wait()
            assert close(out, data(peer, seed=seed))

    run_ranks(body, pg_timeout=15, timeout=60)


def test_a_bad_output_of_a_coalesced_gather_sends_nothing_of_the_good_ones():
    def body(rank, size):
        g = compactdist.wrap(codec="int8", min_numel=64, timeout=20)
        for seed in range(3):
            g.step()
            inputs = [data(rank, seed=seed), data(rank, seed=seed + 10)]
            good = [torch.empty(size * NUMEL), torch.empty(size * NUMEL)]
            if rank == 1:
                with pytest.raises(BadOutputError, match="nothing was sent"):
                    g.all_gather_single_coalesced([good[0], torch.empty(3)], inputs)
            g.all_gather_single_coalesced(good, inputs).wait()
            for output, at in zip(good, (seed, seed + 10), strict=True):
                for source, chunk in enumerate(output.view(size, -1)):
                    assert close(chunk, data(source, seed=at))
        assert g.stats().compressed_calls == 6

    run_ranks(body, pg_timeout=15, timeout=60)


def test_an_output_that_is_not_contiguous_is_written():
    def body(rank, size):
        g = compactdist.wrap(codec="int8", min_numel=64, timeout=20)
        for seed in range(3):
            g.step()
            x = data(rank, seed=seed).view(NUMEL // 8, 8)
            output = torch.full((size * NUMEL // 8, 16), torch.nan)[:, ::2]
            g.all_gather_into_tensor(output, x)
            for source, chunk in enumerate(output.chunk(size)):
                assert close(chunk.reshape(-1), data(source, seed=seed))
        assert g.stats().compressed_calls == 3
        rows = 3 * NUMEL // size  # three rows cannot be divided among two ranks
        with pytest.raises(BadOutputError, match="contiguous"):
            g.all_gather_into_tensor(torch.empty(rows * size // 3, 3).t(), torch.empty(rows))

    run_ranks(body, pg_timeout=15, timeout=60)


def test_ones_own_chunk_is_right_however_late_it_is_waited_for():
    """Sites of one size share the memory that reconstructions are written to."""

    def body(rank, size):
        g = compactdist.wrap(codec="int8", min_numel=64, timeout=20)
        for seed in range(4):
            g.step()
            outputs = [torch.full((size * NUMEL,), torch.nan) for _ in range(4)]
            works = [
                g.all_gather_into_tensor(output, data(rank, seed=10 * site + seed), async_op=True)
                for site, output in enumerate(outputs)
            ]
            for site in (2, 0, 3, 1):
                works[site].wait()
                for source, chunk in enumerate(outputs[site].view(size, -1)):
                    assert close(chunk, data(source, seed=10 * site + seed)), (seed, site, source)
            held = g._engine.store.site("all_gather#1").encoder(rank).predictor.base
            assert torch.equal(outputs[1].view(size, -1)[rank], held)

    run_ranks(body, pg_timeout=15, timeout=60)
