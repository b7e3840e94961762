"""Image error of codecs between PipeFusion's stages on the digits FLUX, over several noise seeds.

    python -m benchmarks.pipefusion_quality --seeds 4 --json benchmarks/results/pipefusion_quality.json
    python -m benchmarks.pipefusion_quality --show benchmarks/results/pipefusion_quality.json

Starts torchrun with two ranks by itself: two stages, two patches, one synchronous step, 28 steps. For every seed
uncompressed PipeFusion is the reference; prints median and range of ||x - x_ref|| / ||x_ref|| of the final latents
(which are this model's pictures) over the seeds, and the bytes between the stages. `--show` prints stored results
again.
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

from compactdist import CallInfo
from compactdist_xdit.demo_worker import METHODS, UNCOMPRESSED, parallel_pipeline, run
from compactdist_xdit.digits import STEPS, noise_latents
from compactdist_xdit.fine import Fine

RANKS = 2


def only_latents_fine(call: CallInfo) -> str | None:
    """The adapter's policy without the exceptions for the first residual and the last message."""
    return Fine("pipefusion", RANKS - 1)(call)


VARIANTS: dict[str, dict[str, Any]] = {
    **{codec: {"codec": codec} for codec in ("int8", "int4", "int2", "binary")},
    **{f"{codec}, order 2": {"codec": codec, "order": 2} for codec in ("int8", "int4", "int2", "binary")},
    **{f"{codec}, its ends too": {"codec": codec, "policy": only_latents_fine} for codec in ("int4", "int2", "binary")},
}


def measure(seeds: int, variants: list[str]) -> list[dict[str, Any]]:
    """These variants over all seeds; empty on the rank without pictures."""
    torch.set_num_threads(1)
    pipe, call_kwargs = parallel_pipeline("pipefusion", STEPS, None)
    found: dict[str, dict[str, Any]] = {name: {"variant": name, "errors": []} for name in variants}
    for seed in range(seeds):
        call_kwargs["latents"] = noise_latents(seed)
        reference, _ = run(pipe, call_kwargs, METHODS[UNCOMPRESSED])
        for name in variants:
            latents, record = run(pipe, call_kwargs, VARIANTS[name])
            if latents is None or reference is None:
                continue
            found[name]["errors"].append(float((latents - reference).norm() / reference.norm()))
            found[name] |= {key: record[key] for key in ("raw_bytes", "wire_bytes")}
    rows = [row for row in found.values() if row["errors"]]
    for row in rows:
        row |= {"median": statistics.median(row["errors"]), "min": min(row["errors"]), "max": max(row["errors"])}
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table, in the order of `VARIANTS`."""
    lines = ["| variant | raw / wire bytes | relative error: median (range) |", "|---|---:|---|"]
    for row in rows:
        spread = f"{row['median']:.1e} ({row['min']:.1e} to {row['max']:.1e})"
        lines.append(f"| {row['variant']} | {row['raw_bytes'] / row['wire_bytes']:.2f} | {spread} |")
    return "\n".join(lines)


def main() -> None:
    """Start the ranks, or be one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--show", type=Path, help="print these results instead of measuring")
    args = parser.parse_args()
    if args.show is not None:
        sys.stdout.write(table(json.loads(args.show.read_text())["rows"]) + "\n")
        return
    if "RANK" not in os.environ:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
        command += ["-m", "benchmarks.pipefusion_quality", *sys.argv[1:]]
        sys.exit(subprocess.run(command, env={"OMP_NUM_THREADS": "1", **os.environ}, check=False).returncode)
    rows = measure(args.seeds, args.variants)
    if rows:
        sys.stdout.write(table(rows) + "\n")
        if args.json is not None:
            command = f"python -m benchmarks.pipefusion_quality --seeds {args.seeds}"
            record = {"command": command, "steps": STEPS, "ranks": RANKS, "torch": torch.__version__, "rows": rows}
            args.json.write_text(json.dumps(record, indent=1) + "\n")
    sys.stdout.flush()
    dist.barrier()
    os._exit(0)  # xfuser's and gloo's threads may outlive an orderly exit


if __name__ == "__main__":
    main()
