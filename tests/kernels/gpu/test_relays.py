"""Frames that only devices looked at are passed on with all that they say: a coefficient, the next rate."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

import compactdist
from compactdist.errors import NonFiniteError
from compactdist.kernels import use
from compactdist.testing import act_like_nccl
from tests.kernels.gpu.conftest import INTERPRETED
from tests.launch import run_ranks
from tests.quick import quick_for

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="plays three ranks on CPU tensors")

RANKS, STEPS, NUMEL = 3, 6, 256


def _by_messages(group: Any, rank: int, x: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x)
    sends = dist.P2POp(dist.isend, x, (rank + 1) % RANKS, group), dist.P2POp(dist.irecv, out, (rank - 1) % RANKS, group)
    for work in dist.batch_isend_irecv(list(sends)):
        work.wait()
    return out


def _by_rotation(group: Any, rank: int, x: torch.Tensor) -> torch.Tensor:
    out, to, source = torch.empty_like(x), [0] * RANKS, [0] * RANKS
    to[(rank + 1) % RANKS] = source[(rank - 1) % RANKS] = x.numel()
    dist.all_to_all_single(out, x, source, to, group=group)
    return out


@pytest.mark.parametrize("hop", quick_for([_by_messages], [_by_messages, _by_rotation]))
@pytest.mark.parametrize(
    "options",
    [{"order": "auto"}, {"codec": "rates:rungs=scalar", "target": "nmse_db=-30"}],
    ids=["a coefficient in every frame", "rates"],
)
def test_a_tensor_is_the_same_on_all_ranks_that_it_visits(hop, options):
    def body(rank, world_size):
        with use("gpu"):
            inner = act_like_nccl(dist.group.WORLD)
            group = compactdist.wrap(inner, **{"codec": "int4", "min_numel": 64, "find_layout": False, **options})
            generator, seen = torch.Generator().manual_seed(rank), []
            x = torch.randn(NUMEL, generator=generator)
            velocity = 0.1 * torch.randn(NUMEL, generator=generator)
            for step in range(STEPS):
                # what changes more from one step to the next takes another rate
                x = x + velocity + 0.02 * 3**step * torch.randn(NUMEL, generator=generator)
                group.step()
                first = hop(group, rank, x)
                seen.append((first, hop(group, rank, first)))
            group.check()
            forwarded = group.stats().forwarded
            group.close()
        return seen, forwarded

    ranks = run_ranks(body, world_size=RANKS, timeout=100)
    for rank, (seen, forwarded) in enumerate(ranks):
        assert forwarded == (1 if "target" in options else STEPS)  # keyframes, and then residuals of other rates
        for (first, _), (_, second) in list(zip(seen, ranks[(rank + 1) % RANKS][0], strict=True))[:forwarded]:
            assert torch.equal(first, second)


def test_who_passes_on_a_keyframe_that_is_not_finite_remembers_what_its_receiver_does():
    def body(rank, world_size):
        with use("gpu"):
            inner = act_like_nccl(dist.group.WORLD)
            group = compactdist.wrap(inner, "int8", keyframe="raw", warmup_steps=2, min_numel=64, find_layout=False)
            got = []
            for step in range(3):
                x = torch.linspace(-1, 1, NUMEL) + 0.1 * step
                if step == 1:
                    x[3] = torch.nan
                group.step()
                with group.forwarding():
                    if rank == 0:
                        dist.send(x, group=group, group_dst=1)
                    else:
                        dist.recv(out := torch.empty_like(x), group=group, group_src=rank - 1)
                        got.append(out)
                    if rank == 1:  # in step 2 a tensor of its own
                        dist.send(out if step < 2 else x, group=group, group_dst=2)
            group.check()
            forwarded = group.stats().forwarded
            group.close()
        return got, forwarded

    first, *others = run_ranks(body, world_size=RANKS, timeout=100)
    assert first == ([], 0)
    assert [forwarded for _, forwarded in others] == [2, 0]
    for (_, key, residual), _ in others:
        assert key.isnan().nonzero().tolist() == [[3]]
        assert (residual - torch.linspace(-0.8, 1.2, NUMEL)).abs().max() < 0.01


@pytest.mark.parametrize("keyframe", ["int8", "raw"])
def test_hosts_make_and_check_what_is_coded_without_error_feedback(keyframe):
    """A tensor that is not finite: both ends forget the history, and go on from a keyframe."""

    def body(rank, world_size):
        with use("gpu"):
            inner = act_like_nccl(dist.group.WORLD)
            options = {"min_numel": 64, "find_layout": False, "error_feedback": False, "keyframe": keyframe}
            group, seen = compactdist.wrap(inner, "int4", **options), []
            for step in range(7):
                x, out = torch.linspace(-1, 1, NUMEL) + 0.01 * step + rank, torch.empty(2 * NUMEL)
                if step == 3 and rank == 0:
                    x[5] = torch.nan
                group.step()
                try:
                    group.all_gather_into_tensor(out, x)
                    seen.append(bool((out.view(2, -1)[1 - rank] - (x + 1 - 2 * rank)).abs().max() < 0.2))
                except NonFiniteError:
                    seen.append("not finite")
            group.check()
            group.close()
        return seen

    expected = [True, True, True, "not finite", True, True, True]
    assert run_ranks(body, world_size=2, timeout=100) == [expected, expected]
