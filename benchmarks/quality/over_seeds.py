"""Image error on the digits FLUX over several noise seeds: what the scripts share that measure it.

For every seed the uncompressed run on the same route is the reference, unless a script has another; errors are
||x - x_ref|| / ||x_ref|| of the final latents, which are this model's pictures.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.common import add_json, write_json
from compactdist_harness.demo_worker import METHODS, UNCOMPRESSED, run
from compactdist_harness.digits import STEPS, noise_latents
from compactdist_harness.xdit import parallel_digits

RANKS = 2
Reference = Callable[[dict[str, Any]], Tensor]


def measure(
    route: str, variants: dict[str, dict[str, Any]], seeds: int, reference_of: Reference | None = None
) -> list[dict[str, Any]]:
    """Errors and bytes of variants; collective.

    Args:
        route: of `parallel_digits`.
        variants: options of `enable` by name. Variants with equal options are measured once.
        seeds: how many.
        reference_of: given the arguments of a call, the latents `(10, 64, 4)` that errors are measured against; `None`:
            those of the uncompressed run on this route.

    Returns:
        A row for each variant; empty on the rank without pictures.
    """
    torch.set_num_threads(1)
    pipe, call_kwargs = parallel_digits(route, STEPS)
    same = {name: next(o for o, others in variants.items() if others == own) for name, own in variants.items()}
    rows: dict[str, dict[str, Any]] = {name: {"errors": []} for name in variants if same[name] == name}
    for seed in range(seeds):
        call_kwargs["latents"] = noise_latents(seed)
        reference = reference_of(call_kwargs) if reference_of else run(pipe, call_kwargs, METHODS[UNCOMPRESSED])[0]
        for name, row in rows.items():
            latents, record = run(pipe, call_kwargs, variants[name])
            if latents is None or reference is None:
                continue
            row["errors"].append(float((latents - reference).norm() / reference.norm()))
            print(f"{route}, seed {seed}, {name}: {row['errors'][-1]:.1e}", file=sys.stderr, flush=True)
            row |= {key: record[key] for key in ("raw_bytes", "wire_bytes")}
    for row in rows.values():
        if errors := row["errors"]:
            row |= {"median": statistics.median(errors), "min": min(errors), "max": max(errors)}
    return [{"variant": name, **rows[same[name]]} for name in variants if rows[same[name]]["errors"]]


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table."""
    lines = ["| variant | raw / wire bytes | relative error: median (range) |", "|---|---:|---|"]
    lines += [f"| {row['variant']} | {row['raw_bytes'] / row['wire_bytes']:.2f} | {spread(row)} |" for row in rows]
    return "\n".join(lines)


def spread(row: dict[str, Any]) -> str:
    """Median and range of a row's errors."""
    return f"{row['median']:.1e} ({row['min']:.1e} to {row['max']:.1e})"


def start_ranks(script: str, words: Sequence[str]) -> int:
    """Start a script of this package on `RANKS` ranks with these arguments; the exit status."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    command += ["-m", f"benchmarks.quality.{script}", *words]
    return subprocess.run(command, env={"OMP_NUM_THREADS": "1", **os.environ}, check=False).returncode


def end_rank() -> NoReturn:
    """End this rank when all are done; xfuser's and gloo's threads may outlive an orderly exit."""
    sys.stdout.flush()
    dist.barrier()
    os._exit(0)


def main(
    doc: str,
    script: str,
    route: str,
    variants: dict[str, dict[str, Any]],
    seeds: int,
    show: Callable[[list[dict[str, Any]]], str],
) -> None:
    """The command line of a script: start the ranks, or be one; measure, print and store, or show what is stored.

    Args:
        doc: of the script.
        script: its name in this package.
        route: of `parallel_digits`.
        variants: what to measure, by name.
        seeds: how many, unless said otherwise.
        show: rows as text.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=seeds)
    parser.add_argument("--variants", nargs="+", choices=list(variants), default=list(variants))
    add_json(parser)
    parser.add_argument("--show", type=Path, help="print these results instead of measuring")
    args = parser.parse_args()
    if args.show is not None:
        sys.stdout.write(show(json.loads(args.show.read_text())["rows"]) + "\n")
        return
    if "RANK" not in os.environ:
        sys.exit(start_ranks(script, sys.argv[1:]))
    rows = measure(route, {name: variants[name] for name in args.variants}, args.seeds)
    if rows:
        sys.stdout.write(show(rows) + "\n")
        command = f"python -m benchmarks.quality.{script} --seeds {args.seeds}"
        record = {"command": command, "steps": STEPS, "ranks": RANKS, "torch": torch.__version__, "rows": rows}
        write_json(args.json, record)
    end_rank()
