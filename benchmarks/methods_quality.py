"""Image error of the parallel methods and codecs on the digits FLUX, over several noise seeds.

    python -m benchmarks.methods_quality --seeds 16 --json benchmarks/results/methods_quality.json
    python -m benchmarks.methods_quality --show benchmarks/results/methods_quality.json

Starts torchrun with two ranks by itself. For every seed the uncompressed ring is the reference; prints median and range
of ||x - x_ref|| / ||x_ref|| of the final latents (which are this model's pictures) over the seeds, and the bytes that
the ring's gathers put on the link. All methods and codecs warm up for one step. Below the table some variants are
compared seed by seed. `--show` prints stored results again.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from compactdist import Rule
from compactdist_xdit.demo_worker import METHODS, UNCOMPRESSED, parallel_pipeline, pass_everything, run
from compactdist_xdit.digits import STEPS, noise_latents

RANKS = 2
LAST = STEPS - 1
PASS: dict[str, Any] = {"codec": "raw", "policy": pass_everything}
STALE: dict[str, Any] = {"parallel_method": "distrifusion", "method_warmup_steps": 1}
LAST_SYNC: dict[str, Any] = {**STALE, "method_sync_from_step": LAST}


def last_step(codec: str) -> Rule:
    """The policy of another codec in the last step, whose number is known from the number of steps."""
    return Rule(codec, first_step=LAST)


VARIANTS: dict[str, dict[str, Any]] = {
    "DistriFusion": {**PASS, **STALE},
    "DistriFusion, last step synchronous": {**PASS, **LAST_SYNC},
    "ring, int4": {"codec": "int4"},
    "ring, int2": {"codec": "int2"},
    "ring, binary": {"codec": "binary"},
    "ring, int2, last step int8": {"codec": "int2", "policy": last_step("int8")},
    "ring, int2, last step raw": {"codec": "int2", "policy": last_step("raw")},
    "ring, binary, last step int8": {"codec": "binary", "policy": last_step("int8")},
    "ring, binary, last step raw": {"codec": "binary", "policy": last_step("raw")},
    "patch": {**PASS, "parallel_method": "patch"},
    "patch, int2": {"codec": "int2", "parallel_method": "patch"},
    "patch, int2, own chunk as others see it": {"codec": "int2", "parallel_method": "patch", "exact_own": False},
    "DistriFusion, int4": {"codec": "int4", **STALE},
    "DistriFusion, int2": {"codec": "int2", **STALE},
    "DistriFusion, binary": {"codec": "binary", **STALE},
    "DistriFusion, int2, last step synchronous": {"codec": "int2", **LAST_SYNC},
}

PAIRS = [
    ("DistriFusion", "ring, binary"),
    ("DistriFusion", "ring, int2"),
    ("DistriFusion, int4", "DistriFusion"),
    ("DistriFusion, int2", "DistriFusion"),
    ("DistriFusion, last step synchronous", "DistriFusion"),
    ("ring, int2, last step raw", "ring, int2"),
    ("ring, int2, last step int8", "ring, int2"),
    ("ring, binary, last step raw", "ring, binary"),
    ("patch, int2, own chunk as others see it", "patch, int2"),
]


def measure(seeds: int) -> list[dict[str, Any]]:
    """All variants over all seeds; empty on the rank without pictures."""
    torch.set_num_threads(1)
    pipe, call_kwargs = parallel_pipeline("ring", STEPS, None)
    errors: dict[str, list[float]] = {name: [] for name in VARIANTS}
    bytes_sent: dict[str, tuple[int, int]] = {}
    for seed in range(seeds):
        call_kwargs["latents"] = noise_latents(seed)
        reference, _ = run(pipe, call_kwargs, METHODS[UNCOMPRESSED])
        for name, options in VARIANTS.items():
            latents, record = run(pipe, call_kwargs, options)
            if latents is None or reference is None:
                continue
            errors[name].append(float((latents - reference).norm() / reference.norm()))
            bytes_sent[name] = record["raw_bytes"], record["wire_bytes"]
    return [
        {
            "variant": name,
            "median": statistics.median(found),
            "min": min(found),
            "max": max(found),
            "raw_bytes": bytes_sent[name][0],
            "wire_bytes": bytes_sent[name][1],
            "errors": found,
        }
        for name, found in errors.items()
        if found
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table, the smallest median first."""
    lines = ["| variant | raw / wire bytes | relative error: median (range) |", "|---|---:|---|"]
    for row in sorted(rows, key=lambda row: row["median"]):
        spread = f"{row['median']:.1e} ({row['min']:.1e} to {row['max']:.1e})"
        lines.append(f"| {row['variant']} | {row['raw_bytes'] / row['wire_bytes']:.2f} | {spread} |")
    return "\n".join(lines)


def paired(rows: list[dict[str, Any]]) -> str:
    """Errors of one variant over those of another at the same noise: median (range) over the seeds."""
    errors = {row["variant"]: row["errors"] for row in rows}
    lines = []
    for one, other in PAIRS:
        ratios = [a / b for a, b in zip(errors[one], errors[other], strict=True)]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        lines.append(f"| {one} | {other} | {spread} |")
    return "\n".join(["| error of | over error of | ratio: median (range) |", "|---|---|---|", *lines])


def show(rows: list[dict[str, Any]]) -> None:
    """Print both tables."""
    sys.stdout.write(f"{table(rows)}\n\n{paired(rows)}\n")


def main() -> None:
    """Start the ranks, or be one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=16)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--show", type=Path, help="print these results instead of measuring")
    args = parser.parse_args()
    if args.show is not None:
        show(json.loads(args.show.read_text())["rows"])
        return
    if "RANK" not in os.environ:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
        command += ["-m", "benchmarks.methods_quality", *sys.argv[1:]]
        sys.exit(subprocess.run(command, env={"OMP_NUM_THREADS": "1", **os.environ}, check=False).returncode)
    rows = measure(args.seeds)
    if rows:
        show(rows)
        if args.json is not None:
            command = f"python -m benchmarks.methods_quality --seeds {args.seeds}"
            record = {"command": command, "steps": STEPS, "ranks": RANKS, "torch": torch.__version__, "rows": rows}
            args.json.write_text(json.dumps(record, indent=1) + "\n")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
