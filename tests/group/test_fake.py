"""Torch's fake group: its ranks never meet and its store may answer nothing, so nothing is agreed on."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d
from torch.testing._internal.distributed.fake_pg import FakeStore

import compactdist
from compactdist import _torch
from compactdist.testing import act_like_nccl
from tests.group.kit import NUMEL, close, data
from tests.launch import run_ranks


def on_a_fake_group(body):
    def started(rank, size):
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
        body()

    run_ranks(started, 1, init=False, timeout=40)


def test_a_fake_group_is_known_by_its_backends():
    def body():
        assert _torch.is_fake(dist.group.WORLD)
        assert _torch.is_fake(dist.new_group([0, 1]))

    def gloo(rank, size):
        assert not _torch.is_fake(dist.group.WORLD)
        assert not _torch.is_fake(act_like_nccl(dist.group.WORLD))

    on_a_fake_group(body)
    run_ranks(gloo, 1)


@pytest.mark.parametrize("agree", ["plans", "off"])
def test_it_is_wrapped_called_and_closed_without_its_store(agree):
    def body():
        names = []
        for _ in range(2):
            with compactdist.wrap(codec="int8", min_numel=64, agree=agree) as g:
                names.append(str(g.group_name))
                out = torch.empty(4 * NUMEL)
                for seed in range(3):  # a fake rank receives what it sends
                    g.step()
                    g.all_gather_into_tensor(out, data(0, seed=seed))
                    assert all(close(part, data(0, seed=seed)) for part in out.chunk(4))
                g.reset()
                g.step()
                g.all_gather_into_tensor(out, data(0))
                g.check()
                assert g.stats().compressed_calls == 4
        assert names == ["compactdist:0:1", "compactdist:0:2"]

    on_a_fake_group(body)


def test_groups_of_a_fake_group_have_names_of_their_own():
    def body():
        world, pair = dist.group.WORLD, dist.new_group([0, 1])
        wrapped = [compactdist.wrap(group, "int8") for group in (world, pair, world)]
        assert len({str(g.group_name) for g in wrapped}) == 3
        for g in wrapped:
            assert c10d._resolve_process_group(g.group_name) is g

    on_a_fake_group(body)
