"""Error of the demo's final latents over several noise seeds, per codec and prediction order.

    torchrun --nproc-per-node 2 -m benchmarks.quality.demo_seeds --route ring --seeds 16 --json FILE

Runs the same pipeline as ``compactdist demo``. For every seed the uncompressed run is the reference; prints median and
range of ||x - x_ref|| / ||x_ref|| over the seeds.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch.distributed as dist

from benchmarks.common import add_json, write_json
from benchmarks.quality.over_seeds import measure
from compactdist_harness.digits import STEPS

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
    add_json(parser)
    args = parser.parse_args()

    rows = measure(args.route, VARIANTS, args.seeds)
    if rows:
        for row in rows:
            sys.stdout.write(f"{row['variant']:24s} {row['median']:.2e}  ({row['min']:.2e} to {row['max']:.2e})\n")
        module = "torchrun --nproc-per-node 2 -m benchmarks.quality.demo_seeds"
        command = f"{module} --route {args.route} --seeds {args.seeds}"
        write_json(args.json, {"command": command, "steps": STEPS, "rows": rows})
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
