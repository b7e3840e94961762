"""agree(): one decision for all ranks, beside the compressed calls and without a trace in them."""

from __future__ import annotations

import itertools
import time

import pytest
import torch
import torch.distributed

import compactdist
from compactdist.errors import ClosedGroupError, ConfigError
from tests.group.lifecycle import kit
from tests.launch import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")

COUNTED = {
    "all": lambda flags: all(flags),
    "any": lambda flags: any(flags),
    "majority": lambda flags: sum(flags) > len(flags) / 2,
}


def test_every_vote_counts_on_every_rank_of_the_group():
    def body(rank, world_size):
        trio = torch.distributed.new_group([3, 0, 1])
        groups = [(compactdist.wrap(), range(world_size))]
        if rank != 2:
            groups.append((compactdist.wrap(trio), (0, 1, 3)))
        for dist, members in groups:
            for flags in itertools.product((False, True), repeat=len(members)):
                mine = flags[list(members).index(rank)]
                for how, decide in COUNTED.items():
                    assert dist.agree(mine, how) is decide(flags), (members, flags, how)
                assert dist.agree(torch.tensor(mine)) is all(flags), "all is what is usually meant"
            assert dist.stats().compressed_calls == dist.stats().passed_through == 0
            assert dist.current_step == -1, "a vote begins no step"

    run_ranks(body, world_size=4)


def test_it_takes_no_ordinal_and_keeps_the_order_of_calls():
    def body(rank, world_size):
        with kit.wrap() as dist:
            for t in range(3):
                dist.step()
                out, x = torch.empty(world_size * kit.N), kit.tensor(rank, t)
                # a new site: the call leaves once the other rank has come, the vote after it
                work = dist.all_gather_into_tensor(out, x, async_op=True)
                time.sleep(0.1 * rank)
                with dist.key("inside"):
                    assert dist.agree(rank == 0, "any")
                work.wait()
                assert kit.nmse(out, kit.gather_exact(x)) < 1e-3
                assert dist.agree(t == 1) is (t == 1)
            assert kit.keyframes(dist) == {"all_gather#0": (3, 1)}
            for how in ("most", None):
                with pytest.raises(ConfigError, match="how is one of 'all', 'any', 'majority', got"):
                    dist.agree(True, how)
            assert dist.agree(True), "a refused vote sent nothing"
        with pytest.raises(ClosedGroupError):
            dist.agree(True)

    run_ranks(body)


def test_ranks_do_not_wait_for_ever_for_one_that_does_not_vote():
    def body(rank, world_size):
        dist = kit.wrap()
        assert dist.agree(True)
        if rank == 1:
            raise KeyError("this rank does not come to the second vote")
        begun = time.monotonic()
        with pytest.raises(RuntimeError):
            dist.agree(True)
        return time.monotonic() - begun

    first, failed, third = run_ranks(body, world_size=3, pg_timeout=4, expect_error=True)
    assert failed.error_type == "KeyError"
    for waited in (first, third):
        assert waited.ok, waited.error_text
        assert waited.value < 10
