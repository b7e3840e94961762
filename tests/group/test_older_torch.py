"""Names that older versions of torch lack, taken away: wrapping works without them."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch.distributed import distributed_c10d as c10d

import compactdist
from tests.group.kit import NUMEL, Counted, close, data, gathered
from tests.launch import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def _known_of(g):
    """What torch.distributed has written down of a group."""
    world = c10d._world
    tag = world.pg_to_tag[g]
    name = world.pg_names[g]
    return {
        "map": (world.pg_map[g][0], world.pg_map[g][1] is world.pg_map[g.inner][1]),
        "config": world.pg_backend_config[g],
        "ranks": world.pg_group_ranks[g],
        "tag": tag.replace(name, "NAME"),
        "by tag": world.tags_to_pg[tag] == [g],
        "name": name == g.group_name,
        "by name": c10d._resolve_process_group(name) is g,
    }


def _entries():
    world = c10d._world
    tables = ("pg_map", "pg_names", "pg_backend_config", "pg_group_ranks", "pg_to_tag", "tags_to_pg")
    return {table: len(getattr(world, table)) for table in tables}


def test_wrap_without_register_pg_in_world(monkeypatch):
    """As in torch 2.11."""

    def body(rank, size):
        with compactdist.wrap(codec="int8", min_numel=64) as g:
            usual = _known_of(g)
        sub = dist.new_group([0, 1])  # before, as torch 2.13 makes its own groups with that function
        before = _entries()
        monkeypatch.delattr(c10d, "_register_pg_in_world")
        for inner in (dist.group.WORLD, sub):
            with compactdist.wrap(inner, "int8", min_numel=64) as g:
                if inner is dist.group.WORLD:
                    assert _known_of(g) == usual
                assert dist.get_process_group_ranks(g) == dist.get_process_group_ranks(inner)
                for _ in range(2):
                    out = torch.empty(size * NUMEL)
                    with g.step(), Counted(g) as counted:
                        dist.all_gather_into_tensor(out, data(rank), group=g)
                        y = funcol.all_gather_tensor(data(rank), 0, g) + 0
                    assert close(out, gathered(size))
                    assert close(y, gathered(size))
                    assert counted.compressed == 2
        assert _entries() == before

    run_ranks(body, 2, timeout=40)
