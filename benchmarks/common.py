"""What the benchmark scripts share: two pinned gloo ranks, medians with their spread, results as JSON."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import compactdist

WORLD_SIZE = 2
STDOUT = Path("-")
_LOAD = os.getloadavg()[0]


class _JsonTo(argparse.Action):
    """Takes a file; with ``-`` whatever the script prints goes to standard error, so that only JSON is on the other."""

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        setattr(namespace, self.dest, values)
        if values == STDOUT:
            sys.stdout = sys.stderr


def timed(steps: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median milliseconds of each step, all of them in turn; of one thread its own time, which others cannot take."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 2):
        for name, step in steps.items():
            start = clock()
            step()
            if number >= 2:
                taken[name].append(1e3 * (clock() - start))
    return {name: statistics.median(values) for name, values in taken.items()}


def add_json(to: argparse.ArgumentParser, default: Path | None = None) -> None:
    """Add ``--json FILE|-``."""
    text = "write the numbers there too; -: to standard output, and all else to standard error"
    to.add_argument("--json", type=Path, metavar="FILE", action=_JsonTo, default=default, help=text)


def write_json(path: Path | None, record: dict[str, Any]) -> None:
    """Write the record where ``--json`` says; nothing where it says ``None``."""
    if path is None:
        return
    text = json.dumps(record, indent=1) + "\n"
    if path == STDOUT:
        assert sys.__stdout__ is not None
        sys.__stdout__.write(text)
        sys.__stdout__.flush()
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    print(f"written to {path}")


def parser(doc: str) -> argparse.ArgumentParser:
    """A parser with ``--json`` and ``--max-load``."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_json(made)
    made.add_argument(
        "--max-load", type=float, default=1.5, help="refuse to time above this 1-minute load average (default 1.5)"
    )
    return made


def add_rounds(to: argparse.ArgumentParser, default: int, of: str = "rounds") -> None:
    """Add ``--rounds`` and ``--threads``, for scripts that time this process's own work; :func:`begin` follows."""
    to.add_argument("--rounds", type=int, default=default, help=f"{of} of each line (default {default})")
    to.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: as many as torch takes")


def begin(args: argparse.Namespace) -> None:
    """Compute on as many threads as asked for, unless the machine is busy."""
    torch.set_num_threads(args.threads)
    check_load(args.max_load)


def check_load(limit: float) -> None:
    """End the script if the machine is busy: its numbers would be noise."""
    if limit < _LOAD:
        sys.exit(f"load average {_LOAD:.2f} > {limit}: wait until the machine is quiet, or give --max-load")


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """Median, and the quartiles around it."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "q1": low, "q3": high}


def on_two_ranks(body: Callable[..., Any], *args: Any) -> Any:
    """Run ``body(rank, *args)`` on two gloo ranks over loopback, each on a core of its own; rank 0's result.

    The result travels through JSON.
    """
    return on_ranks(WORLD_SIZE, body, *args)


def on_ranks(ranks: int, body: Callable[..., Any], *args: Any) -> Any:
    """As :func:`on_two_ranks` for any number of ranks, which share the cores if there are fewer."""
    cores = sorted(os.sched_getaffinity(0))
    # a store in the process that starts the ranks, as torchrun has it
    store: Any = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context: Any = torch.multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_rank, args=(rank, ranks, cores[rank % len(cores)], store.port, folder, body, args))
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            sys.exit("a rank failed")
        return json.loads(Path(folder, "result.json").read_text())


def _rank(
    rank: int, ranks: int, core: int, port: int, folder: str, body: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    os.sched_setaffinity(0, {core})
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    store: Any = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    result = body(rank, *args)
    dist.barrier()
    if rank == 0:
        Path(folder, "result.json").write_text(json.dumps(result))
    # Threads of gloo that end after the interpreter has begun to may end the process by an abort on a loaded machine.
    sys.stdout.flush()
    os._exit(0)


def _module(script: Path) -> str:
    """The dotted name that a benchmark is run by: ``benchmarks.link.all_gather``."""
    parts = script.resolve().with_suffix("").parts
    return ".".join(parts[len(parts) - 1 - parts[::-1].index("benchmarks") :])


def finish(path: Path | None, result: dict[str, Any]) -> None:
    """Write the result with what is needed to judge it: command, versions, machine."""
    if path is None:
        return
    about = {
        "command": shlex.join(["python", "-m", _module(Path(sys.argv[0])), *sys.argv[1:]]),
        "torch": torch.__version__,
        "compactdist": compactdist.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "load_average_before": round(_LOAD, 2),
        "ranks": f"{WORLD_SIZE}, gloo over loopback, each pinned to a core",
    }
    write_json(path, {**about, **result})
