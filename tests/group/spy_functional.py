"""Rows of the table: functional collectives, differentiable ones, and ProcessGroup's older names."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.distributed.nn.functional as dist_nn
from torch.distributed import distributed_c10d as c10d
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from compactdist import _torch
from tests.group.kit import NUMEL, data, exchanged, gathered
from tests.group.spy_kit import SIZE, blank, blanks, right, row

ops = torch.ops._c10d_functional
# Before torch 2.13 a group cannot see that a functional collective is differentiable: its forward is compressed.
UNSEEN = _torch.VERSION < (2, 13)

# --- functional collectives -------------------------------------------------------------------------------------------


@row("all_gather_single_coalesced", compressed=1)
def funcol_all_gather_by_group(g, rank):
    return right(funcol.all_gather_tensor(data(rank), 0, g) + 0, gathered(SIZE))


@row("all_gather_single_coalesced", compressed=1)
def funcol_all_gather_by_name(g, rank):
    return right(funcol.all_gather_tensor(data(rank), 0, g.group_name) + 0, gathered(SIZE))


@row("all_gather_single_coalesced", compressed=1)
def funcol_all_gather_by_mesh(g, rank):
    return right(funcol.all_gather_tensor(data(rank), 0, (DeviceMesh.from_group(g, "cpu"), 0)) + 0, gathered(SIZE))


@row("all_gather_single_coalesced", compressed=2)
def funcol_all_gather_coalesced(g, rank):
    pair = funcol.all_gather_into_tensor_coalesced([data(rank), data(rank, seed=1)], g)
    return all(right(y + 0, gathered(SIZE, seed=seed)) for seed, y in enumerate(pair))


@row("all_to_all_single", compressed=1)
def funcol_all_to_all(g, rank):
    return right(funcol.all_to_all_single(data(rank), None, None, g) + 0, exchanged(rank, SIZE))


@row("all_to_all_single", compressed=1)
def funcol_all_to_all_with_equal_splits(g, rank):
    splits = [NUMEL // SIZE] * SIZE
    return right(funcol.all_to_all_single(data(rank), splits, splits, g) + 0, exchanged(rank, SIZE))


@row("broadcast", compressed=1)
def funcol_broadcast(g, rank):
    return right(funcol.broadcast(data(rank), 1, g) + 0, data(1))


@row("allreduce", all_reduce="op")
def funcol_all_reduce(g, rank):
    return right(funcol.all_reduce(data(rank), "sum", g) + 0, data(0) + data(1))


@row("allreduce_coalesced", all_reduce="op")
def funcol_all_reduce_coalesced(g, rank):
    pair = funcol.all_reduce_coalesced([data(rank), data(rank)], "sum", g)
    return all(right(y + 0, data(0) + data(1)) for y in pair)


@row("reduce_scatter_single_coalesced", reduce_scatter="op")
def funcol_reduce_scatter(g, rank):
    y = funcol.reduce_scatter_tensor(data(rank), "sum", 0, g) + 0
    return right(y, (data(0) + data(1)).chunk(SIZE)[rank])


@row("send", "recv", compressed=1, since=(2, 13))
def functional_isend_and_irecv(g, rank):
    out = blank(1)
    sent = ops.isend(data(rank), 1 - rank, 0, g.group_name)
    received = ops.irecv(out, 1 - rank, 0, g.group_name)
    ops.wait_tensor(sent)
    ops.wait_tensor(received)
    return right(out, data(1 - rank))


@row("send", "recv", compressed=1, since=(2, 13))
def functional_batch(g, rank):
    out = blank(1)
    both = ops.batch_p2p_ops(["isend", "irecv"], [1 - rank] * 2, [0, 0], [data(rank), out], g.group_name)
    for y in both:
        ops.wait_tensor(y)
    return right(out, data(1 - rank))


@row("send", "recvAnysource", compressed=1, since=(2, 14), on_nccl_like=None)  # NCCL knows no such receive
def receive_from_any_source_in_cpp(g, rank):
    out = blank(1)
    pending = dist.isend(data(rank), 1 - rank, group=g)
    dist.ProcessGroup.recv_anysource(g, [out], 0).wait()  # as C++ code that holds a ProcessGroup calls it
    pending.wait()
    return right(out, data(1 - rank))


GIVEN_OUTPUT = {"compressed": 1} if _torch.VERSION >= (2, 14) else {}


@row(*(["all_gather_single"] if GIVEN_OUTPUT else []), **GIVEN_OUTPUT)
def functional_all_gather_into_a_given_output_goes_round_python_before_torch_2_14(g, rank):
    out = blank()
    ops.wait_tensor(ops.all_gather_into_tensor_out(data(rank), SIZE, g.group_name, out=out))
    return right(out, gathered(SIZE))


@row("scatter", "all_gather_single_coalesced", compressed=1, scatter="op")
def dtensor_shard_and_replicate(g, rank):
    mesh = DeviceMesh.from_group(g, "cpu")
    x = distribute_tensor(data(0), mesh, [Shard(0)]).redistribute(mesh, [Replicate()])
    return right(x.to_local(), data(0))


@row("scatter", "all_gather_single_coalesced", scatter="op", all_gather="weights")
def dtensor_shard_and_full_tensor(g, rank):
    mesh = DeviceMesh.from_group(g, "cpu")
    return right(distribute_tensor(data(0), mesh, [Shard(0)]).full_tensor(), data(0))


# --- older names, called as torch 2.11 does --------------------------------------------------------------------


@row("_allgather_base", compressed=1)
def old_all_gather_base(g, rank):
    out = blank()
    g._allgather_base(out, data(rank), c10d.AllgatherOptions()).wait()
    return right(out, gathered(SIZE))


@row("allgather_into_tensor_coalesced", compressed=1)
def old_all_gather_coalesced(g, rank):
    out = blank()
    g.allgather_into_tensor_coalesced([out], [data(rank)], c10d.AllgatherOptions()).wait()
    return right(out, gathered(SIZE))


@row("allgather_coalesced", compressed=2)
def all_gather_lists_coalesced(g, rank):
    outs = [blanks() for _ in range(SIZE)]
    g.allgather_coalesced(outs, [data(rank), data(rank, seed=1)], c10d.AllgatherOptions()).wait()
    return all(right(outs[r][i], data(r, seed=i)) for r in range(SIZE) for i in range(2))


@row("alltoall_base", compressed=1)
def old_all_to_all_base(g, rank):
    out = blank(1)
    g.alltoall_base(out, data(rank), [], [], c10d.AllToAllOptions()).wait()
    return right(out, exchanged(rank, SIZE))


@row("_reduce_scatter_base", reduce_scatter="op")
def old_reduce_scatter_base(g, rank):
    out = blank(1, NUMEL // SIZE)
    g._reduce_scatter_base(out, data(rank), c10d.ReduceScatterOptions()).wait()
    return right(out, (data(0) + data(1)).chunk(SIZE)[rank])


@row("reduce_scatter_tensor_coalesced", reduce_scatter="op")
def old_reduce_scatter_coalesced(g, rank):
    out = blank(1, NUMEL // SIZE)
    g.reduce_scatter_tensor_coalesced([out], [data(rank)], c10d.ReduceScatterOptions()).wait()
    return right(out, (data(0) + data(1)).chunk(SIZE)[rank])


# --- autograd ---------------------------------------------------------------------------------------------------------


def grad_of(x: torch.Tensor) -> torch.Tensor:
    assert x.grad is not None
    return x.grad


@row(
    "all_gather_single_coalesced",
    "reduce_scatter_single_coalesced",
    compressed=int(UNSEEN),
    reduce_scatter="op",
    **({} if UNSEEN else {"all_gather": "autograd"}),
)
def autograd_all_gather(g, rank):
    x = data(rank).requires_grad_()
    y = funcol.all_gather_tensor_autograd(x, 0, g)
    (y * 3).sum().backward()
    return right(y, gathered(SIZE)) and right(grad_of(x), torch.full((NUMEL,), 3.0 * SIZE))


@row("all_to_all_single", "all_to_all_single", compressed=int(UNSEEN), all_to_all=("autograd", 2 - UNSEEN))
def autograd_all_to_all(g, rank):
    x = data(rank).requires_grad_()
    y = funcol.all_to_all_single_autograd(x, [NUMEL // SIZE] * SIZE, [NUMEL // SIZE] * SIZE, g)
    (y * 3).sum().backward()
    return right(y, exchanged(rank, SIZE)) and right(grad_of(x), torch.full((NUMEL,), 3.0))


@row("all_to_all_single", "all_to_all_single", all_to_all=("autograd", 2))
def dist_nn_all_to_all(g, rank):
    x = data(rank).requires_grad_()
    y = dist_nn.all_to_all_single(blank(1), x, group=g)
    (y * 3).sum().backward()
    return right(y, exchanged(rank, SIZE)) and right(grad_of(x), torch.full((NUMEL,), 3.0))


@row("allgather", "scatter", "scatter", all_gather="autograd", scatter=("op", 2))
def dist_nn_all_gather(g, rank):
    x = data(rank).requires_grad_()
    y = torch.cat(dist_nn.all_gather(x, group=g))
    (y * 3).sum().backward()
    return right(y, gathered(SIZE)) and right(grad_of(x), torch.full((NUMEL,), 3.0 * SIZE))
