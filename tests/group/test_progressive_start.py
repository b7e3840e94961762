"""A coarse keyframe, then finer residuals than later ones: rules by step, over one history."""

from __future__ import annotations

import torch

import compactdist
from compactdist import Rule
from tests.launch import run_ranks

STEPS, ROWS, CHANNELS = 5, 128, 64
PROGRESSIVE = [Rule("int4", last_step=1)]


def _play(rank: int, world_size: int) -> dict[str, list[float]]:
    errors: dict[str, list[float]] = {}
    for name, keyframe, policy in (("flat", "int4", None), ("progressive", "int4", PROGRESSIVE)):
        g = torch.Generator().manual_seed(rank)
        x = torch.randn(ROWS, CHANNELS, generator=g)
        with compactdist.wrap(codec="binary", keyframe=keyframe, policy=policy, min_numel=1) as dist:
            errors[name] = []
            for _ in range(STEPS):
                x = x + 0.02 * torch.randn(ROWS, CHANNELS, generator=g)
                out = torch.empty(world_size * ROWS, CHANNELS)
                with dist.step():
                    dist.all_gather_into_tensor(out, x)
                mine = out[rank * ROWS : (rank + 1) * ROWS]
                errors[name].append(float((mine - x).norm() / x.norm()))
            dist.check()
            (site,) = dist.stats().sites.values()
            assert site.keyframes == 1  # a codec that changes goes on with the history
    return errors


def test_the_second_step_mends_the_keyframe():
    for errors in run_ranks(_play):
        flat, progressive = errors["flat"], errors["progressive"]
        assert flat[0] == progressive[0] > 0.05
        assert progressive[1] < 0.25 * flat[1]
        assert all(p < f for p, f in zip(progressive[1:], flat[1:], strict=True))
