"""What a compressed all-gather costs the host where there is no transport: torch's fake group takes the link's place.

    python -m benchmarks.gpu.host --json benchmarks/results/gpu_host.json
    python -m benchmarks.gpu.host --device cpu --rows 64 --sites 2 --rounds 2

Rank 0 of 2 makes ``all_gather_into_tensor`` of a bfloat16 [rows, 3072] at each site of a step; the fake group hands it
a copy of its own frame as the other rank's. All in one process. Columns, each per call of a steady step, ``step()``
included:

    host us     until the calls have returned
    total us    until the device is done
    python      Python calls, "call" events of sys.setprofile
    launches    kernels launched; copies and fills of device memory; ``syncs``: stream and event synchronisations, all
                counted by torch.profiler
    waits       operations of torch that make the host wait (``torch.cuda.set_sync_debug_mode``), in the whole step

On a CPU the last five are not there.
"""

from __future__ import annotations

import importlib
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist

import compactdist
from benchmarks.gpu.common import (
    EXIT_WITHOUT_GPU,
    cell,
    host_waits,
    lines_of,
    parser,
    profiled,
    settle,
    synchronize,
    table,
)
from compactdist import Layout, _torch

CHANNELS = 3072
VALUES = 4
"""Tensors that take turns as a site's input."""
WARMUP = 3
METHODS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "passed through": {"codec": "raw", "policy": lambda call: "pass"},
    "raw": {"codec": "raw"},
    **{name: {"codec": name} for name in ("binary", "int2", "int4", "int8")},
    **{f"{name} block": {"codec": f"{name}:scales=block"} for name in ("binary", "int2", "int4", "int8")},
}


class Bench:
    """Rank 0, its tensors, and its plain group.

    Args:
        device: of the tensors.
        rows: of each tensor, which has 3072 channels.
        sites: calls of a step.
        rounds: steps that are timed.
    """

    def __init__(self, device: str, rows: int, sites: int, rounds: int) -> None:
        numel = rows * CHANNELS
        generator = torch.Generator(device).manual_seed(0)
        base, *changes = (torch.randn(numel, device=device, generator=generator) for _ in range(1 + VALUES))
        self.inputs = [(base + 0.05 * (1 + t) * change).bfloat16() for t, change in enumerate(changes)]
        self.output = torch.empty(2 * numel, dtype=torch.bfloat16, device=device)
        self.sites, self.rounds, self.turn = sites, rounds, 0
        self.gather = _torch.public_function("all_gather_single")
        self.plain: Any = dist.group.WORLD

    def step(self, group: Any) -> None:
        """A call at each site."""
        self.turn += 1
        if group is not self.plain:
            group.step()
        x = self.inputs[self.turn % VALUES]
        for _ in range(self.sites):
            self.gather(self.output, x, group=group)

    def line(self, name: str) -> dict[str, Any]:
        """What one method costs."""
        settings = METHODS[name]
        with self._group(settings) as group:
            line = self._measured(lambda: self.step(group))
            if settings is None:
                return line
            stats, steps = group.stats(), self.turn - self.begun
            counts = {"compressed_calls": stats.compressed_calls, "passed_through": stats.passed_through}
            expected = stats.passed_through if "policy" in settings else stats.compressed_calls
            if expected != steps * self.sites:
                return {**line, **counts, "error": f"of {steps * self.sites} calls: {counts}, {stats.passed_reasons}"}
            return {**line, **counts, "state_bytes": stats.state_bytes}

    def _group(self, settings: dict[str, Any] | None) -> AbstractContextManager[Any]:
        self.begun = self.turn
        if settings is None:
            return nullcontext(self.plain)
        made: AbstractContextManager[Any] = compactdist.wrap(self.plain, layouts=_matrix, min_numel=1, **settings)
        return made

    def _measured(self, step: Callable[[], None]) -> dict[str, Any]:
        for _ in range(WARMUP):
            step()
        synchronize()
        host, total = [], []
        for _ in range(self.rounds):
            began = time.perf_counter()
            step()
            returned = time.perf_counter()
            synchronize()
            host.append(1e6 * (returned - began) / self.sites)
            total.append(1e6 * (time.perf_counter() - began) / self.sites)
        found = {"host_us": statistics.median(host), "total_us": statistics.median(total)}
        counts = profiled(step)
        if counts is not None:
            found |= counts.per(self.sites)
        return {**found, "host_waits": host_waits(step), "python_calls": self._python_calls(step)}

    def _python_calls(self, step: Callable[[], None]) -> float:
        calls = 0

        def profile(frame: Any, event: str, _: Any) -> None:
            nonlocal calls
            calls += event == "call"

        sys.setprofile(profile)
        step()
        sys.setprofile(None)
        synchronize()
        return (calls - 2) / self.sites  # less the two calls into step of this class


def _matrix(info: Any) -> Layout:
    return Layout("(r c) -> 1 r c", r=info.numel // CHANNELS, c=CHANNELS)


def shown(lines: list[dict[str, Any]]) -> str:
    """The table."""
    columns = {
        "host us": ("host_us", 0),
        "total us": ("total_us", 0),
        "python": ("python_calls", 1),
        "launches": ("launches", 2),
        "copies": ("copies", 2),
        "fills": ("fills", 2),
        "syncs": ("waits", 2),
        "device us": ("kernel_us", 0),
        "waits": ("host_waits", 0),
    }
    rows = [[line["name"], *(cell(line.get(key), digits) for key, digits in columns.values())] for line in lines]
    return table(["", *columns], rows)


def main() -> None:
    made = parser(__doc__ or "")
    made.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    made.add_argument("--rows", type=int, default=1088, help="of a tensor of 3072 channels (default 1088)")
    made.add_argument("--sites", type=int, default=20, help="calls of a step (default 20)")
    made.add_argument("--rounds", type=int, default=15, help="steps timed (default 15)")
    made.add_argument("--only", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="METHOD")
    args = made.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device: nothing was measured (--device cpu measures without one)")
        sys.exit(EXIT_WITHOUT_GPU)
    warnings.simplefilter("ignore", FutureWarning)  # every torch deprecates some names that its users still have
    if args.device == "cpu":
        torch.set_num_threads(1)
    importlib.import_module("torch.testing._internal.distributed.fake_pg")  # registers the backend "fake"
    dist.init_process_group("fake", store=dist.HashStore(), rank=0, world_size=2)
    bench = Bench(args.device, args.rows, args.sites, args.rounds)
    lines = lines_of(args.only, bench.line)
    print(f"all_gather_into_tensor of bfloat16 [{args.rows}, {CHANNELS}], fake group of 2, {args.device}; per call")
    print(shown(lines))
    dist.destroy_process_group()
    about = {"device": args.device, "rows": args.rows, "channels": CHANNELS, "sites": args.sites, "rounds": args.rounds}
    settle(args.json, {**about, "lines": lines}, lines)


if __name__ == "__main__":
    main()
