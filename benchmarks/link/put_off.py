"""What it gains to learn while a message is under way: a steady all_gather of the transform codec on simulated links.

Both ends of a stream learn a basis from every frame. A group does that work for its ends while the next message is
under way (``compactdist/state/unprepared.py``); here a second group does it at once, before its call returns. Two gloo
ranks on one thread each, on links that are simulated (``simulated.py``). The groups take turns, each first in every
other round. Medians of the slower rank over the rounds, and the first group against the second one of the same round.

    python -m benchmarks.link.put_off [--gbit 0 1 0.1] [--rows 1088 4096] [--json FILE]
"""

from __future__ import annotations

import itertools
import statistics
import sys
from typing import Any

import torch
import torch.distributed as dist

import compactdist
from benchmarks.codecs.changing import tensors
from benchmarks.common import WORLD_SIZE, check_load, finish, on_two_ranks, parser, quartiles
from benchmarks.link.simulated import slow_down
from benchmarks.link.turns import in_turns
from compactdist import Layout
from compactdist.codecs.base import Session
from compactdist.state.unprepared import Unprepared

CHANNELS, WARMUP = 3072, 3


class _AtOnce(Unprepared):
    """Puts nothing off."""

    __slots__ = ()

    def add(self, session: Session) -> None:
        session.prepare()


def _body(rank: int, bits: float, gbit: float, rows: int, rounds: int) -> list[list[float]]:
    """Milliseconds of each round on the slower rank: put off, and at once."""
    torch.set_num_threads(1)
    codec = f"transform:bits={bits:g}"
    layouts = {"*": Layout("(r c) -> 1 r c", c=CHANNELS)}
    groups = [compactdist.wrap(dist.group.WORLD, codec, layouts=layouts, agree="off") for _ in range(2)]
    groups[1]._engine.store.unprepared = _AtOnce()
    if gbit:
        for group in groups:
            slow_down(group, gbit)
    out = torch.empty(WORLD_SIZE * rows * CHANNELS, dtype=torch.bfloat16)
    inputs = tensors(rows, CHANNELS, rounds + WARMUP)
    return in_turns(groups, inputs, out, lambda step: (0, 1) if step % 2 else (1, 0), WARMUP)


def main() -> int:
    """Print the table."""
    cli = parser(__doc__)
    cli.add_argument("--rows", type=int, nargs="+", default=[1088, 4096], help=f"of {CHANNELS} bfloat16")
    cli.add_argument("--gbit", type=float, nargs="+", default=[0.0, 1.0, 0.1], help="0: loopback as it is")
    cli.add_argument("--bits", type=float, default=1.0, help="an element")
    cli.add_argument("--rounds", type=int, default=20)
    args = cli.parse_args()
    check_load(args.max_load)
    results: list[dict[str, Any]] = []
    print(f"{'rows':>5} {'Gbit/s':>8} {'put off':>8} {'at once':>8}  ms; ratio (quartiles)")
    for rows, gbit in itertools.product(args.rows, args.gbit):
        put_off, at_once = on_two_ranks(_body, args.bits, gbit, rows, args.rounds)
        ratio = quartiles([a / b for a, b in zip(put_off, at_once, strict=True)])
        medians = statistics.median(put_off), statistics.median(at_once)
        results.append({"rows": rows, "gbit": gbit, "put_off_ms": medians[0], "at_once_ms": medians[1], "ratio": ratio})
        spread = f"{ratio['median']:.2f} ({ratio['q1']:.2f} to {ratio['q3']:.2f})"
        print(f"{rows:5} {f'{gbit:g}' if gbit else 'loopback':>8} {medians[0]:8.1f} {medians[1]:8.1f}  {spread}")
    finish(args.json, {"bits": args.bits, "rounds": args.rounds, "results": results})
    return 0


if __name__ == "__main__":
    sys.exit(main())
