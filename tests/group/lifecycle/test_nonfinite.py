"""NaN and Inf: named where a coded frame is due, delivered where a raw keyframe is, and gone with the next keyframe."""

from __future__ import annotations

import math

import pytest
import torch

from compactdist.errors import NonFiniteError
from tests.group.lifecycle import kit
from tests.launch import run_ranks
from tests.lockstep import compare
from tests.quick import quick_for

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")

OPS = ["gather", "to all", "broadcast", "ring"]
FRAMES = [(0, 2), (1, 2), (2, 2), (1, 0)]
"""Order, and the step: of a residual, at last of a coded keyframe."""


def call(dist, op, x):
    """Every op with rank 1 as the only interesting sender; returns the outputs."""
    rank, world = dist.rank(), dist.size()
    if op == "gather":
        return kit.gather(dist, x)
    if op == "to all":
        out = torch.full((world * kit.N,), 7.0)
        dist.all_to_all_single(out, x.repeat(world))
        return out
    if op == "broadcast":
        y = x.clone()
        dist.broadcast(y, src=1)
        return y
    y = torch.full((kit.N,), 7.0)
    works = [dist.irecv(y, (rank - 1) % world), dist.isend(x, (rank + 1) % world)]
    errors = []
    for work in works:
        try:
            work.wait()
        except NonFiniteError as error:
            errors.append(error)
    if errors:
        raise errors[0]
    return y


@pytest.mark.parametrize("op", quick_for(OPS[::2], OPS))
@pytest.mark.parametrize(("order", "when"), FRAMES, ids=str)
def test_a_nonfinite_residual_or_coded_keyframe_is_named_on_every_rank(op, order, when):
    """With NaN and infinity in turn: every operation and every kind of frame has both."""
    bad = (float("nan"), float("inf"))[(OPS.index(op) + FRAMES.index((order, when))) % 2]

    def body(rank, world_size):
        with kit.wrap(order=order) as dist:
            for t in range(6):
                dist.step()
                with dist.key("other"):
                    kit.gather(dist, kit.tensor(rank, t))
                x = kit.tensor(rank, t)
                if t == when and rank == 1:
                    x[5] = bad
                meets = op != "ring" or rank in (1, 2)
                if t == when and meets:
                    with pytest.raises(NonFiniteError) as caught:
                        call(dist, op, x)
                    text = str(caught.value)
                    assert "site '" in text
                    assert "#0" in text
                    assert "NaN" in text
                    to = "all ranks" if op in ("gather", "broadcast") else "rank "
                    assert ("from rank 1" if rank != 1 else f"sending to {to}") in text, text
                else:
                    call(dist, op, x)
            shown = kit.keyframes(dist)
            assert shown["other/all_gather#0"] == (6, 1)
            if op == "gather":
                assert shown["all_gather#0"][1] >= 2
            return kit.finish(dist)

    compare.check(run_ranks(body, world_size=3))


@pytest.mark.parametrize("op", OPS)
def test_nan_in_a_raw_keyframe_is_delivered(op):
    def body(rank, world_size):
        with kit.wrap(sample_errors_every=1, keyframe="raw") as dist:
            for t in range(5):
                dist.step()
                x = kit.tensor(rank, t)
                if t == 0 and rank == 1:
                    x[5] = float("nan")
                    x[6] = float("inf")
                y = call(dist, op, x)
                receives = {"gather": True, "to all": True, "broadcast": True, "ring": rank == 2}[op]
                assert bool(torch.isnan(y).any()) == (t == 0 and receives)
            for site in dist.stats().sites.values():
                if site.sampled:
                    assert math.isfinite(site.error_energy), "a NaN does not spoil the measured error"
                    assert math.isfinite(site.energy)
                    assert site.nmse_db < -10
            return kit.finish(dist)

    compare.check(run_ranks(body, world_size=3))
