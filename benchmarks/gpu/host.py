"""What a compressed all-gather costs the host where there is no transport: torch's fake group takes the link's place.

    python -m benchmarks.gpu.host --json benchmarks/results/gpu_host.json
    python -m benchmarks.gpu.host --device cpu --rows 64 --sites 2 --rounds 2
    python -m benchmarks.gpu.host --stub --json benchmarks/results/gpu_host_stub.json

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

With ``--stub`` no GPU is needed: tensors take a GPU's way, kernels are recorded instead of launched, and torch's
operations do nothing (``benchmarks/gpu/stub.py``). What is left is the host's own work without CUDA's: no launches, no
allocator. ``host us`` is then the least of all steps in CPU time of the process, which other work on the machine
changes little; ``launches`` are those recorded.
"""

from __future__ import annotations

import importlib
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
import torch.distributed as dist

import compactdist
from benchmarks.gpu import stub
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
STUB_ROUNDS = 200
METHODS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "passed through": {"codec": "raw", "policy": lambda call: "pass"},
    "raw": {"codec": "raw"},
    **{name: {"codec": name} for name in ("binary", "int2", "int4", "int8")},
    **{f"{name} block": {"codec": f"{name}:scales=block"} for name in ("binary", "int2", "int4", "int8")},
    **{f"int4, order {order}": {"codec": "int4", "order": order} for order in (2, "auto")},
    "int8 state": {"codec": "int4", "state": "int8"},
    **{f"int8 state, {order}": {"codec": "int4", "state": "int8", "order": order} for order in (2, "auto")},
    **{name: {"codec": name} for name in ("topk_int4", "lowrank_int4")},
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
        base, *changes = self._tensors(numel, device)
        self.inputs = [(base + 0.05 * (1 + t) * change).bfloat16() for t, change in enumerate(changes)]
        self.output = torch.empty(2 * numel, dtype=torch.bfloat16, device=device)
        self.sites, self.rounds, self.turn = sites, rounds, 0
        self.gather = _torch.public_function("all_gather_single")
        self.plain: Any = dist.group.WORLD

    @staticmethod
    def _tensors(numel: int, device: str) -> list[torch.Tensor]:
        if device == stub.DEVICE.type:
            return [torch.empty(numel, device=device) for _ in range(1 + VALUES)]
        generator = torch.Generator(device).manual_seed(0)
        return [torch.randn(numel, device=device, generator=generator) for _ in range(1 + VALUES)]

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

    def stub_line(self, name: str) -> dict[str, Any]:
        """What one method costs the host alone, on a device that is not there."""
        with ExitStack() as entered:
            device = entered.enter_context(stub.stub())
            group = entered.enter_context(
                device.wrap(self.plain, layouts=_matrix, min_numel=1, **(METHODS[name] or {}))
            )
            for _ in range(WARMUP):
                self.step(group)
            cpu, wall = [], []
            for _ in range(self.rounds):
                device.recorded.clear()
                began, used = time.perf_counter(), time.process_time()
                self.step(group)
                cpu.append(1e6 * (time.process_time() - used) / self.sites)
                wall.append(1e6 * (time.perf_counter() - began) / self.sites)
            launches = len(device.recorded) / self.sites
            calls = self._python_calls(lambda: self.step(group))
        median = {"host_us_median": statistics.median(cpu), "wall_us_median": statistics.median(wall)}
        return {"host_us": min(cpu), "wall_us": min(wall), **median, "launches": launches, "python_calls": calls}

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
    made.add_argument("--stub", action="store_true", help="record launches instead of running them; needs no GPU")
    made.add_argument("--rows", type=int, default=1088, help="of a tensor of 3072 channels (default 1088)")
    made.add_argument("--sites", type=int, default=20, help="calls of a step (default 20)")
    made.add_argument("--rounds", type=int, help=f"steps timed (default 15; {STUB_ROUNDS} with --stub)")
    made.add_argument("--only", nargs="+", choices=list(METHODS), metavar="METHOD")
    args = made.parse_args()
    device = stub.DEVICE.type if args.stub else args.device
    if device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device: nothing was measured (--device cpu measures without one, --stub the host's part)")
        sys.exit(EXIT_WITHOUT_GPU)
    only = args.only or [name for name, codec in METHODS.items() if not args.stub or _is_recorded(codec)]
    unknown = [name for name in only if args.stub and not _is_recorded(METHODS[name])]
    if unknown:
        sys.exit(f"--stub: no kernels to be recorded for {', '.join(unknown)}")
    warnings.simplefilter("ignore", FutureWarning)  # every torch deprecates some names that its users still have
    if device != "cuda":
        torch.set_num_threads(1)
    importlib.import_module("torch.testing._internal.distributed.fake_pg")  # registers the backend "fake"
    dist.init_process_group("fake", store=dist.HashStore(), rank=0, world_size=2)
    bench = Bench(device, args.rows, args.sites, args.rounds or (STUB_ROUNDS if args.stub else 15))
    load = os.getloadavg()[0]
    lines = lines_of(only, bench.stub_line if args.stub else bench.line)
    where = "launches recorded, CPU time" if args.stub else device
    print(f"all_gather_into_tensor of bfloat16 [{args.rows}, {CHANNELS}], fake group of 2, {where}; per call")
    print(shown(lines))
    dist.destroy_process_group()
    about = {"device": "stub" if args.stub else device, "rows": args.rows, "channels": CHANNELS, "sites": args.sites}
    settle(
        args.json,
        {
            **about,
            "rounds": bench.rounds,
            "load_average_before": round(load, 2),
            "machine_was_loaded": load > 0.5,
            "lines": lines,
        },
        lines,
    )


def _is_recorded(settings: dict[str, Any] | None) -> bool:
    return settings is not None and settings["codec"] != "raw"


if __name__ == "__main__":
    main()
