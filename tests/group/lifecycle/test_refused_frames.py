"""A rank that goes on after it has refused a frame ends no other rank, although it no longer knows their sizes."""

from __future__ import annotations

import pytest
import torch
import torch.distributed

import compactdist
from compactdist.errors import FrameError
from compactdist.testing import Fault, inject
from tests.launch import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")

N = 4096
REMEMBERED = r"rank 1, site .*frame from rank 0.*: an earlier frame was refused.*Nothing was sent; call reset\(\)"


def exchange(dist, op, rank, step):
    """One call; what arrived from rank 0, and what it sent."""
    x = torch.randn(2, N, generator=torch.Generator().manual_seed(0)) + step
    own = x if rank == 0 else torch.zeros(2, N)
    if op == "broadcast":
        dist.broadcast(own, 0)
        return own, x
    if op == "all_to_all":
        out = torch.empty(2, N)
        dist.all_to_all_single(out, own)
        return out[0], x[rank]
    out = torch.empty(4, N)
    dist.all_gather_into_tensor(out, own)
    return out[:2], x


def damaged(rank, op, nth):
    """A group on which a byte of rank 0's payload of call ``nth`` is flipped on its way."""
    faults = [Fault("flip", op, nth=nth, byte=200)] if rank == 0 else []
    return inject(torch.distributed.group.WORLD, faults)


@pytest.mark.parametrize(
    ("op", "options", "nth"),
    [
        ("all_gather", {"codec": "int4"}, 0),  # a keyframe: it is due again, and other ranks send residuals
        ("all_gather", {"codec": "int4", "parts": 2}, 0),
        ("all_gather", {"target": "bits=2"}, 1),  # a residual that announced a rate
        pytest.param("all_to_all", {"target": "bits=2"}, 1, marks=pytest.mark.slow),
        pytest.param("broadcast", {"target": "bits=2"}, 1, marks=pytest.mark.slow),
    ],
)
def test_who_goes_on_sends_nothing_of_another_size(op, options, nth):
    """The inner group ended a process that had done nothing wrong: gloo aborts on frames of different sizes."""

    def body(rank, size):
        errors: list[Exception | None] = []
        dist = compactdist.wrap(damaged(rank, op, nth), agree_timeout=2, **options)
        for t in range(nth + 3):
            dist.step()
            try:
                exchange(dist, op, rank, t)
                errors.append(None)
            except Exception as error:
                errors.append(error)
        assert errors[:nth] == [None] * nth
        if rank == 1:
            assert "the payload is damaged" in str(errors[nth])
            for error in errors[nth + 1 :]:
                with pytest.raises(FrameError, match=REMEMBERED):
                    raise error
        else:
            assert errors[nth] is None
            assert all(errors[nth + 1 :])  # an error, in time

    run_ranks(body, pg_timeout=4)


@pytest.mark.parametrize("options", [{"codec": "int4"}, {"codec": "int4", "parts": 2}, {"target": "bits=2"}])
def test_a_reset_on_all_ranks_begins_anew(options):
    def body(rank, size):
        dist = compactdist.wrap(damaged(rank, "all_gather", 0), **options)
        dist.step()
        if rank == 1:
            with pytest.raises(FrameError, match="the payload is damaged"):
                exchange(dist, "all_gather", rank, 0)
        else:
            exchange(dist, "all_gather", rank, 0)
        dist.reset()
        for t in range(3):
            dist.step()
            got, sent = exchange(dist, "all_gather", rank, t)
            assert float((got - sent).norm() / sent.norm()) < 0.3
        dist.check()

    run_ranks(body, pg_timeout=10)
