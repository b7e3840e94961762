"""With codec raw every result is the plain group's, bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import compactdist
from tests.launch import run_ranks
from tests.lockstep import compare
from tests.lockstep.programs import Runner, actions
from tests.quick import quick_for

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")

BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


def any_bits(seed, index, rank, n, dtype, scale):
    """Any bit pattern: infinities and NaNs with all their payloads among them."""
    g = torch.Generator().manual_seed((seed * 31 + index * 7 + rank) % 2**40)
    whole = BITS[dtype]
    info = torch.iinfo(whole)
    bits = torch.randint(info.min, info.max, (n,), generator=g, dtype=whole)
    if n > 2:
        bits[:2] = torch.tensor([float("nan"), -0.0], dtype=dtype).view(whole)
    return bits.view(dtype)


def body(rank, world_size, batch):
    out = []
    for local, seed, program in batch:
        program = [{**action, "drop": False} for action in program]
        plain = torch.distributed.group.WORLD
        expected = Runner(plain, seed, any_bits).run(program)
        with compactdist.wrap(codec="raw", min_numel=1, local=local) as dist:
            dist.step()
            got = Runner(dist, seed, any_bits).run(program)
            stats = dist.stats()
            assert set(stats.passed_reasons) <= {"small"}, stats.passed_reasons
            assert stats.state_bytes == 0
            torch.distributed.barrier()
        assert got.keys() == expected.keys()
        for index in got:
            ours, theirs = ([compare.digest(t) for t in tensors[index]] for tensors in (got, expected))
            assert ours == theirs, program[index]
        out.append(len(got))
    return out


UNSHRUNK = (Phase.explicit, Phase.generate)  # a failing run costs seconds: shrinking would cost minutes
batches = st.lists(
    st.tuples(st.sampled_from(["exact", "reconstructed"]), st.integers(0, 2**31), actions),
    min_size=6,
    max_size=6,
)


@pytest.mark.parametrize("world_size", quick_for([2], [2, 3]))
@settings(max_examples=4, phases=UNSHRUNK)
@given(batch=batches)
def test_raw_is_the_plain_group(world_size, batch):
    run_ranks(body, world_size, args=(batch,), timeout=40)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("world_size", [2, 3])
@settings(max_examples=8, phases=UNSHRUNK)
@given(batch=batches)
def test_raw_is_the_plain_group_at_length(world_size, batch):
    run_ranks(body, world_size, args=(batch,), timeout=40)
