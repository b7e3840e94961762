"""What a steady all_gather_into_tensor costs the host, without any transport, and how much of it is not codec.

torch's fake backend takes the place of the link: it hands every rank a copy of this rank's frame at once. World size 2,
ten sites of 262,144 float32 each, codec int4, CPU, one thread, one core. A second process is there for what ranks
agree on through the store; it makes the same first calls and then sleeps. Reported per call:

    Python calls   "call" events of sys.setprofile over one step of ten sites, step() included, divided by ten
    files          distinct source files of compactdist that such a step enters
    call           time of a step of ten calls, divided by ten
    kernels        encode (with its reconstruction) and decode of the same tensors, without a group
    plain          the same call on the fake group itself
    remainder      call - kernels - plain: what wrapping costs

Times are medians over steps, in wall-clock and in CPU time of the process, which hardly feels other work.
With ``--old PATH`` another checkout of compactdist is measured in turn with this one, round by round, on the same core.

    python -m benchmarks.link.host_cost [--old PATH] [--json FILE]
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / "benchmarks" / "results" / "host_cost.json"
SITES = 10
NUMEL = 262_144
CODEC = "int4"
WARMUP = 8
TIMES = ("call", "kernels", "plain", "remainder")


# --- one checkout, in processes of its own; imports nothing of benchmarks, which may be another checkout's


class Bench:
    """Rank 0 of the fake group, or its peer, under the compactdist that is found first."""

    def __init__(self, rank: int, port: int) -> None:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        importlib.import_module("torch.testing._internal.distributed.fake_pg")  # registers the backend "fake"
        store = dist.TCPStore("127.0.0.1", port, 2, rank == 0, wait_for_workers=False)
        self.port = store.port
        self.store = store
        base = [torch.randn(NUMEL) for _ in range(SITES)]
        self.inputs = [[x + 0.1 * torch.randn(NUMEL) for x in base] for _ in range(3)]
        self.outputs = [torch.empty(2 * NUMEL) for _ in range(SITES)]
        self.turn = 0

    def start(self, rank: int) -> None:
        """Join, wrap, and make the calls that are not steady yet: keyframes, plans, compilation."""
        import compactdist

        dist.init_process_group("fake", store=self.store, rank=rank, world_size=2)
        self.plain_group: Any = dist.group.WORLD
        self.group: Any = compactdist.wrap(self.plain_group, codec=CODEC)
        self.home = os.path.dirname(compactdist.__file__)
        for _ in range(WARMUP):
            self.step()

    def step(self) -> None:
        self.turn += 1
        group = self.group
        group.step()
        for x, out in zip(self.inputs[self.turn % 3], self.outputs, strict=True):
            group.all_gather_into_tensor(out, x)

    def plain(self) -> None:
        gather = self.plain_group.all_gather_single if hasattr(self.plain_group, "all_gather_single") else None
        for x, out in zip(self.inputs[self.turn % 3], self.outputs, strict=True):
            if gather is not None:
                gather(out, x).wait()
            else:
                self.plain_group._allgather_base(out, x).wait()

    def measure(self, steps: int) -> dict[str, dict[str, float]]:
        """Medians in microseconds per call, by wall-clock and by CPU time."""
        before = self.group.stats().compressed_calls
        wall = {"call": self.timed(self.step, steps)}
        if self.group.stats().compressed_calls - before != steps * SITES:
            raise SystemExit(f"not every call was compressed:\n{self.group.explain()}")
        wall["kernels"] = self.timed(self.kernels(), steps)
        wall["plain"] = self.timed(self.plain, steps)
        return {clock: {name: pair[i] for name, pair in wall.items()} for i, clock in enumerate(("wall_us", "cpu_us"))}

    def timed(self, run: Callable[[], None], steps: int) -> tuple[float, float]:
        wall, cpu = [], []
        for _ in range(steps):
            began, used = time.perf_counter_ns(), time.process_time_ns()
            run()
            cpu.append(time.process_time_ns() - used)
            wall.append(time.perf_counter_ns() - began)
        return statistics.median(wall) / 1000 / SITES, statistics.median(cpu) / 1000 / SITES

    def kernels(self) -> Callable[[], None]:
        """A step of the codec alone: each site's encode with its reconstruction, and one decode."""
        from compactdist import codecs

        codec: Any = codecs.get(CODEC)
        view = _blocks()
        device = torch.device("cpu")
        payload = torch.empty(codec.payload_nbytes(view.shape, torch.float32), dtype=torch.uint8)
        bases = [x.clone() for x in self.inputs[0]]
        outs = [torch.empty(NUMEL) for _ in range(SITES)]
        turn = 0
        if hasattr(codec, "open"):
            ends = [(codec.open(view, torch.float32, device), codec.open(view, torch.float32, device)) for _ in bases]

            def step() -> None:
                nonlocal turn
                turn += 1
                for (sender, receiver), x, base, out in zip(ends, self.inputs[turn % 3], bases, outs, strict=True):
                    sender.encode(x, (base,), out, payload)
                    sender.commit()
                    receiver.decode(payload, (base,), base)
        else:

            def step() -> None:
                nonlocal turn
                turn += 1
                for x, base, out in zip(self.inputs[turn % 3], bases, outs, strict=True):
                    codec.encode_residual(x, base, view, out, payload_out=payload)
                    codec.decode_residual(payload, base, view, base)

        step()
        return step

    def count(self) -> dict[str, float]:
        """Python calls per call, and files of compactdist entered."""
        calls = 0
        files = set()

        def profile(frame: Any, event: str, _: Any) -> None:
            nonlocal calls
            if event == "call":
                calls += 1
                files.add(frame.f_code.co_filename)

        sys.setprofile(profile)
        self.step()
        sys.setprofile(None)
        entered = sum(name.startswith(self.home + os.sep) for name in files)
        return {"python_calls": (calls - 1) / SITES, "files": entered}  # less the call of step of this class


def _blocks() -> Any:
    """The matrix view of a site without a hint: rows of 128, by whatever name the checkout has for it."""
    for module, name in (("compactdist.state.matrix_view", "blocks"), ("compactdist.state.layout", "blocks")):
        try:
            return getattr(importlib.import_module(module), name)(NUMEL)
        except (ImportError, AttributeError):
            continue
    raise SystemExit("this checkout has no compactdist.state.matrix_view.blocks or compactdist.state.layout.blocks")


def _peer(port: int) -> None:
    """Rank 1: agrees, makes the first calls, and waits until rank 0 is gone."""
    bench = Bench(1, port)
    bench.start(1)
    print("ready", flush=True)
    sys.stdin.read()
    os._exit(0)


def _worker() -> None:
    """Rank 0: answers ``steps`` on stdin with one JSON line of times, ``count`` with counts."""
    bench = Bench(0, 0)
    command = [sys.executable, __file__, "--peer", str(bench.port)]
    peer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    bench.start(0)
    assert peer.stdout is not None
    if peer.stdout.readline().strip() != "ready":
        raise SystemExit("the peer did not get through the first calls")
    print(json.dumps({"home": bench.home}), flush=True)
    for line in sys.stdin:
        answer = bench.count() if line.strip() == "count" else bench.measure(int(line))
        print(json.dumps(answer), flush=True)
    peer.kill()
    peer.wait()
    os._exit(0)


# --- the parent: checkouts take turns


class Checkout:
    """A worker under one checkout of compactdist, pinned to a core."""

    def __init__(self, name: str, root: Path, core: int) -> None:
        self.name = name
        env = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=env,
            text=True,
            preexec_fn=lambda: os.sched_setaffinity(0, {core}),
        )
        home = Path(self._answer()["home"])
        if home != root / "compactdist":
            raise SystemExit(f"asked for the compactdist under {root}, got {home}")

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"the worker of {self.name!r} ended with status {self._process.wait()}")
        return json.loads(line)

    def ask(self, what: object) -> Any:
        assert self._process.stdin is not None
        print(what, file=self._process.stdin, flush=True)
        return self._answer()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)


def summary(rounds: Sequence[dict[str, dict[str, float]]], counts: dict[str, float]) -> dict[str, Any]:
    """Medians over rounds of what a worker measured; the remainder is taken round by round."""
    result: dict[str, Any] = dict(counts)
    for clock in ("wall_us", "cpu_us"):
        taken: dict[str, list[float]] = {name: [r[clock][name] for r in rounds] for name in TIMES[:-1]}
        taken["remainder"] = [
            c - k - p for c, k, p in zip(taken["call"], taken["kernels"], taken["plain"], strict=True)
        ]
        result[clock] = {name: statistics.median(values) for name, values in taken.items()}
        result[clock]["call_quartiles"] = statistics.quantiles(taken["call"], n=4, method="inclusive")[::2]
    return result


def ratios(old: dict[str, Any], new: dict[str, Any]) -> dict[str, float]:
    """How many times less this checkout needs than the old one."""
    found = {name: old[name] / new[name] for name in ("python_calls", "files")}
    for clock in ("wall_us", "cpu_us"):
        found |= {f"{name}_{clock}": old[clock][name] / new[clock][name] for name in TIMES if new[clock][name] > 0}
    return found


def show(results: dict[str, dict[str, Any]]) -> None:
    print(
        f"all_gather_into_tensor of {NUMEL} float32, {CODEC}, fake group of 2, one core; us per call, wall-clock (CPU)"
    )
    print(f"{'':6} {'Python calls':>12} {'files':>6} " + " ".join(f"{name:>16}" for name in TIMES))
    for name, result in results.items():
        cells = [f"{result['wall_us'][t]:.0f} ({result['cpu_us'][t]:.0f})" for t in TIMES]
        print(f"{name:6} {result['python_calls']:12.1f} {result['files']:6} " + " ".join(f"{c:>16}" for c in cells))


def main() -> int:
    from benchmarks.common import add_json, write_json  # not on top: workers run this file over another checkout

    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument(
        "--old", type=Path, metavar="PATH", help="root of another checkout, measured in turn with this one"
    )
    add_json(cli, RESULT)
    cli.add_argument("--rounds", type=int, default=9, help="turns of each checkout (default 9)")
    cli.add_argument("--steps", type=int, default=20, help="steps of ten calls in a round (default 20)")
    args = cli.parse_args()
    load = os.getloadavg()[0]
    core = max(os.sched_getaffinity(0))
    roots = {"this": ROOT} | ({"old": args.old.resolve()} if args.old else {})
    checkouts = [Checkout(name, root, core) for name, root in roots.items()]
    counts = {c.name: c.ask("count") for c in checkouts}
    rounds: dict[str, list[Any]] = {c.name: [] for c in checkouts}
    for turn in range(args.rounds + 1):
        for checkout in checkouts[:: 1 if turn % 2 else -1]:
            answer = checkout.ask(args.steps)
            if turn:  # the first round warms up
                rounds[checkout.name].append(answer)
    for checkout in checkouts:
        checkout.close()
    results = {name: summary(rounds[name], counts[name]) for name in roots}
    show(results)
    stored: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "benchmarks.link.host_cost", *(["--old", "PATH"] if args.old else [])]),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, one used",
        "load_average_before": round(load, 2),
        "numel": NUMEL,
        "sites": SITES,
        "codec": CODEC,
        "rounds": args.rounds,
        "steps": args.steps,
        "results": results,
    }
    if args.old:
        stored["old_over_this"] = ratios(results["old"], results["this"])
        print("old / this: " + ", ".join(f"{name} {value:.2f}" for name, value in stored["old_over_this"].items()))
    write_json(args.json, stored)
    return 0


if __name__ == "__main__":
    if "--worker" in sys.argv:
        _worker()
    elif "--peer" in sys.argv:
        _peer(int(sys.argv[-1]))
    else:
        sys.exit(main())
