"""torch.compile: full graphs communicate compressed, once per run; what a plain group cannot compile we cannot."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch.distributed.device_mesh import DeviceMesh

import compactdist
from compactdist import _torch
from tests.group.kit import Counted, close
from tests.launch import run_ranks
from tests.quick import quick_for

pytestmark = pytest.mark.filterwarnings("ignore")  # Dynamo and Inductor warn of themselves

ROWS, COLUMNS = 32, 8


def tensor(rank, seed=0):
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(100 * seed + rank))


def functions(g):
    """Name -> a function of one tensor that communicates once on the group."""
    mesh, name, size = DeviceMesh.from_group(g, "cpu"), g.group_name, g.size()
    splits = [ROWS // size] * size

    def gather_by_group(x):
        return funcol.all_gather_tensor(x * 2, 0, g) + 1

    def gather_by_name(x):
        return funcol.all_gather_tensor(x * 2, 0, name) + 1

    def gather_by_mesh(x):
        return funcol.all_gather_tensor(x * 2, 0, (mesh, 0)) + 1

    def exchange_by_group(x):
        return funcol.all_to_all_single(x * 2, splits, splits, g) + 1

    def exchange_by_name(x):
        return funcol.all_to_all_single(x * 2, None, None, name) + 1

    def all_gather_into_tensor(x):
        out = x.new_empty(size * ROWS, COLUMNS)
        dist.all_gather_into_tensor(out, x * 2, group=g)
        return out + 1

    def all_gather(x):
        out = [torch.empty_like(x) for _ in range(size)]
        dist.all_gather(out, x * 2, group=g)
        return torch.cat(out) + 1

    def all_to_all_single(x):
        out = torch.empty_like(x)
        dist.all_to_all_single(out, x * 2, group=g)
        return out + 1

    def all_reduce(x):
        y = x * 2
        dist.all_reduce(y, group=g)
        return y + 1

    return {f.__name__: f for f in list(locals().values()) if callable(f) and hasattr(f, "__code__")}


def unfit(g):
    """What Dynamo does not take into a full graph, on any group."""
    peer = 1 - g.rank()

    def asynchronous(x):
        out = x.new_empty(2 * ROWS, COLUMNS)
        work = dist.all_gather_into_tensor(out, x * 2, group=g, async_op=True)
        y = x.sin()
        work.wait()
        return out + 0 * y.sum()

    def batch(x):
        out = torch.empty_like(x)
        ops = [dist.P2POp(dist.isend, x * 2, peer, group=g), dist.P2POp(dist.irecv, out, peer, group=g)]
        for work in dist.batch_isend_irecv(ops):
            work.wait()
        return out + 1

    def point_to_point(x):
        out = torch.empty_like(x)
        receive = dist.irecv(out, peer, group=g)
        dist.isend(x * 2, peer, group=g).wait()
        receive.wait()
        return out + 1

    functions = {"asynchronous": asynchronous}
    if _torch.VERSION >= (2, 12):  # before, Dynamo fails on a point-to-point call of any subclass of ProcessGroup
        functions |= {"batch": batch, "point_to_point": point_to_point}
    return functions


def compiled(function, backend, fullgraph):
    torch._dynamo.reset()
    return torch.compile(function, backend=backend, fullgraph=fullgraph)


def check(backend, only=None):
    def body(rank, size):
        g = compactdist.wrap(codec="int8", min_numel=64)
        plain = functions(g.inner)
        for name, function in functions(g).items():
            if only is not None and name not in only:
                continue
            run = compiled(function, backend, fullgraph=True)
            g.reset()
            for seed in range(3):
                g.step()
                with Counted(g) as counted:
                    y = run(tensor(rank, seed))
                expected = (0, {("all_reduce", "op"): 1}) if name == "all_reduce" else (1, {})
                assert (counted.compressed, counted.passed) == expected, f"{name} {seed}"
                assert close(y, plain[name](tensor(rank, seed))), name

    run_ranks(body, timeout=100, pg_timeout=60)


@pytest.mark.parametrize("backend", quick_for(["eager"], ["eager", "aot_eager"]))
def test_full_graphs_are_compressed_on_every_run(backend):
    check(backend)


@pytest.mark.slow
def test_full_graphs_of_inductor():
    check("inductor")


@pytest.mark.slow
def test_a_full_graph_of_inductor():
    check("inductor", only=["gather_by_name", "all_to_all_single"])


def test_graph_breaks_do_not_crash_and_are_compressed():
    def body(rank, size):
        g = compactdist.wrap(codec="int8", min_numel=64)
        plain = unfit(g.inner)
        for name, function in unfit(g).items():
            run = compiled(function, "aot_eager", fullgraph=False)
            g.reset()
            for seed in range(3):
                g.step()
                with Counted(g) as counted:
                    y = run(tensor(rank, seed))
                assert (counted.compressed, counted.passed) == (1, {}), f"{name} {seed}"
                assert close(y, plain[name](tensor(rank, seed))), name

    run_ranks(body, timeout=100, pg_timeout=60)


def test_what_does_not_compile_whole_does_not_on_a_plain_group_either():
    def body(rank, size):
        g = compactdist.wrap(codec="int8", min_numel=64)
        g.step()
        told = []
        for group in (g.inner, g):
            for name, function in unfit(group).items():
                try:
                    compiled(function, "eager", fullgraph=True)(tensor(rank))
                    told.append((name, "compiles"))
                except Exception as error:
                    told.append((name, type(error).__name__))
        assert g.stats().compressed_calls == 0
        return told

    told, _ = run_ranks(body, timeout=100, pg_timeout=60)
    assert told[: len(told) // 2] == told[len(told) // 2 :]
    assert dict(told)["asynchronous"] != "compiles"
