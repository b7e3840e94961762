"""Record a trace of the digits FLUX model in xDiT's ring attention, for `compactdist evaluate`.

    torchrun --nproc-per-node 2 tools/record_digits.py --out benchmarks/traces/digits_ring.safetensors

Runs the pipeline of `compactdist demo` (ring attention on two ranks, 28 steps, seed 0) with codec `raw`, so that the
activations are those of the uncompressed run, and records what rank 0 sends. Of each recorded site (the first
double-stream and the last single-stream attention) the keys and values of the first digits are kept, rank 0's half of
the tokens, as float16: tensors `[steps, 2 * digits * tokens, 128]`, keys first, the metadata `groups` saying so.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist

import compactdist
from compactdist.observe.trace import Trace, save_trace
from compactdist_harness.digits import CLASSES, STEPS
from compactdist_harness.xdit import parallel_digits
from compactdist_xdit.adapter import enable

SITES = ("kv/transformer_blocks.0.attn/*", "kv/single_transformer_blocks.1.attn/*")


def keep_digits(source: Path, target: Path, digits: int) -> None:
    """Cut a recorded trace down to the first `digits` of the batch."""
    recorded = Trace(source)
    tensors, groups = {}, {}
    for site in recorded.sites:
        x = recorded.load(site)
        steps, rows, channels = x.shape
        groups[site] = recorded.groups(site, rows)
        by_digit = x.view(steps, groups[site], CLASSES, -1, channels)
        tensors[site] = by_digit[:, :, :digits].reshape(steps, -1, channels)
    about = {
        "kept": f"digits 0 to {digits - 1} of {CLASSES}, rank 0's half of the tokens",
        "made by": Path(__file__).name,
    }
    metadata = recorded.metadata | about | {"sites": json.dumps(list(tensors))}
    save_trace(target, tensors, groups, metadata)


def main() -> None:
    parser = argparse.ArgumentParser(description="Record a trace of the digits model; start it with torchrun.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--digits", type=int, default=3, choices=range(1, CLASSES + 1), help="digits to keep")
    args = parser.parse_args()

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ["WORLD_SIZE"])))
    pipe, call_kwargs = parallel_digits("ring", args.steps)
    with tempfile.TemporaryDirectory() as folder, enable(pipe, codec="raw") as handle:
        ring = handle.groups["ring"]
        whole = compactdist.record(ring, Path(folder, "whole.safetensors"), sites=SITES, dtype=torch.float16)
        with whole if dist.get_rank() == 0 else nullcontext() as recording:
            pipe(**call_kwargs)
        if recording is not None:
            keep_digits(Path(recording.path), args.out, args.digits)
            for site in (trace := Trace(args.out)).sites:
                print(site, list(trace.load(site).shape))
            print(f"{args.out}: {args.out.stat().st_size} bytes")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
