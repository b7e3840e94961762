"""A closed group, used all the same: by torch.distributed's functions, functionally, compiled, by its bare name."""

from __future__ import annotations

import gc
import os
import weakref

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch.distributed import distributed_c10d as c10d

import compactdist
from compactdist.errors import ClosedGroupError
from tests.group.kit import NUMEL, close, data, gathered
from tests.launch import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:torch.*")

SAID = r"group 'compactdist:0:1', rank [01]: the wrapped group was closed; wrap the inner group again"


def _by_torch(g, rank, size):
    x, out = data(rank), torch.empty(size * NUMEL)
    parts = [torch.empty(NUMEL) for _ in range(size)]
    return {
        "all_gather": lambda: dist.all_gather(parts, x, group=g),
        "all_gather_into_tensor": lambda: dist.all_gather_into_tensor(out, x, group=g),
        "all_to_all_single": lambda: dist.all_to_all_single(torch.empty(NUMEL), x, group=g),
        "all_reduce": lambda: dist.all_reduce(x, group=g),
        "broadcast": lambda: dist.broadcast(x, 0, group=g),
        "isend": lambda: dist.isend(x, 1 - rank, group=g),
        "irecv": lambda: dist.irecv(x, 1 - rank, group=g),
        "batch_isend_irecv": lambda: dist.batch_isend_irecv([dist.P2POp(dist.isend, x, 1 - rank, group=g)]),
        "all_gather_object": lambda: dist.all_gather_object([None] * size, 1, group=g),
        "barrier": lambda: dist.barrier(group=g),
        "get_rank": lambda: dist.get_rank(g),
        "get_process_group_ranks": lambda: dist.get_process_group_ranks(g),
        "destroy_process_group": lambda: dist.destroy_process_group(g),
    }


def _by_name(g, rank, size):
    x, name = data(rank), g.group_name
    ops = torch.ops._c10d_functional
    return {
        "funcol.all_gather_tensor": lambda: funcol.all_gather_tensor(x, 0, g),
        "funcol.all_to_all_single": lambda: funcol.all_to_all_single(x, None, None, g),
        "funcol.all_reduce": lambda: funcol.all_reduce(x, "sum", g),
        "funcol.broadcast": lambda: funcol.broadcast(x, 0, g),
        "ops.all_gather_into_tensor": lambda: ops.all_gather_into_tensor(x, size, name),
        "ops.all_gather_into_tensor_coalesced": lambda: ops.all_gather_into_tensor_coalesced([x, x], size, name),
        "ops.all_to_all_single": lambda: ops.all_to_all_single(x, [NUMEL // size] * size, [NUMEL // size] * size, name),
        "ops.reduce_scatter_tensor": lambda: ops.reduce_scatter_tensor(x, "sum", size, name),
    }


def test_every_use_says_that_it_is_closed():
    def body(rank, size):
        g = compactdist.wrap(codec="int8", min_numel=64)
        g.step()
        g.close()
        with pytest.raises(ClosedGroupError, match="was closed; wrap the inner group again"):
            compactdist.wrap(g)
        for what, call in {**_by_torch(g, rank, size), **_by_name(g, rank, size)}.items():
            try:
                with pytest.raises(ClosedGroupError, match=SAID):
                    call()
            except BaseException as error:
                raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
        assert isinstance(g, compactdist.CompressedProcessGroup)
        assert {g: 1}[g] == 1  # a table of the user's own still takes it
        dist.barrier()
        assert not any(g is known for known in c10d._world.pg_map)
        g.close()
        dist.destroy_process_group()

    run_ranks(body, timeout=40)


def test_compiled_code_says_so_too():
    def body(rank, size):
        g = compactdist.wrap(codec="int8", min_numel=64)
        functional = torch.compile(lambda x: funcol.all_gather_tensor(x, 0, g) + 0, backend="aot_eager", fullgraph=True)

        def with_output(x):
            out = torch.empty(size * NUMEL)
            dist.all_gather_into_tensor(out, x, group=g)
            return out + 0

        rewritten = torch.compile(with_output, backend="aot_eager")
        for compiled in functional, rewritten:
            with g.step():
                assert close(compiled(data(rank)), gathered(size))
        never_run = torch.compile(with_output, backend="aot_eager")
        g.close()
        for compiled in functional, rewritten, never_run:
            with pytest.raises(ClosedGroupError, match=SAID):
                compiled(data(rank))

    run_ranks(body, timeout=50)


def test_nothing_is_left_of_500_groups():
    def body(rank, size):
        world = c10d._world
        tables = [world.pg_map, world.pg_names, world.pg_group_ranks, world.pg_backend_config]
        tables += [world.pg_to_tag, world.tags_to_pg, world.pg_coalesce_state]
        before = [len(table) for table in tables]
        names, groups = [], []
        for _ in range(500):
            g = compactdist.wrap(codec="int8")
            names.append(g.group_name)
            groups.append(weakref.ref(g))
            g.close()
        assert [len(table) for table in tables] == before
        last = names.pop()
        assert c10d._resolve_process_group(last) is g  # held, so found
        del g
        gc.collect()
        assert not any(group() for group in groups)
        for name in (*names, last):
            with pytest.raises(RuntimeError, match="Could not resolve"):  # a name still there "has been destroyed"
                c10d._resolve_process_group(name)

    run_ranks(body, 1, timeout=50)


def test_a_new_group_of_the_same_name_outlives_a_closed_one():
    def body(rank, size):
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        old = compactdist.wrap(codec="int8", min_numel=64)
        name = old.group_name
        old.close()
        dist.destroy_process_group()
        with pytest.raises(RuntimeError, match="Could not resolve"):
            c10d._resolve_process_group(name)
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        new = compactdist.wrap(codec="int8", min_numel=64)
        assert new.group_name == name
        del old
        gc.collect()
        assert c10d._resolve_process_group(name) is new
        dist.destroy_process_group()

    run_ranks(body, 1, init=False, timeout=30)


def test_a_closed_group_made_by_backend_name():
    """torch made and registered it, so torch destroys it: the default group can be destroyed after it was closed."""

    def body(rank, size):
        os.environ.update(COMPACTDIST_CODEC="int8", COMPACTDIST_MIN_NUMEL="64")
        dist.init_process_group("compactdist")
        sub = dist.new_group(backend="compactdist")
        for g in sub, dist.group.WORLD:
            with g.step():
                dist.all_gather_into_tensor(torch.empty(size * NUMEL), data(rank), group=g)
            g.close()
            known = "get_rank", "get_process_group_ranks", "destroy_process_group"
            calls = {**_by_torch(g, rank, size), **_by_name(g, rank, size)}
            for call in (call for what, call in calls.items() if what not in known):
                with pytest.raises(ClosedGroupError, match="was closed"):
                    call()
        dist.destroy_process_group(sub)
        dist.destroy_process_group()
        assert not dist.is_initialized()

    run_ranks(body, 2, init=False, timeout=40)
