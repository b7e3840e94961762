"""What the GPU benchmarks share: the card, times of device work, counts of launches, tables, lines that fail."""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import finish

EXIT_WITHOUT_GPU = 2
FLUSH_NBYTES = 256 << 20


def card() -> dict[str, str]:
    """What numbers depend on: card, versions of driver, CUDA, NCCL and Triton; ``none`` where there is none."""
    try:
        import triton

        found = {"triton": str(triton.__version__)}
    except ImportError:
        found = {"triton": "none"}
    if not torch.cuda.is_available():
        return {"gpu": "none", "driver": "none", "cuda": "none", "nccl": "none", **found}
    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": _driver(),
        "cuda": str(torch.version.cuda),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        **found,
    }


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown: {type(error).__name__}"
    return said.split("\n")[0].strip()


def apart(rank: int) -> dict[str, str]:
    """Environment of a rank that shares its GPU: NCCL takes ranks for those of different hosts, and the network."""
    network = {"NCCL_HOSTID": f"host{rank}", "NCCL_NET": "Socket", "NCCL_SOCKET_IFNAME": "lo"}
    off = ("NCCL_P2P_DISABLE", "NCCL_SHM_DISABLE", "NCCL_IB_DISABLE")
    return network | dict.fromkeys(off, "1") | {"NCCL_NVLS_ENABLE": "0", "NCCL_CUMEM_ENABLE": "0"}


def parser(doc: str) -> argparse.ArgumentParser:
    """A parser with ``--json``."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there too")
    return made


def settle(path: Path | None, result: dict[str, Any], lines: Iterable[dict[str, Any]]) -> None:
    """Store ``result`` with the card and all versions, and end with status 1 if one of ``lines`` holds an ``error``.

    Args:
        path: of the JSON, ``None`` to store nothing.
        result: what was measured, ``lines`` among it.
        lines: those of :func:`lines_of`.
    """
    finish(path, {"ranks": "none", **card(), **result})
    seen = list(lines)
    failed = [line["name"] for line in seen if line.get("error")]
    sys.stdout.flush()
    if failed:
        sys.exit(f"{len(failed)} of {len(seen)} failed: {', '.join(failed)}")


def lines_of(names: Iterable[str], work: Callable[[str], dict[str, Any]]) -> list[dict[str, Any]]:
    """``work(name)`` for each name. One that raises leaves its ``error`` in its line, and the others go on."""
    lines: list[dict[str, Any]] = []
    for name in names:
        try:
            lines.append({"name": name, **work(name)})
        except Exception as error:
            traceback.print_exc()
            lines.append({"name": name, "error": f"{type(error).__name__}: {error}"})
        if lines[-1].get("error"):
            print(f"{name} FAILED: {lines[-1]['error'][:300]}", flush=True)
    return lines


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their cells: the first flush left, the others flush right."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    return "\n".join(
        " ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in (head, *rows)
    )


def cell(value: float | None, digits: int = 0) -> str:
    """A number for a table, ``-`` where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


class Clock:
    """Times work on the device, with its second-level cache full of something else. On a CPU, wall-clock."""

    def __init__(self, rounds: int, device: str = "cuda") -> None:
        self.rounds = rounds
        self.on_gpu = device == "cuda"
        self._other = torch.empty(FLUSH_NBYTES, dtype=torch.uint8, device=device) if self.on_gpu else None
        self._copies: dict[int, float] = {}

    def us(self, work: Callable[[], Any]) -> float:
        """Median microseconds of one run of ``work``, between two events on the device."""
        taken = [self._once(work) for _ in range(self.rounds + 3)]
        return 1000 * statistics.median(taken[3:])

    def _once(self, work: Callable[[], Any]) -> float:
        if self._other is None:
            began = time.perf_counter()
            work()
            return 1000 * (time.perf_counter() - began)
        self._other.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))

    def copy_us(self, nbytes: int) -> float:
        """Median microseconds of a device copy that reads half as many bytes and writes the other half."""
        if nbytes not in self._copies:
            source = torch.empty(nbytes // 2, dtype=torch.uint8, device="cuda" if self.on_gpu else "cpu")
            target = torch.empty_like(source)
            self._copies[nbytes] = self.us(lambda: target.copy_(source))
        return self._copies[nbytes]


def host_us(work: Callable[[], Any], count: int = 50) -> float:
    """Microseconds to launch ``work``, without waiting for what was launched."""
    work()
    synchronize()
    start = time.perf_counter()
    for _ in range(count):
        work()
    taken = time.perf_counter() - start
    synchronize()
    return 1e6 * taken / count


def synchronize() -> None:
    """Wait for the device, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def graph_of(work: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    """The work, captured; it has run before."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph):
            work()
    except BaseException:
        torch.cuda.set_stream(stream)  # a capture that fails leaves its own stream as the current one
        raise
    return graph


_WAIT = re.compile(r"(cuda|cu|hip)(Stream|Event)Synchronize")


@dataclass(frozen=True)
class Counts:
    """What the host asked of the device while something ran.

    Attributes:
        launches: of kernels.
        copies: between memories, and within the device's.
        fills: of memory with one byte.
        waits: of the host for a stream or an event.
        kernel_us: microseconds of all kernels, copies and fills on the device.
    """

    launches: int
    copies: int
    fills: int
    waits: int
    kernel_us: float

    def per(self, calls: int) -> dict[str, float]:
        """Each count divided by the number of calls."""
        return {name: getattr(self, name) / calls for name in self.__dataclass_fields__}


def counted(events: Iterable[tuple[str, bool, float]]) -> Counts:
    """Counts of a profile: name of each event, whether it is the device's, and its microseconds."""
    seen = list(events)
    on_device = [name for name, of_device, _ in seen if of_device]
    copies, fills = (sum(name.startswith(kind) for name in on_device) for kind in ("Memcpy", "Memset"))
    return Counts(
        launches=len(on_device) - copies - fills,
        copies=copies,
        fills=fills,
        waits=sum(bool(_WAIT.match(name)) for name, of_device, _ in seen if not of_device),
        kernel_us=sum(us for _, of_device, us in seen if of_device),
    )


def profiled(work: Callable[[], Any]) -> Counts | None:
    """What one run of ``work`` asks of the device; ``None`` where there is no GPU."""
    if not torch.cuda.is_available():
        return None
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    work()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize()
    return counted(
        (event.name, event.device_type == DeviceType.CUDA, float(event.self_device_time_total))
        for event in profiler.events()
        if not getattr(event, "is_user_annotation", False)  # a span of compiled code, beside its kernels
    )


def host_waits(work: Callable[[], Any]) -> int | None:
    """How often torch lets the host wait for the device in one run of ``work``; ``None`` where there is no GPU."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    return sum("synchronizing CUDA operation" in str(one.message) for one in said)
