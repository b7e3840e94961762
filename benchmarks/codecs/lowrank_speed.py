"""Encoding time and loop error of ``lowrank_int4`` beside the recipe it comes from.

    python -m benchmarks.codecs.lowrank_speed --json benchmarks/results/lowrank_speed.json

Three encoders: CompactFusion's recipe (``reference_formulas.py``: two subspace iterations in float32 from random
directions), ours without a memory (cold), and ours with the memory a stream keeps (warm). Each plays the same values
through its own closed loop of order 1; at every step each goes from the new value and its own base, in the dtype of the
stream, to codes and scales, one after the other, and only that is timed. The first stream is synthetic at [1088, 3072]
in bfloat16 (CompactFusion's FLUX cell): changes in slowly turning directions of falling strength, plus white noise. The
second is the recorded trace in float32, for quality: its matrices of [102, 128] say nothing about time.

Error: the root of error energy over energy of the steps' changes, summed over the stream, with the quartiles of the
encoding times in milliseconds over all steps but the first two.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import check_load, finish, parser, quartiles
from benchmarks.quality import reference_formulas
from compactdist import codecs
from compactdist.codecs.lowrank.lowrank_int4 import LowRankInt4
from compactdist.observe.trace import Trace
from compactdist.state import plain

SHAPE = (1088, 3072)
RANK = 32
TRACE = Path(__file__).parents[1] / "traces/digits_ring.safetensors"
NAMES = ("reference", "cold", "warm")


def synthetic(shape: tuple[int, int], steps: int, directions: int, noise: float, turn: float) -> list[Tensor]:
    """A tensor whose changes lie in slowly turning directions, each 0.97 as strong as the one before, plus noise."""
    g = torch.Generator().manual_seed(0)
    left, right = (torch.randn(length, directions, generator=g) for length in shape)
    strength = 0.97 ** torch.arange(directions)
    strength = strength / strength.norm()
    keep = (1 - turn**2) ** 0.5
    values = [torch.randn(shape, generator=g)]
    for _ in range(steps):
        left = keep * left + turn * torch.randn(left.shape, generator=g)
        right = keep * right + turn * torch.randn(right.shape, generator=g)
        values.append(values[-1] + left * strength @ right.T + noise * torch.randn(shape, generator=g))
    return values


class Encoder:
    """One encoder inside its loop."""

    def __init__(self, name: str, start: Tensor) -> None:
        self.name = name
        self.base = start.clone()
        self.codec = codecs.get("lowrank_int4", rank=RANK)
        view = plain(start.numel(), 1, start.shape[1])
        self.session = self.codec.open(view, start.dtype, start.device)
        self.payload = torch.empty(self.session.payload_nbytes, dtype=torch.uint8)
        self.generator = torch.Generator().manual_seed(1)
        self.milliseconds: list[float] = []
        self.error = 0.0

    def step(self, x: Tensor) -> None:
        flat, base = x.reshape(-1), self.base.reshape(-1)
        encode: dict[str, Callable[[], Any]] = {
            "reference": lambda: reference_formulas.encode_lowrank_int4(
                x.float() - self.base.float(), RANK, self.generator
            ),
            "cold": lambda: self.session.encode(flat, (base,), None, self.payload),
            "warm": lambda: self.session.encode(flat, (base,), None, self.payload),
        }
        before = time.perf_counter()
        coded = encode[self.name]()
        self.milliseconds.append((time.perf_counter() - before) * 1e3)
        if self.name == "reference":
            (u, v) = (codes.float() * scale.float() + low.float() for codes, scale, low in coded)
            decoded = u @ v.T
        else:
            assert isinstance(self.codec, LowRankInt4)
            decoded = self.codec.decode(self.payload, x.shape, torch.float32)
            if self.name == "warm":
                self.session.commit()  # or the session begins each search as at its first frame
        self.base = (self.base.float() + decoded).to(x.dtype)
        self.error += float((x.double() - self.base.double()).square().sum())


def play(streams: Sequence[Sequence[Tensor]]) -> dict[str, Any]:
    """All encoders over all streams, step by step in turn."""
    samples: dict[str, list[float]] = {name: [] for name in NAMES}
    errors, energy = dict.fromkeys(NAMES, 0.0), 0.0
    for values in streams:
        encoders = [Encoder(name, values[0]) for name in NAMES]
        for last, x in pairwise(values):
            energy += float((x.double() - last.double()).square().sum())
            for encoder in encoders:
                encoder.step(x)
        for encoder in encoders:
            samples[encoder.name] += encoder.milliseconds[2:]
            errors[encoder.name] += encoder.error
    lines: dict[str, Any] = {
        name: {"ms": quartiles(samples[name]), "relative_error": (errors[name] / energy) ** 0.5} for name in NAMES
    }
    for line in lines.values():
        line["times_faster"] = lines["reference"]["ms"]["median"] / line["ms"]["median"]
    return lines


def trace_streams() -> list[list[Tensor]]:
    trace = Trace(TRACE)
    streams = []
    for site in trace.sites:
        x = trace.load(site).float()
        streams += [list(part.unbind(0)) for part in x.chunk(trace.groups(site, x.shape[1]), 1)]
    return streams


def show(title: str, lines: dict[str, Any]) -> None:
    print(f"{title}\n\n| encoder | median ms | quartiles | times faster | relative error |\n|---|---:|---:|---:|---:|")
    for name, line in lines.items():
        ms = line["ms"]
        print(
            f"| {name} | {ms['median']:.2f} | {ms['q1']:.2f} to {ms['q3']:.2f} | {line['times_faster']:.2f} "
            f"| {line['relative_error']:.4f} |"
        )
    print()


def main() -> None:
    made = parser(__doc__ or "")
    made.add_argument("--steps", type=int, default=24, help="steps of the synthetic stream (default 24)")
    made.add_argument("--threads", type=int, default=1, help="torch threads (default 1)")
    args = made.parse_args()
    check_load(args.max_load)
    torch.set_num_threads(args.threads)
    cell = play([[x.bfloat16() for x in synthetic(SHAPE, args.steps, 64, 0.1, 0.1)]])
    show(f"synthetic stream, bfloat16 {list(SHAPE)}, rank {RANK}, {args.steps} steps, {args.threads} thread(s)", cell)
    trace = play(trace_streams())
    show(f"{TRACE.name}, rank {RANK}", trace)
    finish(
        args.json,
        {"ranks": "none", "shape": SHAPE, "rank": RANK, "threads": args.threads, "synthetic": cell, "trace": trace},
    )


if __name__ == "__main__":
    main()
