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


def test_torchs_function_is_called_where_it_does_more_than_call_the_method():
    """A coalescing manager collects calls, a mode replaces them, complex tensors are seen as real ones."""

    def body():
        with compactdist.wrap(codec="int8", min_numel=64) as g:
            x, out = data(0), torch.empty(4 * NUMEL)
            assert g._calls_method(out, x)
            assert not g._calls_method(out, x.tolist())
            assert not g._calls_method(torch.nn.Parameter(out), x)
            assert not g._calls_method(out.to(torch.complex64), x.to(torch.complex64))
            with torch.overrides.BaseTorchFunctionMode():
                assert not g._calls_method(out, x)
            with c10d._coalescing_manager(group=g, async_ops=False):
                assert not g._calls_method(out, x)
            assert g._calls_method(out, x)
            with pytest.raises(TypeError, match="input_tensor"):
                g.all_gather_into_tensor(out, None)

    on_a_fake_group(body)


def test_memory_of_frames_belongs_to_one_call_at_a_time():
    def body():
        with compactdist.wrap(codec="int8", min_numel=64) as g:
            outs = [torch.empty(4 * NUMEL) for _ in range(3)]
            rooms = g._engine.store.spares.rooms
            for seed in range(4):
                with g.step():
                    works = [
                        g.all_gather_into_tensor(out, data(0, seed=seed + i), async_op=True)
                        for i, out in enumerate(outs)
                    ]
                    for i in (2, 0, 1):
                        works[i].wait()
                        assert all(close(part, data(0, seed=seed + i)) for part in outs[i].chunk(4))
            assert len(rooms) == len({room.whole.data_ptr() for room in rooms.values()})
            assert rooms
            g.reset()
            assert not rooms

    on_a_fake_group(body)
