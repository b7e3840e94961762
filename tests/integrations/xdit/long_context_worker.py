"""On each of four ranks: yunchang's and xfuser's attention over compressed groups; writes what it measured as JSON.

Started by test_long_context.py: long_context_worker.py OUT.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor.experimental import _attention
from torch.nn.functional import scaled_dot_product_attention

import compactdist
from compactdist_harness.cpu import xdit as xdit_on_cpu
from compactdist_harness.cpu import yunchang as yunchang_on_cpu
from compactdist_xdit.long_context import LongContextSites
from compactdist_xdit.sites import Sites

STEPS = 8
B, S, H, D = 2, 64, 4, 16


def qkv(t: int) -> Tensor:
    """`(3, B, S, H, D)` of the whole sequence at a step; steps are similar."""

    def noise(seed: int) -> Tensor:
        return torch.randn(3, B, S, H, D, generator=torch.Generator().manual_seed(seed))

    return noise(0) + 0.05 * noise(t + 1)


def error_of(attention: Any, parts: int, part: int, t: int) -> float:
    """Of one rank's output against attention without any parallelism; `attention` takes and gives `(B, S/P, H, D)`."""
    q, k, v = (x.transpose(1, 2) for x in qkv(t))
    truth = scaled_dot_product_attention(q, k, v).transpose(1, 2).chunk(parts, 1)[part]
    with torch.no_grad():
        out = attention(*(x.chunk(parts, 1)[part].contiguous() for x in qkv(t)))
    return float((out - truth).norm() / truth.norm())


def yunchang(ulysses: int, ring: int, codec: str, **options: Any) -> dict[str, Any]:
    from yunchang import LongContextAttention, set_seq_parallel_pg
    from yunchang.globals import PROCESS_GROUP
    from yunchang.kernels import AttnType

    set_seq_parallel_pg(ulysses, ring, dist.get_rank(), dist.get_world_size())
    sites = LongContextSites()
    for name, size in (("ULYSSES_PG", ulysses), ("RING_PG", ring)):
        if size > 1:
            inner = getattr(PROCESS_GROUP, name)
            sites.groups[name] = compactdist.wrap(inner, codec, layouts=sites.layout_of, min_numel=1, **options)
            setattr(PROCESS_GROUP, name, sites.groups[name])
    layer = LongContextAttention(ring_impl_type="basic", attn_type=AttnType.TORCH_FLASH)
    sites.install()
    errors = []
    for t in range(STEPS):
        for group in sites.groups.values():
            group.step()
        errors.append(error_of(layer, ulysses * ring, dist.get_rank(), t))
    sites.remove()
    result = {"errors": errors, "passed": {}, "layouts": {}, "sites": {}}
    for name, group in sites.groups.items():
        result["passed"] |= group.stats().passed_reasons
        for key, site in group.stats().sites.items():
            if site.calls:  # a receive's site has none
                result["sites"][f"{name} {key}"] = [site.calls, site.forwarded]
        for site in group._engine.store.sites():
            for stream in site.encoders.values():
                result["layouts"][f"{name} {site.key}"] = [*stream.view.shape, bool(stream.view.hint)]
    dist.barrier()
    for group in sites.groups.values():
        group.close()
    return result


def xfuser_ring(size: int, codec: str) -> dict[str, Any]:
    """xfuser's ring attention on rings of so many ranks, made to turn by all-to-all."""
    from xfuser.model_executor.layers import usp
    from yunchang import set_seq_parallel_pg
    from yunchang.globals import PROCESS_GROUP

    world = dist.get_world_size()
    set_seq_parallel_pg(world // size, size, dist.get_rank(), world)
    sites = Sites()
    group = compactdist.wrap(PROCESS_GROUP.RING_PG, codec, layouts=sites.layout_of, min_numel=1)
    PROCESS_GROUP.RING_PG = sites.groups["ring"] = group
    sites.install()

    def function(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)

    def attention(*tensors: Tensor) -> Tensor:
        return usp.ring_attn(function, *(x.transpose(1, 2) for x in tensors)).transpose(1, 2)

    _attention.set_rotate_method("alltoall")
    errors = []
    for t in range(STEPS):
        group.step()
        errors.append(error_of(attention, size, group.rank(), t))
    _attention.set_rotate_method("allgather")
    sites.remove()
    stats = group.stats()
    result = {
        "errors": errors,
        "passed": stats.passed_reasons,
        "sites": {key: [site.calls, site.forwarded] for key, site in stats.sites.items()},
    }
    dist.barrier()
    group.close()
    return result


def main() -> None:
    torch.set_num_threads(1)
    xdit_on_cpu.install()
    yunchang_on_cpu.install()
    dist.init_process_group("gloo")
    results = {}
    for codec in ("raw", "int4"):
        for ulysses, ring in ((1, 4), (4, 1), (2, 2)):
            results[f"{codec} {ulysses} x {ring}"] = yunchang(ulysses, ring, codec)
        for ring in (2, 4):
            results[f"{codec} xfuser {ring}"] = xfuser_ring(ring, codec)
    results["int4 encoded at each hop"] = yunchang(1, 4, "int4", forward=False)
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, results)
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(gathered))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
