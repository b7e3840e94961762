"""The wrapped group has its own name, place in torch.distributed's books and life; the inner group is left alone."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch.distributed import distributed_c10d as c10d
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import compactdist
from compactdist.errors import ClosedGroupError
from tests.group.kit import NUMEL, Counted, close, data, gathered, replace_inner
from tests.launch import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def test_names_are_its_own_and_the_inner_group_keeps_its_name():
    def body(rank, size):
        inner = dist.group.WORLD
        before, desc = inner.group_name, inner.group_desc
        g = compactdist.wrap(codec="int8", min_numel=64)
        assert g.group_name == g.getGroupName() == c10d._get_process_group_name(g) != before
        assert c10d._resolve_process_group(g.group_name) is g
        assert g.get_group_store() is not None
        for rename in (g._set_group_name, g.setGroupName):
            rename("renamed")
            assert g.group_name == g.getGroupName() == "renamed"
        for describe in (g._set_group_desc, g.setGroupDesc):
            describe("for tests")
            assert g.group_desc == g.getGroupDesc() == "for tests"
        assert (inner.group_name, inner.group_desc) == (before, desc)
        assert c10d._resolve_process_group(before) is inner

    run_ranks(body, 1)


def test_functional_collectives_find_the_wrapper_however_it_is_named():
    def body(rank, size):
        g = compactdist.wrap(codec="int8", min_numel=64)
        mesh = DeviceMesh.from_group(g, "cpu")
        g.step()
        for group in (g, g.group_name, mesh, (mesh, 0)):
            with Counted(g) as counted:
                assert close(funcol.all_gather_tensor(data(rank), 0, group) + 0, gathered(size))
            assert (counted.compressed, counted.passed) == (1, {})
        with Counted(g) as counted:
            for group in (g.inner, g.inner.group_name):
                assert torch.equal(funcol.all_gather_tensor(data(rank), 0, group) + 0, gathered(size))
        assert (counted.compressed, counted.passed) == (0, {})

    run_ranks(body)


def test_torch_distributed_knows_it():
    def body(rank, size):
        ranks = [2, 0]
        sub = dist.new_group(ranks)
        g = compactdist.wrap(sub)
        if rank == 1:
            assert sub is dist.GroupMember.NON_GROUP_MEMBER
            assert g is sub
            return None
        assert dist.get_process_group_ranks(g) == dist.get_process_group_ranks(sub)
        assert (dist.get_rank(g), dist.get_world_size(g)) == (dist.get_rank(sub), 2)
        assert dist.get_global_rank(g, 1) == dist.get_global_rank(sub, 1)
        assert dist.get_group_rank(g, rank) == dist.get_group_rank(sub, rank)
        assert dist.get_backend(g) == "gloo"
        assert set(c10d._device_capability(g)) == set(c10d._device_capability(sub))
        assert isinstance(g, dist.ProcessGroup)
        return g.group_name

    names = run_ranks(body, 3)
    assert names[0] == names[2]


def test_names_follow_the_order_of_wrapping():
    def body(rank, size):
        names = []
        for group in (None, dist.new_group(), None):
            with compactdist.wrap(group) as g:
                names.append(g.group_name)
        return names

    one, two = run_ranks(body)
    assert one == two
    assert len(set(one)) == 3


@pytest.mark.parametrize("attempt", [copy.deepcopy, copy.copy, pickle.dumps])
def test_copies_and_pickles_fail_as_for_a_plain_group(attempt):
    def body(rank, size):
        errors = []
        for group in (dist.group.WORLD, compactdist.wrap()):
            try:
                attempt(group)
                errors.append(None)
            except Exception as error:
                errors.append(type(error))
        return [e and e.__name__ for e in errors]

    [(plain, wrapped)] = run_ranks(body, 1)
    assert plain == wrapped == "TypeError"


def test_destroying_the_wrapper_leaves_the_inner_group_alive():
    def body(rank, size):
        g = compactdist.wrap(codec="int8", min_numel=64)
        g.step()
        g.all_gather_into_tensor(torch.empty(size * NUMEL), data(rank))
        name = g.group_name
        dist.destroy_process_group(g)
        assert g not in c10d._world.pg_map
        assert name not in c10d._world.pg_names.values()
        out = torch.empty(size * NUMEL)
        dist.all_gather_into_tensor(out, data(rank))
        assert torch.equal(out, gathered(size))
        with pytest.raises((ClosedGroupError, ValueError)):
            dist.all_gather_into_tensor(out, data(rank), group=g)
        with pytest.raises(ClosedGroupError):
            g.step()
        g = compactdist.wrap(codec="int8", min_numel=64)  # and again
        g.step()
        with Counted(g) as counted:
            g.all_gather_into_tensor(out, data(rank))
        assert counted.compressed == 1
        assert g.group_name != name

    run_ranks(body)


def test_destroying_everything_ends_cleanly():
    def body(rank, size):
        g = compactdist.wrap(codec="int8", min_numel=64)
        g.step()
        g.all_gather_into_tensor(torch.empty(size * NUMEL), data(rank))
        dist.barrier()
        dist.destroy_process_group()
        assert not dist.is_initialized()
        g.close()

    run_ranks(body)


@pytest.mark.parametrize("order", ["shutdown", "abort"])
def test_shutdown_and_abort_spare_the_inner_group(order):
    def body(rank, size):
        g = compactdist.wrap()
        replace_inner(g, None)  # has neither: calling it would fail
        getattr(g, order)()
        dist.all_reduce(x := torch.ones(1))
        assert x == size

    run_ranks(body)


def test_it_can_be_the_default_group_and_new_groups_are_plain():
    def body(rank, size):
        g = compactdist.wrap(codec="int8", min_numel=64)
        c10d._update_default_pg(g)
        g.step()
        out = torch.empty(size * NUMEL)
        with Counted(g) as counted:
            dist.all_gather_into_tensor(out, data(rank))
            mesh = init_device_mesh("cpu", (size,))
            y = funcol.all_gather_tensor(data(rank), 0, (mesh, 0)) + 0
        assert counted.compressed == 2
        assert close(out, gathered(size))
        assert close(y, gathered(size))
        plain = dist.new_group(list(range(size)))
        assert not isinstance(plain, compactdist.CompressedProcessGroup)
        with Counted(g) as counted:
            dist.all_gather_into_tensor(out, data(rank), group=plain)
            assert torch.equal(out, gathered(size))
        assert counted.compressed == 0
        c10d._update_default_pg(g.inner)

    run_ranks(body)
