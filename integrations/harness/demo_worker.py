"""The worker of `compactdist demo`: draw ten digits with xDiT on two CPU ranks, once for every method.

    torchrun --nproc-per-node 2 -m compactdist_harness.demo_worker --route ring --out results/

Every method runs the same xFuserFluxPipeline with the same noise. `uncompressed` goes through a wrapped group as well,
one that passes every call through, so that one place counts the bytes of all methods. For each method the rank that
holds the picture writes `METHOD.json` (bytes summed over the ranks, seconds, error) and `METHOD.safetensors` (`latents`
`(10, 64, 4)` and `images` `(10, 16, 16)` in [0, 1]).
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

from compactdist_harness.digits import STEPS, decode_latents
from compactdist_harness.xdit import parallel_digits
from compactdist_xdit import Handle, enable

UNCOMPRESSED = "uncompressed"


def pass_everything(call: Any) -> str:
    """The policy of the uncompressed run: every call passes through to xfuser's own group, and is counted."""
    return "pass"


METHODS: dict[str, dict[str, Any]] = {
    UNCOMPRESSED: {"codec": "raw", "policy": pass_everything},
    "int8": {"codec": "int8"},
    "int4": {"codec": "int4"},
    "int2": {"codec": "int2"},
    "binary": {"codec": "binary"},
    "binary-no-residual": {"codec": "binary", "order": 0},
}


def counters(handle: Handle) -> dict[str, int]:
    """Bytes sent and kept, summed over groups and ranks."""
    names = ("raw_bytes", "wire_bytes", "compressed_calls", "passed_through", "state_bytes")
    stats = list(handle.stats().values())
    total = torch.tensor([sum(int(getattr(s, name)) for s in stats) for name in names], dtype=torch.int64)
    dist.all_reduce(total)
    return dict(zip(names, total.tolist(), strict=True))


def call_bits(handle: Handle) -> float | None:
    """Wire bits per element of the last residual call at the sites with the largest buffers.

    `None` where no site sent a residual.
    """
    sites = [site for stats in handle.stats().values() for site in stats.sites.values() if site.calls]
    sites = [site for site in sites if not math.isnan(site.last_wire_bits_per_element)]
    if not sites:
        return None
    largest = max(site.raw_bytes / site.calls for site in sites)
    return max(s.last_wire_bits_per_element for s in sites if s.raw_bytes / s.calls == largest)


def run(pipe: Any, call_kwargs: dict[str, Any], options: dict[str, Any]) -> tuple[Tensor | None, dict[str, Any]]:
    """One request: its latents `(10, 64, 4)` (`None` on the ranks without output), and its bytes, calls and seconds."""
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
    """The error of `latents` against `reference`: relative norm, and the same in dB (`None` where both are equal)."""
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
    pipe, call_kwargs = parallel_digits(args.route, args.steps, args.checkpoint)
    reference = None
    # The uncompressed run comes first: the errors of all others are measured against its latents.
    for method in dict.fromkeys([UNCOMPRESSED, *args.methods]):
        latents, record = run(pipe, call_kwargs, METHODS[method])
        if latents is None:
            continue
        reference = latents if reference is None else reference
        record = {"method": method, "route": args.route, "steps": args.steps, **record}
        record |= compare(latents, reference)
        images = decode_latents(latents)
        save_file({"latents": latents.contiguous(), "images": images}, args.out / f"{method}.safetensors")
        # Renamed when complete: `compactdist demo` follows the run by these files.
        unfinished = args.out / f".{method}.json"
        unfinished.write_text(json.dumps(record, indent=1) + "\n")
        unfinished.rename(args.out / f"{method}.json")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
