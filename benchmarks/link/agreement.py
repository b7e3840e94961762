"""What agreeing on plans costs: the first step of a model with many call sites, with and without it, over loopback.

    python -m benchmarks.link.agreement --json benchmarks/results/agreement.json

A step of 114 all-gathers (as many as FLUX has blocks, twice) is the first of a request. Three kinds of it take turns in
one process, round by round, each round in another order:

    new      all sites are new to the group (``agree="plans"``), so that each is agreed on by itself
    known    an earlier request had the same sites: one agreement covers all
    off      the same step of a group with ``agree="off"``

An agreement takes a fraction of a millisecond, fresh pages of memory take more. So freed memory stays with the process
here (glibc's ``mallopt``), histories of other steps are dropped before one begins, and the first rounds, which touch
the memory, are not counted. A step takes as long as its slowest rank; what a kind costs is its time less that of
``off`` in the same round, over the median of ``off``. Medians and quartiles over rounds. On a busy machine steps vary
by more than that, so the *delay* of each agreement is taken as well: from when the last rank has come to it until the
last one goes on (ranks share a clock). Its share is that of a step's agreements, at their median.

The demo (``--demo``, with xDiT): whole requests of one step, the digits model drawn by Ulysses on two ranks, with
``agree="plans"`` and ``"off"`` in turn. There each request wraps the group anew, so all sites are new.

All ranks share this machine's cores.
"""

from __future__ import annotations

import ctypes
import os
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import permutations
from typing import Any

import torch
import torch.distributed as dist

import compactdist
from benchmarks.common import check_load, finish, on_ranks, parser, quartiles

SITES = 114
CASES = ((2, 1088), (8, 68))
"""Ranks, and rows of 3072 bfloat16 in each tensor: 8 ranks with larger tensors would not fit the memory."""

KINDS = ("new", "known", "off")
WARMING = 3
"""Rounds that are not counted."""

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""glibc's numbers of what ``mallopt`` sets."""


def keep_freed_memory() -> None:
    """Let memory that is freed stay with the process, so that it need not be faulted in again."""
    libc = ctypes.CDLL(None)
    for what in (_TRIM_THRESHOLD, _MMAP_THRESHOLD):
        if not libc.mallopt(what, 1 << 30):
            raise SystemExit(f"mallopt({what}) was refused: without it page faults drown what is to be measured")


def slowest(seconds: float) -> float:
    """The largest of all ranks' numbers."""
    taken = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(taken, op=dist.ReduceOp.MAX)
    return float(taken)


def in_turn(steps: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """What each step returns in each round that counts; every order of the steps comes up as often as any other."""
    orders = list(permutations(steps))
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(-WARMING, rounds):
        for name in orders[number % len(orders)]:
            seconds = steps[name]()
            if number >= 0:
                taken[name].append(seconds)
    return taken


class Sites:
    """The groups of one rank, and the tensors that they gather."""

    def __init__(self, rows: int) -> None:
        self._x = torch.randn(rows * 3072).bfloat16()
        self._out = torch.empty(dist.get_world_size() * self._x.numel(), dtype=self._x.dtype)
        self.groups = {mode: compactdist.wrap(codec="int4", agree=mode) for mode in ("plans", "off")}
        self._requests = 0
        self.delays: list[tuple[float, float]] = []
        agreement: Any = self.groups["plans"]._agreement
        agree = agreement.agree

        def timed(*args: Any) -> None:
            came = time.perf_counter()
            agree(*args)
            self.delays.append((came, time.perf_counter()))

        agreement.agree = timed

    def step(self, kind: str) -> float:
        """Seconds of a keyframe step."""
        self._requests += kind == "new"
        for group in self.groups.values():
            group.reset()
        group = self.groups["off" if kind == "off" else "plans"]
        dist.barrier()
        start = time.perf_counter()
        group.step()
        with group.key(f"request {self._requests}"):
            for _ in range(SITES):
                group.all_gather_into_tensor(self._out, self._x)
        return slowest(time.perf_counter() - start)

    def delays_of_all(self) -> list[float]:
        """Seconds from when the last rank came to an agreement until the last one went on, of all agreements."""
        own = torch.tensor(self.delays, dtype=torch.float64)
        ranks = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(ranks, own)
        came, went = torch.stack(ranks).amax(0).T
        delays: list[float] = (went - came).tolist()
        return delays


def body(rank: int, rounds: int, rows: int) -> dict[str, list[float]]:
    """Seconds of the rounds' steps, by kind, and of agreements (``"delay"``)."""
    keep_freed_memory()
    sites = Sites(rows)
    sites.step("new")  # for the first "known"
    taken = in_turn({kind: partial(sites.step, kind) for kind in KINDS}, rounds)
    taken["delay"] = sites.delays_of_all()[(WARMING + 1) * SITES :]
    for group in sites.groups.values():
        group.close()
    return taken


def demo(rank: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of requests of one step, by mode."""
    ranks = dist.get_world_size()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOG_LEVEL": "error"}
    from compactdist_harness.cpu import xdit as xdit_on_cpu

    xdit_on_cpu.install()
    from xfuser.core.distributed import init_distributed_environment

    init_distributed_environment(ranks, rank, local_rank=rank)
    from compactdist_harness.demo_worker import METHODS
    from compactdist_harness.xdit import parallel_digits
    from compactdist_xdit import enable

    keep_freed_memory()
    pipe, call_kwargs = parallel_digits("ulysses", 1)

    def request(mode: str) -> float:
        with enable(pipe, **METHODS["int4"], agree=mode) as handle:
            dist.barrier()
            start = time.perf_counter()
            pipe(**call_kwargs)
            seconds = slowest(time.perf_counter() - start)
            if not any(stats.compressed_calls for stats in handle.stats().values()):
                raise SystemExit(f"nothing was compressed:\n{handle.explain()}")
        return seconds

    return in_turn({"new": partial(request, "plans"), "off": partial(request, "off")}, rounds)


def summary(taken: dict[str, list[float]]) -> dict[str, Any]:
    """Medians and quartiles of seconds, and of what each kind costs, as a share of ``off``."""
    off, delays = taken["off"], taken.pop("delay", None)
    median = statistics.median(off)
    delay = None if delays is None else quartiles(delays)
    direct = {} if delay is None else {"delay": delay, "share_of_delays": SITES * delay["median"] / median}
    return direct | {
        "seconds": {kind: quartiles(values) for kind, values in taken.items()},
        "share": {
            kind: quartiles([(one - without) / median for one, without in zip(values, off, strict=True)])
            for kind, values in taken.items()
            if kind != "off"
        },
    }


def told(what: str, line: dict[str, Any]) -> str:
    """A line for the terminal."""
    off = line["seconds"]["off"]["median"]
    costs = []
    for kind, share in line["share"].items():
        spread = f"{100 * share['q1']:+.1f} to {100 * share['q3']:+.1f}"
        costs.append(f"{kind}: {100 * share['median']:+.1f} % ({spread})")
    if "delay" in line:
        costs.append(f"{1e6 * line['delay']['median']:.0f} us an agreement, {100 * line['share_of_delays']:.1f} %")
    return f"{what}: a keyframe step takes {1e3 * off:.1f} ms without agreements; {'; '.join(costs)}"


def run(args: Any) -> list[dict[str, Any]]:
    """All lines, printed as they come."""
    lines: list[dict[str, Any]] = []
    cases: Sequence[tuple[int, int]] = CASES
    for ranks, rows in cases:
        line = summary(on_ranks(ranks, body, args.rounds, rows))
        lines.append({"ranks": ranks, "tensor": [rows, 3072], "sites": SITES, **line})
        print(told(f"{ranks} ranks, {SITES} sites of {[rows, 3072]} bfloat16", line), flush=True)
    if args.demo:
        line = summary(on_ranks(2, demo, 2 * args.rounds))
        lines.append({"ranks": 2, "demo": "ulysses, one step", **line})
        print(told("demo, Ulysses on 2 ranks", line), flush=True)
    return lines


def main() -> None:
    """Print the lines, and write them where ``--json`` says."""
    made = parser(__doc__ or "")
    made.add_argument("--rounds", type=int, default=12, help="rounds that count (default 12)")
    made.add_argument("--demo", action="store_true", help="the demo's keyframe step as well")
    args = made.parse_args()
    check_load(args.max_load)
    lines = run(args)
    finish(args.json, {"ranks": [ranks for ranks, _ in CASES], "rounds": args.rounds, "lines": lines})


if __name__ == "__main__":
    main()
