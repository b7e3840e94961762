"""Rows of the table: torch.distributed's functions, and its coalescing managers."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from tests.group.kit import NUMEL, data, exchanged, gathered, reached
from tests.group.spy_kit import SIZE, blank, blanks, right, row

# --- torch.distributed: gathering and exchanging ----------------------------------------------------------------------


@row("allgather", compressed=1)
def all_gather(g, rank):
    outs = blanks()
    dist.all_gather(outs, data(rank), group=g)
    return right(torch.cat(outs), gathered(SIZE))


@row("allgather", compressed=1)
def all_gather_async(g, rank):
    outs = blanks()
    dist.all_gather(outs, data(rank), group=g, async_op=True).wait()
    return right(torch.cat(outs), gathered(SIZE))


@row("all_gather_single", compressed=1)
def all_gather_into_tensor(g, rank):
    out = blank()
    dist.all_gather_into_tensor(out, data(rank), group=g)
    return right(out, gathered(SIZE))


@row("all_gather_single", compressed=1, since=(2, 13))
def all_gather_single(g, rank):
    out = blank()
    dist.all_gather_single(out, data(rank), group=g)
    return right(out, gathered(SIZE))


@row("alltoall", compressed=1)
def all_to_all(g, rank):
    outs = blanks(NUMEL // SIZE)
    dist.all_to_all(outs, list(data(rank).chunk(SIZE)), group=g)
    return right(torch.cat(outs), exchanged(rank, SIZE))


@row("all_to_all_single", compressed=1)
def all_to_all_single(g, rank):
    out = blank(1)
    dist.all_to_all_single(out, data(rank), group=g)
    return right(out, exchanged(rank, SIZE))


@row("all_to_all_single", compressed=1)
def all_to_all_single_with_splits(g, rank):
    out, splits = blank(1), [NUMEL // SIZE] * SIZE
    dist.all_to_all_single(out, data(rank), splits, splits, group=g)
    return right(out, exchanged(rank, SIZE))


@row("broadcast", compressed=1)
def broadcast(g, rank):
    x = data(rank)
    dist.broadcast(x, 1, group=g)
    return right(x, data(1))


# --- torch.distributed: point to point --------------------------------------------------------------------------------


@row("send", "recv", compressed=1)
def send_and_recv(g, rank):
    out = blank(1)
    if rank == 0:
        dist.send(data(rank), 1, group=g)
        dist.recv(out, 1, group=g)
    else:
        pending = dist.isend(data(rank), 0, group=g)
        dist.recv(out, 0, group=g)
        pending.wait()
    return right(out, data(1 - rank))


@row("recv", "send", compressed=1)
def irecv_and_isend(g, rank):
    out = blank(1)
    works = [dist.irecv(out, 1 - rank, group=g), dist.isend(data(rank), 1 - rank, group=g)]
    for work in works:
        work.wait()
    return right(out, data(1 - rank))


@row("send", "recv_anysource", compressed=1, on_nccl_like=None)  # NCCL knows no such receive
def recv_from_any(g, rank):
    out = blank(1)
    pending = dist.isend(data(rank), 1 - rank, group=g)
    source = dist.recv(out, group=g)
    pending.wait()
    return right(out, data(1 - rank)) and source == 1 - rank


@row("send", "recv", compressed=1, on_nccl_like={"reaches": []})  # torch's function hands the whole batch over there
def batch_isend_irecv(g, rank):
    out = blank(1)
    batch = [dist.P2POp(dist.isend, data(rank), 1 - rank, g), dist.P2POp(dist.irecv, out, 1 - rank, g)]
    for work in dist.batch_isend_irecv(batch):
        work.wait()
    return right(out, data(1 - rank))


# --- torch.distributed: what passes through ---------------------------------------------------------------------------


@row("allreduce", all_reduce="op")
def all_reduce(g, rank):
    x = data(rank)
    dist.all_reduce(x, group=g)
    return right(x, data(0) + data(1))


@row("reduce", reduce="op")
def reduce(g, rank):
    x = data(rank)
    dist.reduce(x, 1, group=g)
    return rank == 0 or right(x, data(0) + data(1))


@row("reduce_scatter", reduce_scatter="op")
def reduce_scatter(g, rank):
    out = blank(1, NUMEL // SIZE)
    dist.reduce_scatter(out, list(data(rank).chunk(SIZE)), group=g)
    return right(out, (data(0) + data(1)).chunk(SIZE)[rank])


@row("reduce_scatter_single", reduce_scatter="op")
def reduce_scatter_tensor(g, rank):
    out = blank(1, NUMEL // SIZE)
    dist.reduce_scatter_tensor(out, data(rank), group=g)
    return right(out, (data(0) + data(1)).chunk(SIZE)[rank])


@row("reduce_scatter_single", reduce_scatter="op", since=(2, 13))
def reduce_scatter_single(g, rank):
    out = blank(1, NUMEL // SIZE)
    dist.reduce_scatter_single(out, data(rank), group=g)
    return right(out, (data(0) + data(1)).chunk(SIZE)[rank])


@row("gather", gather="op")
def gather(g, rank):
    outs = blanks() if rank == 1 else None
    dist.gather(data(rank), outs, dst=1, group=g)
    return outs is None or right(torch.cat(outs), gathered(SIZE))


GATHER_SINGLE = "RuntimeError: Backend gloo does not support gather_single"


@row("gather_single", gather="op", error=GATHER_SINGLE, since=(2, 14))
def gather_single_fails_as_on_gloo(g, rank):
    dist.gather_single(data(rank), blank(), dst=1, group=g)


@row("gather_single", gather="op", error=GATHER_SINGLE, since=(2, 14))
def gather_into_tensor_fails_as_on_gloo(g, rank):
    dist.gather_into_tensor(data(rank), blank(), dst=1, group=g)


@row(since=(2, 14))
def get_backend_impl(g, rank):
    return dist.get_backend_impl(g) is g.inner._get_backend(torch.device("cpu"))


@row("scatter", scatter="op")
def scatter(g, rank):
    out = blank(1)
    dist.scatter(out, [data(0), data(1)] if rank == 0 else None, src=0, group=g)
    return right(out, data(rank))


@row("barrier", barrier="op")
def barrier(g, rank):
    dist.barrier(group=g)
    return True


@row("monitored_barrier", barrier="op")
def monitored_barrier(g, rank):
    dist.monitored_barrier(group=g)
    return True


@row("allgather", "allgather", all_gather=("dtype", 2))
def all_gather_object(g, rank):
    out = [None] * SIZE
    dist.all_gather_object(out, {"rank": rank}, group=g)
    return out == [{"rank": 0}, {"rank": 1}]


@row("allgather", "gather", all_gather="dtype", gather="op")
def gather_object(g, rank):
    out = [None] * SIZE if rank == 0 else None
    dist.gather_object(rank, out, dst=0, group=g)
    return rank == 1 or out == [0, 1]


@row("broadcast", "broadcast", broadcast=("dtype", 2))
def broadcast_object_list(g, rank):
    out = [rank]
    dist.broadcast_object_list(out, src=1, group=g)
    return out == [1]


@row("broadcast", "scatter", "scatter", broadcast="dtype", scatter=("op", 2))
def scatter_object_list(g, rank):
    out = [None]
    dist.scatter_object_list(out, ["a", "b"] if rank == 0 else None, src=0, group=g)
    return out == ["ab"[rank]]


# --- coalescing managers ----------------------------------------------------------------------------------------------


@row("all_gather_single_coalesced", compressed=2)
def coalesced_all_gathers(g, rank):
    outs = [blank(), blank()]
    with c10d._coalescing_manager(group=g, async_ops=True) as manager:
        for seed, out in enumerate(outs):
            dist.all_gather_into_tensor(out, data(rank, seed=seed), group=g)
    manager.wait()
    return all(right(out, gathered(SIZE, seed=seed)) for seed, out in enumerate(outs))


@row("reduce_scatter_single_coalesced", reduce_scatter="op")
def coalesced_reduce_scatters(g, rank):
    outs = [blank(1, NUMEL // SIZE) for _ in range(2)]
    with c10d._coalescing_manager(group=g, async_ops=True) as manager:
        for out in outs:
            dist.reduce_scatter_tensor(out, data(rank), group=g)
    manager.wait()
    return all(right(out, (data(0) + data(1)).chunk(SIZE)[rank]) for out in outs)


@row("allreduce_coalesced", all_reduce="op")
def coalesced_all_reduces(g, rank):
    xs = [data(rank), data(rank)]
    with c10d._coalescing_manager(group=g, async_ops=True) as manager:
        for x in xs:
            dist.all_reduce(x, group=g)
    manager.wait()
    return all(right(x, data(0) + data(1)) for x in xs)


GROUPED = [*reached("_start_coalescing", "all_gather_single_coalesced", "_end_coalescing")]


@row(
    "_start_coalescing",
    error="RuntimeError: Backend gloo does not implement startCoalescing",
    on_nccl_like={"reaches": GROUPED, "error": "", "compressed": 2},
)
def coalesced_all_gathers_with_a_device_which_gloo_cannot(g, rank):
    outs = [blank(), blank()]
    with c10d._coalescing_manager(g, torch.device("cpu"), async_ops=True) as manager:
        for seed, out in enumerate(outs):
            dist.all_gather_into_tensor(out, data(rank, seed=seed), group=g)
    manager.wait()
    return all(right(out, gathered(SIZE, seed=seed)) for seed, out in enumerate(outs))
