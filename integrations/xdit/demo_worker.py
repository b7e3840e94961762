"""The worker of `compactdist demo`: draw ten digits with xDiT on two CPU ranks, once for every method.

    torchrun --nproc-per-node 2 -m compactdist_xdit.demo_worker --route ring --out results/

Every method runs the same xFuserFluxPipeline with the same noise. `uncompressed` goes through a wrapped group
as well, one that passes everything through, so that all bytes are counted at the same place. For each method
the rank that holds the picture writes `METHOD.json` (bytes summed over the ranks, seconds, error) and
`METHOD.safetensors` (`latents` `(10, 64, 4)` and `images` `(10, 16, 16)` in [0, 1]).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from compactdist_xdit import cpu
from compactdist_xdit.adapter import Handle, enable
from compactdist_xdit.digits import STEPS, decode_latents, load_digits_pipeline

UNCOMPRESSED = "uncompressed"


def pass_everything(call: Any) -> str:
    """The policy of the uncompressed run: xfuser's own collectives, only counted."""
    return "pass"


METHODS: dict[str, dict[str, Any]] = {
    UNCOMPRESSED: {"codec": "raw", "policy": pass_everything},
    "int8": {"codec": "int8"},
    "int4": {"codec": "int4"},
    "int2": {"codec": "int2"},
    "binary": {"codec": "binary"},
    "binary-no-residual": {"codec": "binary", "order": 0},
}


def parallel_pipeline(route: str, steps: int, checkpoint: Path | None) -> tuple[Any, dict[str, Any]]:
    """The xDiT pipeline over all ranks and the arguments to call it with.

    Args:
        route: `"ring"`, `"ulysses"`, or `"pipefusion"` with as many patches as ranks and one synchronous step.
        steps: denoising steps.
        checkpoint: of the digits model; `None`: the one that is shipped.
    """
    os.environ.setdefault("LOG_LEVEL", "error")  # read by xfuser at import; it logs at debug level otherwise
    cpu.install()
    from xfuser import xFuserArgs
    from xfuser.model_executor.pipelines.register import xFuserPipelineWrapperRegister

    world = int(os.environ["WORLD_SIZE"])
    arguments = xFuserArgs(
        model="digits",
        ring_degree=world if route == "ring" else 1,
        ulysses_degree=world if route == "ulysses" else 1,
        pipefusion_parallel_degree=world if route == "pipefusion" else 1,
        num_pipeline_patch=world if route == "pipefusion" else None,
        warmup_steps=1,  # PipeFusion's; of no meaning elsewhere
        # Ring attention needs a kernel that returns the log-sum-exp.
        attention_backend="SDPA_FLASH" if route == "ring" else "SDPA",
        num_inference_steps=steps,
    )
    engine_config, _ = arguments.create_config()
    engine_config.runtime_config.dtype = torch.float32
    pipe, call_kwargs = load_digits_pipeline(checkpoint, steps=steps)
    wrapper = xFuserPipelineWrapperRegister.get_class(pipe)
    return wrapper(pipeline=pipe, engine_config=engine_config), call_kwargs


def counters(handle: Handle) -> dict[str, int]:
    """Bytes sent and kept, summed over groups and ranks."""
    names = ("raw_bytes", "wire_bytes", "compressed_calls", "passed_through", "state_bytes")
    stats = list(handle.stats().values())
    total = torch.tensor([sum(int(getattr(s, name)) for s in stats) for name in names], dtype=torch.int64)
    dist.all_reduce(total)
    return dict(zip(names, total.tolist(), strict=True))


def call_bits(handle: Handle) -> float | None:
    """Wire bits per element of the last residual call at the sites with the largest buffers; None if there was none."""
    sites = [site for stats in handle.stats().values() for site in stats.sites.values() if site.calls]
    sites = [site for site in sites if not math.isnan(site.last_wire_bits_per_element)]
    if not sites:
        return None
    largest = max(site.raw_bytes / site.calls for site in sites)
    return max(s.last_wire_bits_per_element for s in sites if s.raw_bytes / s.calls == largest)


def run(pipe: Any, call_kwargs: dict[str, Any], options: dict[str, Any]) -> tuple[Tensor | None, dict[str, Any]]:
    """One request: latents `(10, 64, 4)` (None on the ranks without output) and what it took."""
    with enable(pipe, **options) as handle:
        dist.barrier()
        start = time.perf_counter()
        output = pipe(**call_kwargs)
        dist.barrier()
        record: dict[str, Any] = {"seconds": time.perf_counter() - start, **counters(handle)}
        record["call_bits_per_element"] = call_bits(handle)
        record["explain"] = handle.explain()
    return (None if output is None else output[0]), record


def compare(latents: Tensor, reference: Tensor) -> dict[str, float | None]:
    """Error of the final latents against the uncompressed ones: relative norm, and in dB (None: equal)."""
    relative = float((latents - reference).norm() / reference.norm())
    return {"relative_error": relative, "nmse_db": 20 * math.log10(relative) if relative else None}


def main() -> None:
    parser = argparse.ArgumentParser(description="Worker of `compactdist demo`; start it with torchrun.")
    parser.add_argument("--route", choices=["ring", "ulysses"], default="ring")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    args = parser.parse_args()

    from safetensors.torch import save_file

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ["WORLD_SIZE"])))
    args.out.mkdir(parents=True, exist_ok=True)
    pipe, call_kwargs = parallel_pipeline(args.route, args.steps, args.checkpoint)
    reference = None
    # The uncompressed run comes first, everything else is measured against it.
    for method in dict.fromkeys([UNCOMPRESSED, *args.methods]):
        latents, record = run(pipe, call_kwargs, METHODS[method])
        if latents is None:
            continue
        reference = latents if reference is None else reference
        record = {"method": method, "route": args.route, "steps": args.steps, **record}
        record |= compare(latents, reference)
        images = decode_latents(latents)
        save_file({"latents": latents.contiguous(), "images": images}, args.out / f"{method}.safetensors")
        # last, and in one piece: whoever started this follows the run by these files
        unfinished = args.out / f".{method}.json"
        unfinished.write_text(json.dumps(record, indent=1) + "\n")
        unfinished.rename(args.out / f"{method}.json")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
