"""A rank whose call passes through where the others compress one: an error, no value is wrong, and no process ends.

On gloo a plain call that meets a frame of another size ends the process that receives it.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.distributed as td
import torch.distributed._functional_collectives as fc

from compactdist import Rule
from compactdist.errors import CompactDistError, FrameError
from tests.group.lifecycle import kit
from tests.launch import run_ranks
from tests.quick import quick_for

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")

N, STEPS = 4096, 5
AGREE_TIMEOUT, INNER_TIMEOUT = 1.0, 3.0
NEAR = 1e-2


def each(rank, step):
    return kit.tensor(rank, step, 2 * N)


def to_all(dist, x, splits=None, **options):
    out = torch.empty_like(x)
    work = dist.all_to_all_single(out, x, splits, splits, **options)
    if work is not None:
        work.wait()
    return out


def to_all_lists(dist, x):
    outs = [torch.empty(N, dtype=x.dtype) for _ in range(2)]
    dist.all_to_all(outs, [one.requires_grad_(x.requires_grad) for one in x.detach().view(2, -1).unbind()])
    return torch.cat(outs)


def functional_to_all(dist, x):
    return fc.all_to_all_single(x, [N, N], [N, N], dist).wait()


def functional_gather(dist, x):
    return fc.all_gather_tensor(x, 0, dist).wait()


def broadcast(dist, x, *, root):
    y = x.clone()
    dist.broadcast(y, src=root)
    return y


def all_reduce(dist, x, *, odd=False):
    y = x.detach().clone()
    dist.all_reduce(y, op=td.ReduceOp.MAX if odd else td.ReduceOp.SUM)
    return y


def scatter(dist, x, *, odd=False):
    y = torch.empty(N, dtype=x.dtype)
    dist.reduce_scatter_tensor(y, x, op=td.ReduceOp.MAX if odd else td.ReduceOp.SUM)
    return y


OPS = {
    "all_to_all_single": to_all,
    "with splits": partial(to_all, splits=[N, N]),
    "asynchronous": partial(to_all, async_op=True),
    "all_to_all": to_all_lists,
    "functional all_to_all": functional_to_all,
    "gather": kit.gather,
    "functional gather": functional_gather,
    "broadcast from the odd one": partial(broadcast, root=1),
    "broadcast to the odd one": partial(broadcast, root=0),
}
REDUCTIONS = {"all_reduce": all_reduce, "reduce_scatter": scatter}


def expected(op, rank, step):
    ours, theirs = each(rank, step), each(1 - rank, step)
    if "gather" in op:
        return torch.cat([each(0, step), each(1, step)])
    if "broadcast" in op:
        return each(1 if "from" in op else 0, step)
    if op == "all_reduce":
        return ours + theirs
    if op == "reduce_scatter":
        return (ours + theirs).view(2, -1)[rank]
    return torch.stack([(ours if peer == rank else theirs).view(2, -1)[rank] for peer in range(2)]).view(-1)


def results_of(op, change, **options):
    """What each of two ranks saw in each step; rank 1 ``change``s its tensor in step 3."""

    def body(rank, world):
        results = []
        with kit.wrap(codec="int8", agree_timeout=AGREE_TIMEOUT, **options) as dist:
            for step in range(STEPS):
                dist.step()
                x, call = each(rank, step), {**OPS, **REDUCTIONS}[op]
                if rank == 1 and step == 3:
                    x, call = change(x, call)
                try:
                    arrived = call(dist, x).detach()
                except (CompactDistError, RuntimeError) as error:
                    results.append(f"{'refused' if isinstance(error, CompactDistError) else 'failed'}: {error}")
                    break
                near = kit.nmse(arrived.view(torch.float32), expected(op, rank, step)) < NEAR
                results.append("right" if near else "wrong")
        return results

    outcomes = run_ranks(body, pg_timeout=INNER_TIMEOUT, timeout=50, expect_error=True)
    told = "\n".join(f"rank {o.rank}: {o.value or o.error_text}" for o in outcomes)
    assert all(o.ok for o in outcomes), told
    assert all(o.value[:3] == ["right"] * 3 for o in outcomes), told
    assert not any("wrong" in o.value for o in outcomes), told
    refused = [o.value[3] for o in outcomes if len(o.value) > 3 and o.value[3].startswith("refused")]
    assert refused, told
    return refused


@pytest.mark.parametrize(
    "op", quick_for(["all_to_all_single", "asynchronous", "gather"], [op for op in OPS if "broadcast" not in op])
)
def test_a_tensor_that_requires_grad_on_one_rank(op):
    refused = results_of(op, lambda x, call: (x.requires_grad_(), call))
    assert "requires grad" in " ".join(refused)


@pytest.mark.parametrize("op", quick_for(["all_to_all_single", "gather", "broadcast from the odd one"], OPS))
def test_another_dtype_on_one_rank(op):
    """As large as the others' tensors, so that a plain group gives its bytes to everyone."""
    refused = results_of(op, lambda x, call: (x.view(torch.int32), call))
    if op != "broadcast to the odd one":  # where the header is enough
        assert "int32" in " ".join(refused)


@pytest.mark.parametrize("op", REDUCTIONS)
def test_another_reduction_on_one_rank(op):
    policy = [Rule(op=op, codec="int8")]
    refused = results_of(op, lambda x, call: (x, partial(call, odd=True)), policy=policy)
    assert "another reduction" in " ".join(refused)


def test_fewer_elements_than_are_compressed_on_one_rank():
    refused = results_of("gather", lambda x, call: (x[:8], call), min_numel=1024)
    assert "fewer elements than min_numel" in " ".join(refused)


def test_calls_of_another_dtype_between_compressed_ones_are_agreed_on_once():
    """Every rank makes them, so nothing is refused, and steady steps ask nobody."""

    def body(rank, world):
        with kit.wrap(codec="int8") as dist:
            agreements = []
            for step in range(6):
                dist.step()
                for x in (torch.full((N,), rank), each(rank, step)):
                    arrived = kit.gather(dist, x).view(world, -1)
                    if x.dtype == torch.int64:
                        assert arrived[:, 0].tolist() == [0, 1]
                    else:
                        assert all(kit.nmse(y, each(peer, step)) < NEAR for peer, y in enumerate(arrived))
                agreements.append(dist._agreement._number)
            assert agreements[2:] == [agreements[2]] * 4
            stats = dist.stats()
            assert stats.sites["all_gather#0"].calls == 6
            assert stats.passed_reasons["dtype"] == 6

    run_ranks(body)


@pytest.mark.parametrize("dtype", [torch.int32, torch.float64, torch.float32])
def test_a_receive_from_any_source_that_passes_looks_for_a_frame(dtype):
    """The sender compresses; the receiver has another dtype, or has called no step()."""

    def body(rank, world):
        with kit.wrap(codec="int8") as dist:
            if rank == 0:
                dist.step()
                dist.send(kit.tensor(0), 1)
            else:
                if dtype != torch.float32:
                    dist.step()
                got = torch.zeros(kit.N, dtype=dtype)
                with pytest.raises(FrameError, match="arrived as a frame"):
                    td.recv(got, None, group=dist)
                assert not got.any()

    run_ranks(body)


def test_a_plain_receive_from_any_source_names_its_sender():
    def body(rank, world):
        with kit.wrap(codec="int8") as dist:
            dist.step()
            if rank == 0:
                dist.send(torch.arange(kit.N), 1)
            else:
                got = torch.zeros(kit.N, dtype=torch.int64)
                assert td.recv(got, None, group=dist) == 0
                assert torch.equal(got, torch.arange(kit.N))

    run_ranks(body)
