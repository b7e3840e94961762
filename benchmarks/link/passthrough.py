"""What a call costs that a wrapped group only passes on: a 1-element all_reduce, wrapped against plain.

Two gloo ranks, each pinned to a core. Blocks of calls on the inner group and on the wrapped one alternate, so that both
meet the same machine; a block's number is its median call, the result the median over pairs of neighbouring blocks.
The second line of the table compares the inner group with itself: the noise of the method.

    python -m benchmarks.link.passthrough [--json FILE]
"""

from __future__ import annotations

import statistics
import sys
import time
from typing import Any

import torch
import torch.distributed as dist

import compactdist
from benchmarks.common import check_load, finish, on_two_ranks, parser, quartiles

GOAL = 1.15


def _block(group: Any, x: torch.Tensor, calls: int) -> float:
    """Median call in microseconds."""
    times = []
    for _ in range(calls):
        began = time.perf_counter_ns()
        dist.all_reduce(x, group=group)
        times.append(time.perf_counter_ns() - began)
    return statistics.median(times) / 1000


def _pairs(first: Any, second: Any, blocks: int, calls: int) -> dict[str, Any]:
    x = torch.zeros(1)
    both: tuple[list[float], list[float]] = ([], [])
    for block in range(blocks + 2):
        order = (0, 1) if block % 2 else (1, 0)
        us = {which: _block((first, second)[which], x, calls) for which in order}
        if block >= 2:  # the first ones warm up
            both[0].append(us[0])
            both[1].append(us[1])
    return {
        "plain_us": quartiles(both[0]),
        "wrapped_us": quartiles(both[1]),
        "ratio": quartiles([b / a for a, b in zip(*both, strict=True)]),
    }


def _body(rank: int, blocks: int, calls: int) -> dict[str, Any]:
    inner = dist.group.WORLD
    wrapped = compactdist.wrap(inner, codec="int2")
    wrapped.step()
    result = {
        "all_reduce": _pairs(inner, wrapped, blocks, calls),
        "plain against plain": _pairs(inner, inner, blocks, calls),
    }
    passed = wrapped.stats()
    assert passed.compressed_calls == 0
    assert passed.passed_through == (blocks + 2) * calls
    wrapped.close()
    return result


def main() -> int:
    cli = parser(__doc__)
    cli.add_argument("--blocks", type=int, default=40, help="pairs of blocks (default 40)")
    cli.add_argument("--calls", type=int, default=200, help="calls in a block (default 200)")
    args = cli.parse_args()
    check_load(args.max_load)
    rows = on_two_ranks(_body, args.blocks, args.calls)
    print(
        f"1-element all_reduce, 2 gloo ranks, {args.blocks} pairs of blocks of {args.calls} calls; median (quartiles)"
    )
    print(f"{'':20} {'plain us':>24} {'wrapped us':>24} {'ratio':>24}")
    for name, row in rows.items():
        cells = []
        for key, digits in (("plain_us", 1), ("wrapped_us", 1), ("ratio", 3)):
            v = row[key]
            cells.append(f"{v['median']:.{digits}f} ({v['q1']:.{digits}f} - {v['q3']:.{digits}f})")
        print(f"{name:20} " + " ".join(f"{cell:>24}" for cell in cells))
    ratio = rows["all_reduce"]["ratio"]["median"]
    met = ratio <= GOAL
    print(f"ratio {ratio:.3f}, goal <= {GOAL}: {'met' if met else 'MISSED'}")
    finish(args.json, {"blocks": args.blocks, "calls": args.calls, "goal_ratio": GOAL, "results": rows})
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
