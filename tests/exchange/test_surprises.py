"""Tensors that change entirely without notice, under a target for an error: keyframes that nobody was told of."""

from __future__ import annotations

import math

import pytest
import torch

import compactdist
from compactdist.policy import Rule
from tests.launch import run_ranks
from tests.quick import quick_rows

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")

STEPS, CHANGE, ROWS, CHANNELS = 6, 3, 48, 64
TARGET = -26


def _values(rank: int, *, changes: bool = True) -> list[torch.Tensor]:
    """A tensor for each step, which moves slowly but for one step."""
    g = torch.Generator().manual_seed(rank)
    made, x = [], torch.randn(ROWS, CHANNELS, generator=g)
    for step in range(STEPS):
        x = x + 0.05 * torch.randn(ROWS, CHANNELS, generator=g)
        if step == CHANGE and changes:
            x = torch.randn(ROWS, CHANNELS, generator=g)
        made.append(x.clone())
    return made


def _decibels(y: torch.Tensor, x: torch.Tensor) -> float:
    return 20 * math.log10(float((y - x).norm() / x.norm()))


def _calls(dist, op: str, x: torch.Tensor, others: list[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What arrives in one call, each beside what was sent; ``others``: what each rank has."""
    rank, size = dist.rank(), dist.size()
    if op in ("all_gather_into_tensor", "parts"):
        gathered = torch.empty(size * ROWS, CHANNELS)
        dist.all_gather_into_tensor(gathered, x)
        return list(zip(gathered.chunk(size), others, strict=True))
    if op == "all_gather":
        outputs = [torch.empty(ROWS, CHANNELS) for _ in range(size)]
        dist.all_gather(outputs, x)
        return list(zip(outputs, others, strict=True))
    if op == "all_to_all_single":
        swapped = torch.empty(ROWS, CHANNELS)
        dist.all_to_all_single(swapped, x)
        return [(swapped, torch.cat([other.chunk(size)[rank] for other in others]))]
    if op == "broadcast":
        sent = x.clone()
        dist.broadcast(sent, 1)
        return [(sent, others[1])]
    if op == "all_reduce":
        summed = x.clone()
        dist.all_reduce(summed)
        return [(summed, torch.stack(others).sum(0))]
    if op == "reduce_scatter_tensor":
        chunk = torch.empty(ROWS // size, CHANNELS)
        dist.reduce_scatter_tensor(chunk, x)
        return [(chunk, torch.stack(others).sum(0).chunk(size)[rank])]
    pairs, held, seen = [], x, []
    for hop in range(1, size):  # a ring: what came is sent on
        came = torch.empty(ROWS, CHANNELS)
        pairs = [
            torch.distributed.P2POp(torch.distributed.isend, held, (rank + 1) % size, group=dist),
            torch.distributed.P2POp(torch.distributed.irecv, came, (rank - 1) % size, group=dist),
        ]
        for work in torch.distributed.batch_isend_irecv(pairs):
            work.wait()
        seen.append((came, others[(rank - hop) % size]))
        held = came
    return seen


OPS = (
    "all_gather_into_tensor",
    "all_gather",
    "parts",
    "all_to_all_single",
    "broadcast",
    "all_reduce",
    "reduce_scatter_tensor",
    "ring",
)


@pytest.mark.parametrize(
    ("op", "order"), quick_rows([(op, 1) for op in OPS], [(op, order) for op in OPS for order in (1, 2, "auto")])
)
def test_the_step_of_the_change_meets_the_target(op, order):
    def body(rank, size):
        everyones = [_values(peer, changes=peer < 2) for peer in range(size)]  # the third rank's goes on
        options = {"parts": 2} if op == "parts" else {}
        if "reduce" in op:
            options["policy"] = [Rule(codec="rates")]
        with compactdist.wrap(target=f"nmse_db={TARGET}", min_numel=64, order=order, **options) as dist:
            sent = []
            for step in range(STEPS):
                before = dist.stats().wire_bytes
                with dist.step():
                    seen = _calls(dist, op, everyones[rank][step], [values[step] for values in everyones])
                sent.append(dist.stats().wire_bytes - before)
                if step == CHANGE:  # 10 to 20 decibels above the target without a keyframe
                    for y, x in seen:
                        assert torch.equal(y, x) or _decibels(y, x) < TARGET + 1
            dist.check()
            if rank < 2 and not (op == "broadcast" and rank != 1):
                # the keyframe is counted; the ring's rank 0 passes on what the third rank has
                assert sent[CHANGE] > (0.5 if op == "ring" else 0.9) * sent[0]
                assert max(sent[CHANGE + 1 :]) < sent[CHANGE]
            assert not dist._engine.behind.sent, "what follows a stand-in is kept until the site's next call"

    run_ranks(body, 3)


def test_ranks_may_wait_in_any_order():
    """Each frame that follows goes from one rank to another: no other rank has to be there at that moment."""

    def body(rank, size):
        everyones = [[_values(10 * site + peer) for peer in range(size)] for site in range(3)]
        outputs = [torch.empty(size * ROWS, CHANNELS) for _ in range(3)]
        with compactdist.wrap(target=f"nmse_db={TARGET}", min_numel=64) as dist:
            for step in range(STEPS):
                with dist.step():
                    works = [
                        dist.all_gather_into_tensor(out, values[rank][step], async_op=True)
                        for out, values in zip(outputs, everyones, strict=True)
                    ]
                    for number in range(3):
                        works[(number + rank) % 3 if rank else 2 - number].wait()
                for out, values in zip(outputs, everyones, strict=True):
                    for chunk, theirs in zip(out.chunk(size), values, strict=True):
                        assert _decibels(chunk, theirs[step]) < TARGET + 9
            dist.check()

    run_ranks(body, 3)


def test_a_call_that_is_answered_with_its_prediction_waits_where_its_own_tensor_changed():
    def body(rank, size):
        everyones, out = [_values(peer) for peer in range(size)], torch.empty(size * ROWS, CHANNELS)
        with compactdist.wrap(target=f"nmse_db={TARGET}", min_numel=64, mode="predict-now") as dist:
            for step in range(STEPS):
                with dist.step():
                    dist.all_gather_into_tensor(out, everyones[rank][step])
                if step == CHANGE:
                    for chunk, theirs in zip(out.chunk(size), everyones, strict=True):
                        assert _decibels(chunk, theirs[step]) < TARGET
            dist.check()
            (record,) = dist.stats().sites.values()
            return record.predicted, record.keyframes

    assert run_ranks(body, 2) == [(STEPS - 2, 2)] * 2


def test_a_size_is_kept():
    """Under a target for a size no keyframe comes unannounced."""

    def body(rank, size):
        values, out = _values(rank), torch.empty(size * ROWS, CHANNELS)
        with compactdist.wrap(target="bits=2", min_numel=64) as dist:
            for x in values:
                with dist.step():
                    dist.all_gather_into_tensor(out, x)
            (record,) = dist.stats().sites.values()
            return record.keyframes

    assert run_ranks(body, 2) == [1, 1]
