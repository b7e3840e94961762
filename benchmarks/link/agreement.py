"""What agreeing on plans costs: the first step of a model with many call sites, with and without it, over loopback.

    python -m benchmarks.link.agreement --json benchmarks/results/agreement.json

Every round is a request whose 114 all-gathers (as many as FLUX has blocks, twice) are new to the group, so that each is
agreed on by itself; the two groups, ``agree="plans"`` and ``agree="off"``, take turns. A later request whose sites are
known agrees once; it is timed as well. Medians of the slowest rank's seconds. All ranks share this machine's cores.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
import torch.distributed as dist

import compactdist
from benchmarks.common import check_load, finish, on_ranks, parser

SITES = 114
CASES = ((2, 1088), (8, 68))
"""Ranks, and rows of 3072 bfloat16 in each tensor: 8 ranks with larger tensors would not fit the memory."""


def _step(group: Any, name: str, x: torch.Tensor, out: torch.Tensor) -> float:
    """Seconds of a keyframe step, as the slowest rank sees it."""
    group.reset()
    dist.barrier()
    start = time.perf_counter()
    group.step()
    with group.key(name):
        for _ in range(SITES):
            group.all_gather_into_tensor(out, x)
    taken = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
    dist.all_reduce(taken, op=dist.ReduceOp.MAX)
    return float(taken)


def body(rank: int, rounds: int, rows: int) -> dict[str, Any]:
    """Seconds by mode and kind of request."""
    x = torch.randn(rows * 3072).bfloat16()
    out = torch.empty(dist.get_world_size() * x.numel(), dtype=x.dtype)
    groups = {mode: compactdist.wrap(codec="int4", agree=mode) for mode in ("plans", "off")}
    taken: dict[str, list[float]] = {f"{mode} {kind}": [] for mode in groups for kind in ("new", "known")}
    for number in range(rounds + 1):
        for mode, group in groups.items():
            for kind in ("new", "known"):
                seconds = _step(group, f"request {number}", x, out)
                if number:
                    taken[f"{mode} {kind}"].append(seconds)
    for group in groups.values():
        group.close()
    return {name: statistics.median(values) for name, values in taken.items()}


def line(ranks: int, rows: int, rounds: int) -> dict[str, Any]:
    """One number of ranks."""
    seconds = on_ranks(ranks, body, rounds, rows)
    new, known, off = seconds["plans new"], seconds["plans known"], seconds["off new"]
    each = 1e6 * (new - off) / SITES
    return {
        "ranks": ranks,
        "tensor": [rows, 3072],
        "seconds": seconds,
        "share_new": new / off - 1,
        "share_known": known / seconds["off known"] - 1,
        "us_each": each,
    }


def main() -> None:
    """Print the lines, and write them where ``--json`` says."""
    made = parser(__doc__ or "")
    made.add_argument("--rounds", type=int, default=5, help="requests of each kind (default 5)")
    args = made.parse_args()
    check_load(args.max_load)
    lines = [line(ranks, rows, args.rounds) for ranks, rows in CASES]
    for one in lines:
        print(
            f"{one['ranks']} ranks, {SITES} sites of {one['tensor']} bfloat16: a keyframe step takes "
            f"{one['seconds']['off new']:.2f} s without agreements; {100 * one['share_new']:+.1f} % with one for each "
            f"site ({one['us_each']:.0f} us each), {100 * one['share_known']:+.1f} % where the sites are known"
        )
    finish(args.json, {"ranks": [ranks for ranks, _ in CASES], "sites": SITES, "rounds": args.rounds, "lines": lines})


if __name__ == "__main__":
    main()
