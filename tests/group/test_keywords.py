"""Methods of a wrapped group take the keywords, and have the defaults, that ProcessGroup's own have."""

from __future__ import annotations

import inspect
import re
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from compactdist import wrap
from compactdist.group.process_group import CompressedProcessGroup
from tests.launch import run_ranks

METHODS = (
    *("allgather", "_allgather_base", "allgather_coalesced", "allgather_into_tensor_coalesced"),
    *("all_gather_single_coalesced", "allreduce", "allreduce_coalesced", "alltoall", "alltoall_base", "broadcast"),
    *("gather", "recv", "reduce", "reduce_scatter", "_reduce_scatter_base", "reduce_scatter_tensor_coalesced"),
    *("reduce_scatter_single_coalesced", "scatter", "send"),
)
"""Not those whose names ``torch.distributed`` gives to functions with keywords of their own: there these count."""


def _declared(name: str) -> list[tuple[str, bool]]:
    """Parameters of the first form of a method of ProcessGroup, and whether they have a default."""
    text = getattr(dist.ProcessGroup, name).__doc__ or ""
    found = re.search(rf"^(?:1\. )?{name}\(self: [^,]+, (.*)\) -> ", text, re.MULTILINE)
    assert found, text
    without = re.sub(r"<[^>]*>", "made", found[1])
    return [(one, "=" in rest) for one, rest in re.findall(r"(\w+): ((?:[^,\[]|\[[^\]]*\]+)+)", without)]


@pytest.mark.parametrize("name", METHODS)
def test_keywords_and_defaults(name: str) -> None:
    if not hasattr(dist.ProcessGroup, name):
        pytest.skip("not in this torch")
    ours = inspect.signature(inspect.unwrap(getattr(CompressedProcessGroup, name))).parameters
    declared = _declared(name)
    assert declared
    for parameter, has_default in declared:
        assert parameter in ours, (name, list(ours))
        assert not has_default or ours[parameter].default is not inspect.Parameter.empty, (name, parameter)


def _by_keyword(rank: int, size: int) -> None:
    group = wrap(dist.group.WORLD, "int8", min_numel=1)
    x, total = torch.full((4,), float(rank + 1)), torch.full((4,), 3.0)
    for call in (
        lambda one: group.allreduce(tensor=one, op=dist.ReduceOp.SUM, timeout=timedelta(seconds=20)),
        lambda one: group.allreduce(one, dist.ReduceOp.SUM),
        lambda one: group.allreduce([one], dist.ReduceOp.SUM),
        lambda one: group.allreduce(tensors=[one]),
    ):
        one = x.clone()
        call(one).wait()
        assert torch.equal(one, total)
    out = torch.empty(8)
    group._allgather_base(output=out, input=x).wait()
    assert torch.allclose(out, torch.tensor([1.0] * 4 + [2.0] * 4), atol=0.02)
    group.alltoall_base(output=out[:4], input=x, output_split_sizes=[2, 2], input_split_sizes=[2, 2]).wait()
    assert torch.allclose(out[:4], torch.tensor([1.0, 1.0, 2.0, 2.0]), atol=0.02)
    group.broadcast([x]).wait()
    assert torch.allclose(x, torch.ones(4), atol=0.02)
    peer = 1 - rank
    work = group.send(tensors=[x], dstRank=peer) if rank else group.recv(tensors=[x], srcRank=peer)
    work.wait()
    group.close()


def test_calls_by_keyword() -> None:
    run_ranks(_by_keyword, 2, timeout=60)
