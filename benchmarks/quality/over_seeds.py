"""Image error on the digits FLUX over several noise seeds: what the scripts share that measure it.

For every seed the uncompressed run on the same route is the reference; errors are ||x - x_ref|| / ||x_ref|| of the
final latents, which are this model's pictures.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.common import add_json, write_json
from compactdist_harness.demo_worker import METHODS, UNCOMPRESSED, run
from compactdist_harness.digits import STEPS, noise_latents
from compactdist_harness.xdit import parallel_digits

RANKS = 2


def measure(route: str, variants: dict[str, dict[str, Any]], seeds: int) -> list[dict[str, Any]]:
    """A row for each of the variants, options of `enable`; empty on the rank without pictures."""
    torch.set_num_threads(1)
    pipe, call_kwargs = parallel_digits(route, STEPS)
    rows: dict[str, dict[str, Any]] = {name: {"variant": name, "errors": []} for name in variants}
    for seed in range(seeds):
        call_kwargs["latents"] = noise_latents(seed)
        reference, _ = run(pipe, call_kwargs, METHODS[UNCOMPRESSED])
        for name, options in variants.items():
            latents, record = run(pipe, call_kwargs, options)
            if latents is None or reference is None:
                continue
            rows[name]["errors"].append(float((latents - reference).norm() / reference.norm()))
            rows[name] |= {key: record[key] for key in ("raw_bytes", "wire_bytes")}
    found = [row for row in rows.values() if row["errors"]]
    for row in found:
        row |= {"median": statistics.median(row["errors"]), "min": min(row["errors"]), "max": max(row["errors"])}
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table."""
    lines = ["| variant | raw / wire bytes | relative error: median (range) |", "|---|---:|---|"]
    for row in rows:
        spread = f"{row['median']:.1e} ({row['min']:.1e} to {row['max']:.1e})"
        lines.append(f"| {row['variant']} | {row['raw_bytes'] / row['wire_bytes']:.2f} | {spread} |")
    return "\n".join(lines)


def main(
    doc: str,
    script: str,
    route: str | None,
    variants: dict[str, dict[str, Any]],
    seeds: int,
    show: Callable[[list[dict[str, Any]]], str],
) -> None:
    """The command line of a script: start the ranks, or be one; measure, print and store, or show what is stored.

    Args:
        doc: of the script.
        script: its name in this package.
        route: of `parallel_digits`; `None`: the command line names it.
        variants: what to measure, by name.
        seeds: how many, unless said otherwise.
        show: rows as text.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=seeds)
    if route is None:
        parser.add_argument("--route", choices=("ring", "ulysses"), default="ring")
    parser.add_argument("--variants", nargs="+", choices=list(variants), default=list(variants))
    add_json(parser)
    parser.add_argument("--show", type=Path, help="print these results instead of measuring")
    args = parser.parse_args()
    if args.show is not None:
        sys.stdout.write(show(json.loads(args.show.read_text())["rows"]) + "\n")
        return
    if "RANK" not in os.environ:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
        command += ["-m", f"benchmarks.quality.{script}", *sys.argv[1:]]
        sys.exit(subprocess.run(command, env={"OMP_NUM_THREADS": "1", **os.environ}, check=False).returncode)
    chosen = args.route if route is None else route
    rows = measure(chosen, {name: variants[name] for name in args.variants}, args.seeds)
    if rows:
        sys.stdout.write(show(rows) + "\n")
        command = f"python -m benchmarks.quality.{script} --seeds {args.seeds}"
        command += f" --route {chosen}" if route is None else ""
        record = {"command": command, "steps": STEPS, "ranks": RANKS, "torch": torch.__version__, "rows": rows}
        write_json(args.json, record)
    sys.stdout.flush()
    dist.barrier()
    os._exit(0)  # xfuser's and gloo's threads may outlive an orderly exit
