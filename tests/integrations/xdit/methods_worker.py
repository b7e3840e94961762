"""The parallel methods in xfuser's own pipeline and in its USP function. Started by test_methods_xdit.py.

    methods_worker.py OUT.json ULYSSES_DEGREE

Rank with output writes errors between latents (maximum absolute, or relative norm), counts and messages.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from compactdist_harness.cpu import xdit as xdit_on_cpu
from compactdist_harness.digits import load_digits_pipeline, noise_latents
from compactdist_harness.xdit import engine, wrapped
from compactdist_xdit import enable

STEPS = 8
torch.set_num_threads(1)
os.environ.setdefault("LOG_LEVEL", "error")
xdit_on_cpu.install()
from xfuser.model_executor.layers import usp  # noqa: E402

out, ulysses = Path(sys.argv[1]), int(sys.argv[2])
world = int(os.environ["WORLD_SIZE"])
engine_config = engine("digits", STEPS, ring_degree=world // ulysses, ulysses_degree=ulysses)
plain_pipe, call_kwargs = load_digits_pipeline(steps=STEPS)
pipe = wrapped(plain_pipe, engine_config)
has_output = dist.get_rank() == world - 1
record: dict[str, Any] = {"errors": {}, "counts": {}, "calls": {}, "refusals": {}}


def draw(seed: int = 0) -> Tensor:
    """Latents `(10, 64, 4)`; on ranks without output an empty tensor, so that every rank can compare."""
    result = pipe(**{**call_kwargs, "latents": noise_latents(seed)})
    return torch.zeros(0) if result is None else result[0]


def largest(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max()) if has_output else 0.0


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm()) if has_output else 0.0


def requests(seeds: list[int], **options: Any) -> list[Tensor]:
    """Latents of several requests while one handle lives."""
    with enable(pipe, **options) as handle:
        latents = [draw(seed) for seed in seeds]
        name = "/".join(str(option) for option in options.values())
        name += f", {len(seeds)} requests" if len(seeds) > 1 else ""
        record["counts"][name] = dict(handle.method.counts) if handle.method else {}
        record["calls"][name] = {
            route: {
                "compressed": stats.compressed_calls,
                "passed": stats.passed_through,
                "predicted": stats.predicted,
                "raw": stats.raw_bytes,
                "wire": stats.wire_bytes,
                "keys": list(stats.sites),
            }
            for route, stats in handle.stats().items()
        }
        record["explained"] = handle.explain()
    return latents


def refusal(name: str, **options: Any) -> None:
    try:
        enable(pipe, **options).disable()
    except Exception as error:
        record["refusals"][name] = f"{type(error).__name__}: {error}"


def joint(strategy: str | None, parallel_method: str | None) -> Tensor:
    """One call of xfuser's USP with tensors of this rank, and with text that all ranks have."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    own = list(torch.randn(3, 2, 4, 6, 8, generator=generator))
    text = list(torch.randn(3, 2, 4, 5, 8, generator=torch.Generator().manual_seed(99)))
    if strategy is None:
        return usp.USP(*own)
    names = ("joint_query", "joint_key", "joint_value")
    return usp.USP(*own, joint_strategy=strategy, **dict(zip(names, text, strict=True)))


# --- the pipeline
errors = record["errors"]
before = usp.ring_attn
ring, ring_other = draw(0), draw(1)
(patch,) = requests([0], codec=None, parallel_method="patch")
errors["patch - ring"] = largest(patch, ring)
(raw,) = requests([0], codec="raw", parallel_method="patch")
errors["patch, raw - patch"] = largest(raw, patch)
(ring4,) = requests([0], codec="int4")
(patch4,) = requests([0], codec="int4", parallel_method="patch")
predicted, predicted_again = requests([0, 0], codec="int4", parallel_method="patch", mode="predict-now")
errors["predicted: second request"] = largest(predicted_again, predicted)
errors["ring, int4"], errors["patch, int4"] = relative(ring4, ring), relative(patch4, ring)

for codec in (None, "int4"):
    synchronous = patch if codec is None else patch4
    warm, again, other, back = requests([0, 0, 1, 0], codec=codec, parallel_method="distrifusion")
    (alone,) = requests([1], codec=codec, parallel_method="distrifusion")
    errors[f"distrifusion, {codec}"] = relative(warm, ring)
    errors[f"predicted, int4 - distrifusion, {codec}"] = largest(predicted, warm)
    errors[f"distrifusion, {codec}: second request"] = largest(again, warm)
    errors[f"distrifusion, {codec}: after another request"] = largest(back, warm)
    errors[f"distrifusion, {codec}: after others - alone"] = largest(other, alone)
    errors[f"distrifusion, {codec}: other noise"] = relative(other, ring_other)
    (all_warm,) = requests([0], codec=codec, parallel_method="distrifusion", method_warmup_steps=STEPS)
    errors[f"distrifusion, {codec}, all warm-up - patch"] = largest(all_warm, synchronous)
    (last,) = requests([0], codec=codec, parallel_method="distrifusion", method_sync_from_step=STEPS - 1)
    errors[f"distrifusion, {codec}, last step synchronous"] = relative(last, ring)

# --- what is refused
with enable(pipe, codec="int4", parallel_method="patch"):
    refusal("twice", codec="int2", parallel_method="patch")
with enable(pipe, codec=None, parallel_method="patch"):
    refusal("twice without a codec", codec=None, parallel_method="distrifusion")
refusal("nothing to do", codec=None)
refusal("unknown", parallel_method="pipefusion")
refusal("useless options", codec=None, parallel_method="patch", order=2)
record["restored"] = usp.ring_attn is before
errors["afterwards"] = largest(draw(0), ring)

# --- joint tensors, which this FLUX splits over the ranks
for strategy in (None, "front", "rear"):
    reference = joint(strategy, None)
    with enable(pipe, codec=None, parallel_method="patch") as handle:
        handle.method.begin_step()
        handle.method.before_forward()
        difference = (joint(strategy, "patch") - reference).abs().max()
        dist.all_reduce(difference, op=dist.ReduceOp.MAX)
        errors[f"USP, {strategy}"] = float(difference)

if has_output:
    out.write_text(json.dumps(record))
dist.barrier()
dist.destroy_process_group()
