"""A rank's own chunk of an all-gather, which its encoder writes: what all others decode, wherever that is to go."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist

import compactdist
from compactdist.testing import Fault, inject
from compactdist.testing.faults import PlannedFaultError
from tests.launch import run_ranks
from tests.quick import quick_for

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:torch.*")

NUMEL, STEPS = 1 << 15, 4
SETTINGS = {
    "int4": {},
    "int8:scales=token_history": {"parts": 2},
    "int2:scales=block": {"order": 2},
    "topk": {"order": "auto"},
    "lowrank": {"state": "int8"},
    "transform": {},
    "rates": {"target": "bits=3"},
}


def tensor(rank, step):
    made = torch.Generator().manual_seed(7 + rank)
    first, change = torch.randn(2, NUMEL, generator=made)
    return first + 0.1 * step * change


@pytest.mark.parametrize("codec", quick_for(list(SETTINGS)[::3], SETTINGS))
def test_all_ranks_hold_the_same_bytes(codec):
    """Over its input, beside it, at an odd address, in a list, not contiguous; at once and later."""

    def body(rank, size):
        g = compactdist.wrap(codec=codec, min_numel=64, **SETTINGS[codec])
        outs = []
        for (form, later), step in itertools.product(
            itertools.product(("beside", "over", "odd", "list", "strided"), (False, True)), range(STEPS)
        ):
            with g.key(f"{form} {later}"):
                g.step()
                x = tensor(rank, step)
                room = torch.full((size * NUMEL + 1,), torch.nan)
                out = room[1:] if form == "odd" else room[:-1]
                if form == "over":
                    x = out.view(size, -1)[rank].copy_(x)
                if form in ("list", "strided"):
                    out = torch.full((NUMEL, size), torch.nan).T if form == "strided" else out.view(size, -1)
                    work = dist.all_gather(list(out), x, group=g, async_op=later)
                else:
                    work = dist.all_gather_into_tensor(out, x, group=g, async_op=later)
                if later:
                    if form != "over":
                        x.fill_(torch.nan)  # the caller's again
                    work.wait()
            outs.append(out.reshape(-1).clone())
        g.check()
        g.close()
        return outs

    for one, other in zip(*run_ranks(body, 2), strict=True):
        assert not bool(one.isnan().any())
        assert torch.equal(one, other)


@pytest.mark.parametrize("parts", [1, 2])
def test_a_call_that_fails_leaves_the_input_it_was_to_be_written_over(parts):
    def body(rank, size):
        g = compactdist.wrap(
            inject(dist.group.WORLD, [Fault("raise", "all_gather", 3 * parts)]), codec="int4", parts=parts
        )
        for step in range(5):
            g.step()
            out = torch.full((size * NUMEL,), torch.nan)
            x = out.view(size, -1)[rank].copy_(tensor(rank, step))
            before = x.clone()
            if step == 3:
                with pytest.raises(PlannedFaultError):
                    dist.all_gather_into_tensor(out, x, group=g)
                assert torch.equal(x, before)
                g.reset()
            else:
                dist.all_gather_into_tensor(out, x, group=g)
                assert float((x - before).abs().max()) < 0.5
                assert step in (0, 4) or not torch.equal(x, before)
        g.close()

    run_ranks(body, 2)
