"""all_gather_into_tensor of 16 MB fp32 per rank over loopback: plain gloo against every codec.

Two gloo ranks, each pinned to a core. In every round each group makes one call, in rotating order, so that all meet the
same machine. The tensors change a little from call to call, as activations do from one denoising step to the next.
Loopback moves gigabytes per second, so here a codec can only lose: the table says what coding costs, the wire bytes say
from which link speed on it pays.

    python -m benchmarks.link.all_gather [--json FILE]
"""

from __future__ import annotations

import math
import sys
import time
from typing import Any

import torch
import torch.distributed as dist

import compactdist
from benchmarks.common import WORLD_SIZE, check_load, finish, on_two_ranks, parser, quartiles

CODECS = ("raw", "int8", "int4", "int2", "binary")
CHANGE = 0.1  # standard deviation of a step's change, in that of the tensor


def _tensors(rank: int, numel: int, steps: int) -> list[torch.Tensor]:
    """What a rank sends at each step; the same on every rank that asks."""
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(numel, generator=generator)
    sent = [x]
    for _ in range(steps - 1):
        x = x + CHANGE * torch.randn(numel, generator=generator)
        sent.append(x)
    return sent


def _nmse_db(received: torch.Tensor, true: torch.Tensor) -> float:
    error = float(((received - true) ** 2).sum() / (true**2).sum())
    return 10 * math.log10(error) if error else -math.inf


def _body(rank: int, numel: int, rounds: int, warmup: int) -> dict[str, Any]:
    inner = dist.group.WORLD
    groups: dict[str, Any] = {"plain": inner}
    for codec in CODECS:
        groups[codec] = compactdist.wrap(inner, codec=codec)
    distinct = 4  # walk there and back again, so that memory does not grow with the rounds
    mine, peers = _tensors(rank, numel, distinct), _tensors(1 - rank, numel, distinct)
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in torch 2.13
    walk = [*range(distinct), *range(distinct - 2, 0, -1)]
    out = torch.empty(WORLD_SIZE * numel)
    ms: dict[str, list[float]] = {name: [] for name in groups}
    wire: dict[str, float] = {}
    nmse: dict[str, float] = {}
    for turn in range(warmup + rounds):
        now = walk[turn % len(walk)]
        names = list(groups)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            group = groups[name]
            if name != "plain":
                group.step()
                if turn == warmup:
                    group.reset_stats()
            dist.barrier(inner)
            began = time.perf_counter()
            all_gather(out, mine[now], group=group)
            if turn >= warmup:
                ms[name].append((time.perf_counter() - began) * 1000)
            nmse[name] = _nmse_db(out.view(WORLD_SIZE, numel)[1 - rank], peers[now])
    for name, group in groups.items():
        wire[name] = 4.0 * numel if name == "plain" else group.stats().wire_bytes / rounds
        if name != "plain":
            assert group.stats().compressed_calls == rounds, group.explain()
            group.close()
    plain = quartiles(ms["plain"])["median"]
    rows = {}
    for name in groups:
        spread = quartiles(ms[name])
        # the link speed at which sending raw bytes costs what coding costs: extra time = saved bytes / speed
        saved, extra = 4 * numel - wire[name], spread["median"] - plain
        rows[name] = {
            "ms": spread,
            "wire_bytes": wire[name],
            "wire_ratio": 4 * numel / wire[name],
            "time_ratio": spread["median"] / plain,
            "nmse_db": nmse[name] if math.isfinite(nmse[name]) else None,
            "pays_below_gbit_s": 8 * saved / (extra * 1e6) if saved > 0 and extra > 0 else None,
        }
    return rows


def main() -> int:
    cli = parser(__doc__)
    cli.add_argument("--megabytes", type=float, default=16, help="fp32 bytes of one rank, in MB of 10^6 (default 16)")
    cli.add_argument("--rounds", type=int, default=12, help="timed calls of each group (default 12)")
    cli.add_argument("--warmup", type=int, default=3, help="calls before, keyframes included (default 3)")
    args = cli.parse_args()
    check_load(args.max_load)
    numel = int(args.megabytes * 1e6) // 4
    rows = on_two_ranks(_body, numel, args.rounds, args.warmup)
    print(f"all_gather_into_tensor, {4 * numel / 1e6:g} MB fp32 per rank, 2 gloo ranks, loopback, {args.rounds} rounds")
    head = ("x plain", 8), ("wire bytes", 12), ("ratio", 7), ("NMSE dB", 8), ("pays below", 14)
    print(f"{'group':8} {'ms per call':>26} " + " ".join(f"{name:>{width}}" for name, width in head))
    for name, row in rows.items():
        v = row["ms"]
        spread = f"{v['median']:.1f} ({v['q1']:.1f} - {v['q3']:.1f})"
        exact = "exact" if row["nmse_db"] is None else f"{row['nmse_db']:.1f}"
        speed = row["pays_below_gbit_s"]
        pays = "-" if speed is None else f"{speed:.2f} Gbit/s"
        print(
            f"{name:8} {spread:>26} {row['time_ratio']:8.2f} {row['wire_bytes']:12.0f} {row['wire_ratio']:7.2f} "
            f"{exact:>8} {pays:>14}"
        )
    slower = [name for name, row in rows.items() if row["time_ratio"] > 1 and name != "plain"]
    print(f"slower than plain on loopback: {', '.join(slower) or 'none'}")
    finish(args.json, {"numel": numel, "rounds": args.rounds, "change": CHANGE, "results": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
