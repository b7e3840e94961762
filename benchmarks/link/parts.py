"""What parts= gains: a steady all_gather of one large tensor, whole and in parts, on loopback and on a simulated link.

Two gloo ranks. On the simulated link a frame counts as arrived only when it would have been carried
(``simulated.py``). One group for each number of parts; their calls are made in turn, in another order each
round. Medians of the slower rank over the rounds, and each number of parts against whole tensors of the same round.

    python -m benchmarks.link.parts [--mb 16] [--gbit 0 10] [--codecs int8 transform] [--parts 1 2 4] [--json FILE]
"""

from __future__ import annotations

import itertools
import random
import statistics
import sys

import torch
import torch.distributed as dist

import compactdist
from benchmarks.common import WORLD_SIZE, check_load, finish, on_two_ranks, parser, quartiles
from benchmarks.link.simulated import slow_down
from benchmarks.link.turns import in_turns

CHANNELS, WARMUP = 3072, 3


def _body(rank: int, codec: str, mb: float, gbit: float, parts: list[int], rounds: int) -> list[list[float]]:
    """For each number of parts: milliseconds of each round on the slower rank."""
    groups = [compactdist.wrap(dist.group.WORLD, codec, parts=n, agree="off") for n in parts]
    if gbit:
        for group in groups:
            slow_down(group, gbit)
    rows = max(1, int(mb * 1e6 / 2 / CHANNELS))
    generator = torch.Generator().manual_seed(rank)
    base, change = (torch.randn(rows, CHANNELS, generator=generator) for _ in range(2))
    out, order = torch.empty(WORLD_SIZE * rows, CHANNELS, dtype=torch.bfloat16), random.Random(1)
    inputs = ((base + 0.1 * step * change).bfloat16() for step in range(rounds + WARMUP))
    return in_turns(groups, inputs, out, lambda _: order.sample(range(len(parts)), len(parts)), WARMUP)


def main() -> int:
    """Print the table."""
    cli = parser(__doc__)
    cli.add_argument("--mb", type=float, nargs="+", default=[16.0], help="of one rank's tensor, bfloat16")
    cli.add_argument("--gbit", type=float, nargs="+", default=[0.0, 10.0], help="0: loopback as it is")
    cli.add_argument("--codecs", nargs="+", default=["int8", "transform"])
    cli.add_argument("--parts", type=int, nargs="+", default=[1, 2, 4], help="the first is what the others are held to")
    cli.add_argument("--rounds", type=int, default=15)
    args = cli.parse_args()
    check_load(args.max_load)
    rows = []
    print(f"{'codec':10} {'MB':>5} {'Gbit/s':>8} {'parts':>5} {'ms':>8}  of the first (quartiles)")
    for codec, mb, gbit in itertools.product(args.codecs, args.mb, args.gbit):
        times = on_two_ranks(_body, codec, mb, gbit, args.parts, args.rounds)
        for n, of_n in zip(args.parts, times, strict=True):
            ratio = quartiles([a / b for a, b in zip(of_n, times[0], strict=True)])
            median = statistics.median(of_n)
            rows.append({"codec": codec, "mb": mb, "gbit": gbit, "parts": n, "ms": median, "ratio": ratio})
            spread = f"{ratio['median']:.2f} ({ratio['q1']:.2f} to {ratio['q3']:.2f})"
            print(f"{codec:10} {mb:5g} {f'{gbit:g}' if gbit else 'loopback':>8} {n:5} {median:8.1f}  {spread}")
    finish(args.json, {"rounds": args.rounds, "results": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
