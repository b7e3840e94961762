"""Requests in a row, one inside another, or alone in a fresh process. Started by test_requests.py:

    requests_worker.py OUT.safetensors "ring 0+1, pipefusion 0+1"

Each part names a route and the requests that one handle serves; `ring 0(1)` runs request 1 of another pipeline in
the middle of request 0. The rank with output writes the final latents of each, float32 `(1, 64, 16)`.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
from safetensors.torch import save_file

from compactdist_harness.cpu import xdit as xdit_on_cpu
from compactdist_xdit import enable
from tests.integrations.xdit.ranks import leave

torch.set_num_threads(1)
os.environ.setdefault("LOG_LEVEL", "error")
xdit_on_cpu.install()
from xfuser.core.distributed import parallel_state  # noqa: E402

from compactdist_harness.xdit import parallel_tiny  # noqa: E402

STEPS = 6
DEGREES: dict[str, dict[str, Any]] = {
    "ring": {"ring_degree": 2},
    "pipefusion": {"pipefusion_parallel_degree": 2, "num_pipeline_patch": 2, "warmup_steps": 1},
}
latents: dict[str, torch.Tensor] = {}


def pipeline(route: str) -> tuple[Any, dict[str, Any]]:
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    return parallel_tiny("flux", steps=STEPS, **DEGREES[route])


def draw(name: str, pipe: Any, call_kwargs: dict[str, Any], request: int, **more: Any) -> None:
    """Keep the latents of a request: its number is the seed of noise and prompt."""
    generator = torch.Generator().manual_seed(request)
    own = {
        key: torch.randn(call_kwargs[key].shape, generator=generator)
        for key in ("latents", "prompt_embeds", "pooled_prompt_embeds")
    }
    result = pipe(**{**call_kwargs, **own, **more})
    if result is not None:
        latents[name] = result[0].contiguous().clone()


def in_a_row(route: str, requests: list[int]) -> None:
    pipe, call_kwargs = pipeline(route)
    with enable(pipe, codec="int4", order=1, min_numel=256):
        for request in requests:
            draw(f"{route} {request}", pipe, call_kwargs, request)
    if len(requests) > 1:
        draw(f"{route} {requests[0]} uncompressed", pipe, call_kwargs, requests[0])


def nested(route: str, outer: int, inner: int) -> None:
    one, call_kwargs = pipeline(route)
    two = parallel_tiny("flux", steps=STEPS, **DEGREES[route])[0]
    with enable(one, codec="int4", order=1, min_numel=256), enable(two, codec="int4", order=1, min_numel=256):

        def meanwhile(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            if step == STEPS // 2:
                draw(f"{route} {inner} inside", two, call_kwargs, inner)
            return {}

        draw(f"{route} {outer} outside", one, call_kwargs, outer, callback_on_step_end=meanwhile)


for part in sys.argv[2].split(", "):
    route, requests = part.split()
    if "(" in requests:
        outer, inner = requests.rstrip(")").split("(")
        nested(route, int(outer), int(inner))
    else:
        in_a_row(route, [int(request) for request in requests.split("+")])
if latents:
    save_file(latents, sys.argv[1])
leave()
