"""Strided tensors: every call gives what it gives for contiguous ones, and leaves the elements in between alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d as c10d

import compactdist
from compactdist import Rule
from compactdist.errors import BadOutputError, FrameError
from compactdist.testing import act_like_nccl
from tests.group.kit import GLOO_HAS_ALL_TO_ALL, data
from tests.launch import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*no rank on the destination.*:UserWarning")

ROWS, COLUMNS, SIZE = 8, 6, 2
BETWEEN = -7.0


def values(rank: int, rows: int = ROWS) -> Tensor:
    return data(rank, rows * COLUMNS).view(rows, COLUMNS)


class Strides:
    """Makes tensors of one kind of strides, and can tell whether what lies between their elements was written to."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._between: list[Tensor] = []

    def __call__(self, value: Tensor) -> Tensor:
        rows, columns = value.shape
        if self._kind == "transposed":
            return value.t().contiguous().t()
        if self._kind == "columns":
            base = torch.full((rows, 2 * columns), BETWEEN)
            tensor = base[:, ::2]
            self._between.append(base[:, 1::2])
        else:
            base = torch.full((rows, columns + 1), BETWEEN)
            tensor = base[:, 1:]
            self._between.append(base[:, :1])
        tensor.copy_(value)
        assert not tensor.is_contiguous()
        return tensor

    def blank(self, rows: int = ROWS) -> Tensor:
        return self(torch.zeros(rows, COLUMNS))

    def intact(self) -> bool:
        return all(bool((between == BETWEEN).all()) for between in self._between)


Case = Callable[[Any, int, Strides, bool], "list[tuple[Tensor, Tensor]]"]
CASES: dict[str, Case] = {}
"""A call on a group: group, rank, strides, whether it is asynchronous; returns pairs of equal tensors."""


def case(function: Case) -> Case:
    CASES[function.__name__] = function
    return function


def done(work: Any, wanted: bool) -> None:
    assert (work is not None) == wanted
    if work is not None:
        work.wait()


def both() -> tuple[Tensor, Tensor]:
    return values(0), values(1)


@case
def all_reduce(g, rank, strides, later):
    x = strides(values(rank))
    done(dist.all_reduce(x, group=g, async_op=later), later)
    return [(x, sum(both()))]


@case
def all_reduce_on_one_rank_strided(g, rank, strides, later):
    x = strides(values(rank)) if rank else values(rank)
    done(dist.all_reduce(x, group=g, async_op=later), later)
    return [(x, sum(both()))]


@case
def all_reduce_coalesced(g, rank, strides, later):
    xs = [strides(values(rank)), values(rank)]
    done(dist.all_reduce_coalesced(xs, group=g, async_op=later), later)
    return [(x, sum(both())) for x in xs]


@case
def broadcast(g, rank, strides, later):
    x = strides(values(rank))
    done(dist.broadcast(x, 1, group=g, async_op=later), later)
    return [(x, values(1))]


@case
def broadcast_of_an_expanded_tensor(g, rank, strides, later):
    whole = values(0)[:1].expand(ROWS, COLUMNS)
    x = whole if rank == 0 else strides.blank()
    done(dist.broadcast(x, 0, group=g, async_op=later), later)
    return [(x, whole)]


@case
def reduce(g, rank, strides, later):
    x = strides(values(rank))
    done(dist.reduce(x, 0, group=g, async_op=later), later)
    return [] if rank else [(x, sum(both()))]


@case
def all_gather(g, rank, strides, later):
    outs = [strides.blank(), strides.blank()]
    done(dist.all_gather(outs, strides(values(rank)), group=g, async_op=later), later)
    return list(zip(outs, both(), strict=True))


@case
def all_gather_into_tensor(g, rank, strides, later):
    out = strides.blank(2 * ROWS)
    done(dist.all_gather_into_tensor(out, strides(values(rank)), group=g, async_op=later), later)
    return [(out, torch.cat(both()))]


@case
def coalesced_all_gathers(g, rank, strides, later):
    outs = [strides.blank(2 * ROWS), torch.zeros(2 * ROWS, COLUMNS)]
    with c10d._coalescing_manager(group=g, async_ops=later) as manager:
        for out in outs:
            dist.all_gather_into_tensor(out, strides(values(rank)), group=g)
    if later:
        manager.wait()
    return [(out, torch.cat(both())) for out in outs]


@case
def allgather_coalesced(g, rank, strides, later):
    lists = [[strides.blank()] for _ in range(SIZE)]
    g.allgather_coalesced(lists, [strides(values(rank))]).wait()
    return [(out[0], value) for out, value in zip(lists, both(), strict=True)]


@case
def reduce_scatter(g, rank, strides, later):
    out, parts = strides.blank(), [strides(values(rank)), strides(values(rank))]
    done(dist.reduce_scatter(out, parts, group=g, async_op=later), later)
    return [(out, sum(both()))]


@case
def reduce_scatter_tensor(g, rank, strides, later):
    out = strides.blank(ROWS // SIZE)
    done(dist.reduce_scatter_tensor(out, strides(values(rank)), group=g, async_op=later), later)
    return [(out, sum(both()).chunk(SIZE)[rank])]


@case
def coalesced_reduce_scatters(g, rank, strides, later):
    outs = [strides.blank(ROWS // SIZE) for _ in range(2)]
    with c10d._coalescing_manager(group=g, async_ops=later) as manager:
        for out in outs:
            dist.reduce_scatter_tensor(out, strides(values(rank)), group=g)
    if later:
        manager.wait()
    return [(out, sum(both()).chunk(SIZE)[rank]) for out in outs]


@case
def all_to_all(g, rank, strides, later):
    outs, parts = [strides.blank(4), strides.blank(4)], [strides(x) for x in values(rank).chunk(SIZE)]
    done(dist.all_to_all(outs, parts, group=g, async_op=later), later)
    return [(out, value.chunk(SIZE)[rank]) for out, value in zip(outs, both(), strict=True)]


@case
def all_to_all_single(g, rank, strides, later):
    out = strides.blank()
    done(dist.all_to_all_single(out, strides(values(rank)), group=g, async_op=later), later)
    return [(out, torch.cat([value.chunk(SIZE)[rank] for value in both()]))]


@case
def all_to_all_single_uneven(g, rank, strides, later):
    out, arriving = strides.blank(6 if rank == 0 else 10), [3, 3] if rank == 0 else [5, 5]
    done(dist.all_to_all_single(out, strides(values(rank)), arriving, [3, 5], group=g, async_op=later), later)
    return [(out, torch.cat([value.split([3, 5])[rank] for value in both()]))]


@case
def gather(g, rank, strides, later):
    outs = [strides.blank(), strides.blank()] if rank == 0 else None
    done(dist.gather(strides(values(rank)), outs, dst=0, group=g, async_op=later), later)
    return list(zip(outs or [], both(), strict=rank == 0))


@case
def scatter(g, rank, strides, later):
    out, parts = strides.blank(), [strides(value) for value in both()] if rank == 0 else None
    done(dist.scatter(out, parts, src=0, group=g, async_op=later), later)
    return [(out, values(rank))]


@case
def send_and_recv(g, rank, strides, later):
    x = strides(values(0)) if rank == 0 else strides.blank()
    if later:
        (dist.isend if rank == 0 else dist.irecv)(x, 1 - rank, group=g).wait()
    else:
        (dist.send if rank == 0 else dist.recv)(x, 1 - rank, group=g)
    return [(x, values(0))]


@case
def recv_from_any_source(g, rank, strides, later):
    x = strides(values(0)) if rank == 0 else strides.blank()
    if rank == 0:
        dist.send(x, 1, group=g)
    else:
        assert dist.recv(x, group=g) == 0
    return [(x, values(0))]


@case
def batch_isend_irecv(g, rank, strides, later):
    x, out = strides(values(rank)), strides.blank()
    ops = [dist.P2POp(dist.isend, x, 1 - rank, g), dist.P2POp(dist.irecv, out, 1 - rank, g)]
    for work in dist.batch_isend_irecv(ops) if later else g.batch_isend_irecv(ops):
        work.wait()
    return [(out, values(1 - rank))]


REDUCTIONS = [Rule("raw", op="all_reduce"), Rule("raw", op="reduce_scatter")]

OF_GLOO = {name: call for name, call in CASES.items() if name != "all_to_all" or GLOO_HAS_ALL_TO_ALL}
"""Calls that plain gloo has: what it lacks must be compressed."""

PASSED = {"policy": Rule("pass"), "min_numel": 1}


def run_cases(cases: dict[str, Case], g: Any, rank: int, later: bool) -> list[tuple[str, str]]:
    """Run cases on every kind of strides, a step each; returns those that went wrong."""
    wrong = []
    for kind in ("transposed", "columns", "rows"):
        for name, call in cases.items():
            strides = Strides(kind)
            with g.step(), g.key(name):
                pairs = call(g, rank, strides, later)
            if not all(torch.equal(a, b) for a, b in pairs) or not strides.intact():
                wrong.append((kind, name))
    return wrong


@pytest.mark.parametrize("later", [False, True], ids=["now", "later"])
@pytest.mark.parametrize(
    "options",
    [PASSED, {"min_numel": 10**6}, {"policy": REDUCTIONS, "min_numel": 1}],
    ids=["passed", "small", "compressed"],
)
def test_strided_tensors(options, later):
    def body(rank, size):
        compressed = options.get("policy") is REDUCTIONS
        with compactdist.wrap(codec="raw", **options) as g:
            assert not run_cases(CASES if compressed else OF_GLOO, g, rank, later)
            assert (g.stats().compressed_calls > 0) == compressed

    run_ranks(body, pg_timeout=20)


def calls_in_one_group(g: Any, rank: int, strides: Strides, later: bool) -> list[tuple[Tensor, Tensor]]:
    """Copies are made of what arrives at the end of the group of calls, not before."""
    x, out, everyones = strides(values(rank)), strides.blank(), [strides.blank(), strides.blank()]
    with c10d._coalescing_manager(g, torch.device("cpu"), async_ops=later) as manager:
        dist.broadcast(x, 1, group=g, async_op=later)
        dist.isend(strides(values(rank)), 1 - rank, group=g)
        dist.irecv(out, 1 - rank, group=g)
        dist.all_gather(everyones, strides(values(rank)), group=g, async_op=later)
    if later:
        manager.wait()
    return [(x, values(1)), (out, values(1 - rank)), *zip(everyones, both(), strict=True)]


@pytest.mark.parametrize("later", [False, True], ids=["now", "later"])
def test_strided_tensors_on_an_inner_group_like_nccl(later):
    """Synchronous calls return no work, and nothing has arrived before a work was waited for."""

    def body(rank, size):
        cases = {name: call for name, call in OF_GLOO.items() if name != "recv_from_any_source"}
        with compactdist.wrap(act_like_nccl(dist.group.WORLD), codec="raw", **PASSED) as g:
            assert not run_cases({**cases, "calls_in_one_group": calls_in_one_group}, g, rank, later)

    run_ranks(body, pg_timeout=20)


def test_an_output_whose_elements_share_memory_is_refused():
    def body(rank, size):
        with compactdist.wrap(codec="raw", **PASSED) as g, g.step():
            x = torch.zeros(1, COLUMNS).expand(ROWS, COLUMNS)
            with pytest.raises(RuntimeError, match="more than one element of the written-to tensor"):
                dist.all_reduce(x, group=g)

    run_ranks(body)


def into_expanded(g: Any, rank: int, call: str) -> None:
    """A compressed call whose output is expanded."""
    x, expanded = values(rank), torch.zeros(1, COLUMNS).expand(2 * ROWS, COLUMNS)
    if call == "all_gather_into_tensor":
        g.all_gather_into_tensor(expanded, x)
    elif call == "all_gather":
        g.all_gather([torch.zeros(ROWS, COLUMNS), expanded[:ROWS]], x)
    elif call == "all_to_all_single":
        g.all_to_all_single(expanded[:ROWS], x)
    elif call == "recv":
        g.recv(expanded[:ROWS], 1 - rank)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("call", ["all_gather_into_tensor", "all_gather", "all_to_all_single", "recv"])
def test_a_compressed_call_with_an_expanded_output_sends_nothing(call, parts):
    """It is refused before its frame leaves, so that the site goes on (it raised while decoding)."""

    def body(rank, size):
        with compactdist.wrap(codec="int8", min_numel=1, parts=parts) as g:
            for t in range(4):
                out = torch.zeros(2 * ROWS, COLUMNS)
                with g.step():
                    if t == 2:
                        with pytest.raises(BadOutputError, match=r"rank \d, site .*strides \(0, 1\).*nothing was sent"):
                            into_expanded(g, 1 if call == "all_gather" else rank, call)
                    g.all_gather_into_tensor(out, values(rank) + t)
                assert torch.allclose(out, torch.cat(both()) + t, atol=0.1)
            g.check()

    run_ranks(body, pg_timeout=20)


def test_the_root_of_a_broadcast_is_only_read():
    def body(rank, size):
        with compactdist.wrap(codec="raw", **PASSED) as g, g.step():
            x = Strides("columns")(values(rank))
            work = dist.broadcast(x, 0, group=g, async_op=True)
            if rank == 0:
                x.fill_(3)
            work.wait()
            assert rank == 1 or bool((x == 3).all())

    run_ranks(body)


def test_a_strided_broadcast_notices_a_frame():
    """Rank 0 compresses, rank 1 lets the message pass through."""

    def policy(call):
        return "pass" if dist.get_rank() == 1 else None

    def body(rank, size):
        with compactdist.wrap(codec="raw", policy=policy, agree="off", min_numel=1) as g, g.step():
            if rank == 0:
                dist.broadcast(values(0), 0, group=g)
                return
            y = Strides("columns")(torch.zeros(2 * ROWS, COLUMNS))
            with pytest.raises(FrameError, match="arrived as a frame"):
                dist.broadcast(y, 0, group=g)

    run_ranks(body)
