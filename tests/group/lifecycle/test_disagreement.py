"""Ranks that are about to do different things: an error of ours, nobody's process ends, and no value is wrong."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
import torch.distributed as td

from compactdist import Layout
from compactdist.errors import CompactDistError, PlanMismatchError
from tests.group.lifecycle import kit
from tests.group.lifecycle.test_out_of_step import NEAR, exchange, tensor
from tests.launch import run_ranks
from tests.quick import quick_for

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")

STEPS = 5
AGREE_TIMEOUT, INNER_TIMEOUT = 1.0, 3.0


class Behaviour:
    """What a rank does, to be overridden: by default the same as every other rank."""

    def __init__(self, rank):
        self.rank = rank

    options: ClassVar[dict] = {}

    def policy(self, call):
        return None

    def layouts(self, call):
        return None

    def before(self, dist, step):
        """What comes before the call of a step."""
        dist.step()

    def name(self, step):
        """Name of the key around the call."""
        return "same"


def by_rank(**answers):
    """A behaviour with a policy: answers by rank and, optionally, from a step on."""

    class Answers(Behaviour):
        start = answers.pop("start", 0)

        def policy(self, call):
            return answers.get(f"rank{self.rank}") if call.step >= self.start else None

    return Answers


def steps_of(rank, what, **given):
    class Steps(Behaviour):
        options = given

        def before(self, dist, step):
            if self.rank == rank and what == "missed" and step == 2:
                return
            if self.rank == rank and what == "never":
                return
            dist.step()
            if self.rank == rank and what == "extra" and step == 2:
                dist.step()

    return Steps


def resets_of(*places):
    """``places``: for each rank, the step before which it resets."""

    class Resets(Behaviour):
        def before(self, dist, step):
            if places[self.rank] == step:
                dist.reset()
            dist.step()

    return Resets


def cuts(*hints):
    class Cuts(Behaviour):
        def layouts(self, call):
            return hints[self.rank]

    return Cuts


class OtherKey(Behaviour):
    def name(self, step):
        return "other" if self.rank == 1 and step == 2 else "same"


ROWS, TRANSPOSED = Layout("(s d) -> 1 s d", d=64), Layout("(s d) -> 1 d s", d=64)
KINDS = {
    "int8 here, int4 there": by_rank(rank0="int8", rank1="int4"),
    "rank 0 passes": by_rank(rank0="pass"),
    "rank 1 passes": by_rank(rank1="pass"),
    "rank 0 passes from step 2": by_rank(rank0="pass", start=2),
    "rank 1 passes from step 2": by_rank(rank1="pass", start=2),
    "transposed on one rank": cuts(ROWS, TRANSPOSED),
    "no layout on one rank": cuts(ROWS, None),
    "the same cut in other words": cuts(ROWS, Layout("(rows d) -> 1 rows d", d=64)),
    "step missed on rank 0": steps_of(0, "missed"),
    "step missed on rank 1": steps_of(1, "missed"),
    "step never called on rank 0": steps_of(0, "never"),
    "step never called on rank 1": steps_of(1, "never"),
    "an extra step": steps_of(1, "extra"),
    "step missed in the warm-up": steps_of(1, "missed", warmup_steps=4),
    "an extra step in the warm-up": steps_of(0, "extra", warmup_steps=4),
    "reset on rank 0": resets_of(2, None),
    "reset on rank 1": resets_of(None, 2),
    "resets at different steps": resets_of(2, 3),
    "another key": OtherKey,
}


def outcome(dist, op, rank, step):
    try:
        arrived = exchange(dist, op, rank, step)
    except CompactDistError as error:
        return f"refused: {error}"
    except RuntimeError as error:
        return f"failed: {error}"
    return "right" if all(kit.nmse(y, tensor(peer, step)) < NEAR for peer, y in arrived.items()) else "wrong"


@pytest.mark.parametrize("op", quick_for(["gather"], ["gather", "ring", "all_to_all", "broadcast"]))
@pytest.mark.parametrize("kind", quick_for(list(KINDS)[::2], KINDS))
def test_a_disagreement(op, kind):
    def body(rank, world):
        does, results = KINDS[kind](rank), []
        with kit.wrap(
            codec="int8", policy=does.policy, layouts=does.layouts, agree_timeout=AGREE_TIMEOUT, **does.options
        ) as dist:
            for step in range(STEPS):
                does.before(dist, step)
                with dist.key(does.name(step)):
                    results.append(outcome(dist, op, rank, step))
                if results[-1].startswith("failed"):
                    break
        return results

    outcomes = run_ranks(body, pg_timeout=INNER_TIMEOUT, timeout=50, expect_error=True)
    told = "\n".join(f"rank {o.rank}: {o.value or o.error_text}" for o in outcomes)
    assert all(o.ok for o in outcomes), told
    assert not any("wrong" in o.value for o in outcomes), told
    if kind != "the same cut in other words":
        assert any(r.startswith("refused") for o in outcomes for r in o.value), told


@pytest.mark.parametrize("op", ["gather", "all_to_all", "broadcast"])
@pytest.mark.parametrize("when", [0, 2])
def test_after_a_disagreement_a_reset_makes_every_call_right(op, when):
    """Policies differ in one step; both ranks raise, refuse what follows, and begin again after the reset."""

    def body(rank, world):
        differs = [False]

        def policy(call):
            return ("int2", "int4")[rank] if differs[0] else None

        with kit.wrap(codec="int8", policy=policy) as dist:
            for step in range(when):
                dist.step()
                assert outcome(dist, op, rank, step) == "right"
            differs[0] = True
            dist.step()
            first = outcome(dist, op, rank, when)
            assert first.startswith("refused"), first
            assert "reset() on all ranks" in first
            differs[0] = False
            dist.step()
            if op != "all_to_all":
                assert "since the last reset()" in outcome(dist, op, rank, when + 1)
            dist.reset()
            for step in range(4):
                dist.step()
                assert outcome(dist, op, rank, step) == "right"
            dist.check()

    run_ranks(body, pg_timeout=20)


def test_after_a_call_that_a_peer_does_not_make_no_collective_meets_another_one():
    """Rank 1 has sent its frame when rank 0 gives up: what rank 0 sent next would meet it on the inner group."""
    others = {
        "check": lambda dist: dist.check(),
        "agree": lambda dist: dist.agree(True),
        "barrier": lambda dist: td.barrier(group=dist),
        "what passes through": lambda dist: kit.gather(dist, torch.arange(4096)),
        "a small one": lambda dist: kit.gather(dist, torch.ones(4)),
    }

    def body(rank, world):
        with kit.wrap(codec="int8", agree_timeout=AGREE_TIMEOUT) as dist:
            for step in range(3):
                dist.step()
                assert outcome(dist, "gather", rank, step) == "right"
            dist.step()
            if rank == 0:
                with dist.key("extra"):
                    assert outcome(dist, "gather", rank, 3).startswith("refused")
                for call in others.values():
                    with pytest.raises(PlanMismatchError, match=r"since the last reset\(\).* What happened then: "):
                        call(dist)
            else:
                assert not outcome(dist, "gather", rank, 3).startswith("right")
                return

    outcomes = run_ranks(body, pg_timeout=INNER_TIMEOUT, timeout=50, expect_error=True)
    assert all(o.ok for o in outcomes), [o.error_text for o in outcomes]
