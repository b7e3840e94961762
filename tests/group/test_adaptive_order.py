"""Order "auto" in a group: agreed, sent and decoded like any other order, with a smaller error on a steady change."""

from __future__ import annotations

import pytest
import torch

import compactdist
from compactdist.errors import ConfigError
from compactdist.group.environment import settings_from_environment
from tests.launch import run_ranks

STEPS, ROWS, CHANNELS = 8, 64, 64


def _play(rank: int, world_size: int) -> dict[str, float]:
    errors: dict[str, float] = {}
    g = torch.Generator().manual_seed(rank)
    start, slope = torch.randn(2, ROWS, CHANNELS, generator=g)
    for order in (1, "auto"):
        with compactdist.wrap(codec="binary", order=order, min_numel=1) as dist:
            for step in range(STEPS):
                x = start + 0.2 * step * slope
                out = torch.empty(world_size * ROWS, CHANNELS)
                with dist.step():
                    dist.all_gather_into_tensor(out, x)
                dist.check()
            mine = out[rank * ROWS : (rank + 1) * ROWS]
            errors[str(order)] = float((mine - x).norm() / x.norm())
            (site,) = dist.stats().sites.values()
            assert site.keyframes == 1
    return errors


def test_a_steady_change_arrives_with_less_error():
    for errors in run_ranks(_play):
        assert errors["auto"] < 0.7 * errors["1"]


def test_the_environment_knows_it():
    assert settings_from_environment({"COMPACTDIST_ORDER": "auto"}) == {"order": "auto"}
    assert settings_from_environment({"COMPACTDIST_ORDER": "2"}) == {"order": 2}
    with pytest.raises(ConfigError, match="'fast' is not an integer or auto"):
        settings_from_environment({"COMPACTDIST_ORDER": "fast"})


def test_nothing_is_predicted_where_nothing_is_lost():
    assert compactdist.Options(codec="raw", order="auto").stream.order == 0
    assert compactdist.Options(codec="int2", order="auto").stream.damping is None
