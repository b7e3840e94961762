"""xfuser's LongContextAttention under `enable`, on four ranks. Started by test_captured.py: captured_worker.py OUT.

xfuser defines these layers for accelerators only: on a CPU its import leaves `object` in the place of their base
classes. Here they are imported again with that question answered yes, and yunchang's flash attention is torch's for
CPUs; rings, exchanges and layers are xfuser's and yunchang's own.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import compactdist
from compactdist_harness.cpu import xdit as xdit_on_cpu
from compactdist_harness.cpu import yunchang as yunchang_on_cpu
from compactdist_xdit import enable
from tests.integrations.xdit.ranks import hand_in

torch.set_num_threads(1)
os.environ.setdefault("LOG_LEVEL", "error")
xdit_on_cpu.install()
import xfuser.envs as envs  # noqa: E402
import yunchang.ring.utils as ring_utils  # noqa: E402
from diffusers import FlowMatchEulerDiscreteScheduler  # noqa: E402
from xfuser.core.distributed import (  # noqa: E402
    init_distributed_environment,
    initialize_model_parallel,
    parallel_state,
)
from yunchang.globals import PROCESS_GROUP  # noqa: E402
from yunchang.kernels import AttnType  # noqa: E402

yunchang_on_cpu.install()
if not hasattr(ring_utils, "update_npu_out"):  # yunchang 0.6.4 lacks what xfuser 0.7.0 imports for NPUs
    ring_utils.update_npu_out = None
for name in [name for name in sys.modules if name.startswith("xfuser.core.long_ctx_attention")]:
    del sys.modules[name]
no_npu, envs._is_npu = envs._is_npu, lambda: True
import xfuser.core.long_ctx_attention as long_ctx  # noqa: E402
import xfuser.core.long_ctx_attention.ring  # noqa: E402, F401

envs._is_npu = no_npu

STEPS, LAYERS = 6, 2
B, S, H, D = 2, 32, 4, 16


class Processor:
    """As xfuser's attention processors: no module, and it keeps the layer."""

    def __init__(self, kind: str) -> None:
        if kind == "linear":
            self.parallel = long_ctx.xFuserSanaLinearLongContextAttention()
        else:
            self.parallel = long_ctx.xFuserLongContextAttention(attn_type=AttnType.TORCH_FLASH)


class Attention(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.qkv = nn.Linear(H * D, 3 * H * D, bias=False)
        if kind == "module":
            self.parallel = long_ctx.xFuserLongContextAttention(attn_type=AttnType.TORCH_FLASH)
        else:
            self.processor = Processor(kind)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(B, -1, 3, H, D).unbind(2)
        layer = self.parallel if hasattr(self, "parallel") else self.processor.parallel
        return x + layer(None, q, k, v).reshape(x.shape)


class Transformer(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Attention(kind) for _ in range(LAYERS))

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return hidden_states - hidden_states.mean(-1, keepdim=True)


class Pipe:
    """The part of a pipeline that the adapter looks at; each rank denoises its own tokens."""

    def __init__(self, kind: str) -> None:
        torch.manual_seed(0)
        self.transformer = Transformer(kind).eval().requires_grad_(False)
        self.scheduler = FlowMatchEulerDiscreteScheduler()

    def __call__(self) -> Tensor:
        x = torch.randn(B, S, H * D, generator=torch.Generator().manual_seed(1))
        x = x.chunk(dist.get_world_size(), 1)[dist.get_rank()]
        self.scheduler.set_timesteps(STEPS)
        for t in self.scheduler.timesteps:
            x = self.scheduler.step(self.transformer(x, timestep=t), t, x, return_dict=False)[0]
        return x


def groups_of(pipe: Pipe) -> list[Any]:
    layers = [getattr(block, "parallel", None) or block.processor.parallel for block in pipe.transformer.blocks]
    return [group for layer in layers for group in (layer.ring_pg, layer.ulysses_pg)]


def measure(kind: str, ulysses: int, ring: int) -> dict[str, Any]:
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    initialize_model_parallel(
        sequence_parallel_degree=ulysses * ring, ulysses_degree=ulysses, ring_degree=ring, backend="gloo"
    )
    pipe, other = Pipe(kind), Pipe(kind)
    kept = groups_of(pipe)
    truth = pipe()
    record: dict[str, Any] = {}
    for codec in ("raw", "int4"):
        with enable(pipe, codec=codec, min_numel=1) as handle:
            latents = pipe()
            repeats = torch.equal(pipe(), latents)
            stats = handle.stats()
            record[codec] = {
                "error": float((latents - truth).norm() / truth.norm()),
                "repeats": repeats,
                "passed": {route: s.passed_reasons for route, s in stats.items()},
                "sites": {
                    f"{route} {key}": [site.calls, site.forwarded]
                    for route, of_route in stats.items()
                    for key, site in of_route.sites.items()
                    if site.calls  # a receive's site has none
                },
                "layouts": {
                    f"{route} {site.key}": [*stream.view.shape, bool(stream.view.hint)]
                    for route, group in handle.groups.items()
                    for site in group._engine.store.sites()
                    for stream in site.encoders.values()
                },
            }
    with enable(pipe, codec="int4", min_numel=1), enable(other, codec="binary", min_numel=1):
        first, rough, again = pipe(), other(), pipe()
        record["turns"] = torch.equal(first, again) and torch.equal(first, latents) and not torch.equal(first, rough)
        # while the first one's turn lasts, the other's layers have their own groups
        record["turns, groups"] = not any(isinstance(g, compactdist.CompressedProcessGroup) for g in groups_of(other))
    record["given back"] = all(a is b for a, b in zip(groups_of(pipe), kept, strict=True))
    record["afterwards"] = torch.equal(pipe(), truth)
    return record


def main() -> None:
    init_distributed_environment()
    records = {
        f"{kind} {ulysses} x {ring}": measure(kind, ulysses, ring)
        for kind, ulysses, ring in (("processor", 1, 4), ("module", 2, 2), ("linear", 1, 4))
    }
    records["plain at last"] = not isinstance(PROCESS_GROUP.RING_PG, compactdist.CompressedProcessGroup)
    hand_in(records, Path(sys.argv[1]))


main()
