"""Rings whose tensors are written to now and then: states stay equal while forwarding comes and goes."""

from __future__ import annotations

import random

import pytest
import torch

import compactdist
from tests.launch import run_ranks
from tests.lockstep import compare
from tests.lockstep.programs import DTYPES, Runner

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")


def program(draw):
    """A few phases of several steps; in a step a round or two of the same ring, in which a rank may write to what it
    received before it sends it on, and calls in between that use the same streams for something else.
    """
    chosen = {
        "codec": draw.choice(["binary", "int4", "int8", "lowrank", "raw"]),
        "order": draw.choice([0, 1, 1, 1, 2, "auto"]),
        "error_feedback": draw.choice([None, None, False]),
        "warmup_steps": draw.randrange(3),
        "min_numel": 1,
        "state_budget_bytes": draw.choice([None, None, None, 12_000]),
        "find_layout": draw.random() < 0.5,
        "state": draw.choice(["exact", "exact", "int8"]),
        "keyframe": draw.choice(["int8", "int8", "int4", "raw"]),
    }
    if chosen["order"] == 0:
        chosen["error_feedback"] = None
    actions = []
    for _ in range(3):
        writes, others, resets = (draw.choice([0, 0.2, 0.5]) for _ in range(3))
        call = {
            "do": draw.choice(["relay", "relay", "rotate"]),
            "n": draw.choice([640, 640, 130]),
            "dtype": draw.choice([torch.float32, *DTYPES]),
            "prefix": draw.choice(["", "k:a"]),
            "root": 0,
            "tag": 0,
            "later": False,
            "scale": draw.choice([1.0, 1e3]),
        }
        for _ in range(8):
            for _ in range(draw.choice([1, 1, 2])):
                actions.append({**call, "drop": draw.random() < writes, "root": draw.randrange(3)})
            actions.append({"do": "step"})
            if draw.random() < others:
                actions += [{**call, "do": "ring", "drop": False}, {"do": "step"}]
            if draw.random() < resets / 5:
                actions.append({"do": draw.choice(["reset", "reset k"])})
    return {"options": chosen, "actions": actions, "seed": draw.randrange(2**31)}


def body(rank, world_size, batch):
    out = []
    for chosen in batch:
        with compactdist.wrap(**chosen["options"]) as dist:
            dist.step()
            runner = Runner(dist, chosen["seed"])
            held = []
            for index, action in enumerate(chosen["actions"]):
                runner.run([{"do": "wait"}] * index + [action])  # data depends on the index
                if "n" not in action:
                    torch.distributed.barrier()
                    held.append(compare.of_group(dist))
            out.append((held, dist.stats().forwarded))
            torch.distributed.barrier()
    return out


def check(world_size, seed, programs, timeout=100):
    draw = random.Random(seed)
    batch = [program(draw) for _ in range(programs)]
    ranks = run_ranks(body, world_size, args=(batch,), timeout=timeout)
    for p in range(programs):
        for moment in zip(*(r[p][0] for r in ranks), strict=True):
            compare.check(list(moment))
    return sum(r[p][1] for r in ranks for p in range(programs))


@pytest.mark.slow
def test_states_stay_equal_however_forwarding_comes_and_goes():
    assert check(2, seed=2, programs=12) > 100


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("world_size", [3, 4])
def test_at_length(world_size):
    check(world_size, 1000 + world_size, programs=4, timeout=600)
