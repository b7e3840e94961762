"""After any sequence of exchanges every decoder holds what its encoder holds, byte for byte."""

from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import compactdist
from compactdist.testing import act_like_nccl
from tests.launch import run_ranks
from tests.lockstep import compare
from tests.lockstep.programs import Runner, programs
from tests.quick import quick_for

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")


def body(rank, world_size, batch, nccl):
    out = []
    inner = act_like_nccl(torch.distributed.group.WORLD, delay=0) if nccl else None
    for program in batch:
        with compactdist.wrap(inner, **program["options"]) as dist:
            dist.step()
            runner = Runner(dist, program["seed"])
            results = runner.run(program["actions"])
            dist._departures.join()  # or the barrier would overtake a call that ranks have not agreed on yet
            torch.distributed.barrier()
            held = compare.of_group(dist)
            stats = dist.stats()
            kept = sum(dist._engine.arrivals.kept_bytes().values())
            assert stats.state_bytes == kept + sum(site.state_bytes for site in dist._engine.store.sites())
            digests = {i: [compare.digest(t) for t in tensors] for i, tensors in results.items()}
            torch.distributed.barrier()
        out.append((held, digests))
    return out


def check(batch, world_size, *, nccl=False):
    ranks = run_ranks(body, world_size, args=(batch, nccl), timeout=40)
    for i, program in enumerate(batch):
        compare.check([r[i][0] for r in ranks])
        check_equal_results(program, [r[i][1] for r in ranks])


def check_equal_results(program, results):
    """What is the same for all ranks arrives as the same bytes on all ranks."""
    reconstructed = program["options"]["local"] == "reconstructed"
    last = None
    for index, action in enumerate(program["actions"]):
        if action["do"] != "again":
            last = action if "n" in action else last
        elif last is not None:
            action = last
        if "n" not in action or index not in results[0]:
            continue
        parts = [r[index] for r in results]
        if action["do"] in ("gather", "gather list", "gather coalesced", "gather functional"):
            if reconstructed:
                assert all(part == parts[0] for part in parts), action
        elif action["do"] == "broadcast":
            root = action["root"] % len(results)
            receivers = [part for rank, part in enumerate(parts) if rank != root]
            assert all(part == receivers[0] for part in receivers), action


UNSHRUNK = (Phase.explicit, Phase.generate)  # a failing run costs seconds: shrinking would cost minutes
batches = st.lists(programs(), min_size=6, max_size=6)


@pytest.mark.parametrize("world_size", quick_for([2], [2, 3]))
@settings(max_examples=6, phases=UNSHRUNK)
@given(batch=batches)
def test_every_decoder_holds_what_its_encoder_holds(world_size, batch):
    check(batch, world_size)


@settings(max_examples=3, phases=UNSHRUNK)
@given(batch=batches)
def test_the_same_on_an_inner_group_with_nccls_manners(batch):
    check(batch, 2, nccl=True)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("nccl", [False, True])
@pytest.mark.parametrize("world_size", [2, 3])
@settings(max_examples=6, phases=UNSHRUNK)
@given(batch=batches)
def test_many_programs(world_size, nccl, batch):
    check(batch, world_size, nccl=nccl)
