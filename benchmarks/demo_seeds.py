"""Error of the demo's final latents over several noise seeds, per codec and prediction order.

    torchrun --nproc-per-node 2 benchmarks/demo_seeds.py --route ring --seeds 16 --json FILE

Runs the same pipeline as ``compactdist demo``. For every seed the uncompressed run is the reference; prints median and
range of ||x - x_ref|| / ||x_ref|| over the seeds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from compactdist_xdit.demo_worker import METHODS, UNCOMPRESSED, parallel_pipeline, run
from compactdist_xdit.digits import STEPS, noise_latents

VARIANTS: dict[str, dict[str, Any]] = {
    "int8": {"codec": "int8"},
    "int4": {"codec": "int4"},
    "int2": {"codec": "int2"},
    "binary": {"codec": "binary"},
    "int4, order 2": {"codec": "int4", "order": 2},
    "int2, order 2": {"codec": "int2", "order": 2},
    "binary, order 2": {"codec": "binary", "order": 2},
    "binary, no layout hint": {"codec": "binary", "layouts": None},
    "binary, no residual": {"codec": "binary", "order": 0},
}


def main() -> None:
    """Run all variants over all seeds."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--route", choices=["ring", "ulysses"], default="ring")
    parser.add_argument("--seeds", type=int, default=16)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    torch.set_num_threads(1)
    pipe, call_kwargs = parallel_pipeline(args.route, STEPS, None)
    errors: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for seed in range(args.seeds):
        call_kwargs["latents"] = noise_latents(seed)
        reference, _ = run(pipe, call_kwargs, METHODS[UNCOMPRESSED])
        for name, options in VARIANTS.items():
            latents, _ = run(pipe, call_kwargs, options)
            if latents is not None and reference is not None:
                errors[name].append(float((latents - reference).norm() / reference.norm()))
    if errors["int8"]:
        rows = [
            {"variant": name, "median": statistics.median(e), "min": min(e), "max": max(e), "errors": e}
            for name, e in errors.items()
        ]
        for row in rows:
            sys.stdout.write(f"{row['variant']:24s} {row['median']:.2e}  ({row['min']:.2e} to {row['max']:.2e})\n")
        if args.json is not None:
            command = f"torchrun --nproc-per-node 2 benchmarks/demo_seeds.py --route {args.route} --seeds {args.seeds}"
            args.json.write_text(json.dumps({"command": command, "steps": STEPS, "rows": rows}, indent=1) + "\n")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
