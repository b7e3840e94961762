"""``compactdist doctor``: a compressed all-gather between real ranks, started here or by torchrun."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

import compactdist
from compactdist.cli.findings import Finding
from compactdist.cli.streams_check import changing
from compactdist.observe.stats import PassReason

__all__ = ["between_launched_ranks", "between_own_ranks", "is_launched", "rank_findings", "work"]

_STEPS = 3
_ROWS, _CHANNELS = 512, 512
_LARGEST_ERROR = 0.5
_START_SECONDS = 30.0
"""What a process may take to import torch, on a busy machine, beside the timeout."""

_FILE_STORE: Any = getattr(dist, "FileStore")  # noqa: B009  mypy holds the name for private
_LAUNCHED_BY = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def is_launched(environment: Mapping[str, str]) -> bool:
    """Whether torchrun, or what sets the same variables, started this process as a rank."""
    return all(name in environment for name in _LAUNCHED_BY)


# --- one rank's side


def _exchange(group: Any, device: torch.device) -> dict[str, Any]:
    """All-gather a few steps through a wrapped group; called on all its ranks.

    Returns:
        What this rank measured, plain values. ``rel_error`` is the largest over the other ranks' tensors of the last
        step; ``digests`` are those of the bytes in the places of all ranks.
    """
    rank, size = group.rank(), group.size()
    out = torch.empty(size * _ROWS, _CHANNELS, dtype=torch.float32, device=device)
    values = [changing(_STEPS, _ROWS, _CHANNELS, torch.float32, seed) for seed in range(size)]
    seconds = 0.0
    for mine in values[rank]:
        x = mine.to(device)
        began = time.perf_counter()
        with group.step():
            group.all_gather_into_tensor(out, x)
        arrived = out.cpu()
        seconds = time.perf_counter() - began
    chunks = arrived.chunk(size)
    others = [(chunks[peer], values[peer][-1]) for peer in range(size) if peer != rank]
    errors = [float((got.double() - sent.double()).norm() / sent.double().norm()) for got, sent in others]
    stats = group.stats()
    return {
        "compressed": stats.compressed_calls > 0 and not stats.passed_through,
        "codec": next((site.codec for site in stats.sites.values() if site.codec), ""),
        "reasons": {name: PassReason.explained(name) for name in stats.passed_reasons},
        "raw_bytes": stats.raw_bytes,
        "wire_bytes": stats.wire_bytes,
        "rel_error": max(errors, default=0.0),
        "ms": 1e3 * seconds,
        "digests": [_digest(chunk) for chunk in chunks],
        "explain": group.explain(),
    }


def _digest(x: Tensor) -> str:
    return hashlib.sha256(x.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def _among_ranks(timeout: float, own: Sequence[str]) -> dict[str, Any]:
    """The check itself, on the default group (gloo), which exists; called on all ranks.

    Args:
        timeout: seconds that each call and agreement may take.
        own: what is wrong on this rank.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    local = int(os.environ.get("LOCAL_RANK", rank))
    about = {"rank": rank, "host": socket.gethostname(), "errors": list(own), "gpu": local < torch.cuda.device_count()}
    ranks: list[Any] = [None] * size
    dist.all_gather_object(ranks, about)
    wrong = [one["rank"] for one in ranks if one["errors"]]
    if wrong:  # they may not come as far as the others, which would wait for them
        problem = f"not tried, as something is wrong on rank {', '.join(map(str, wrong))}"
        return {"size": size, "ranks": ranks, "problem": problem}
    on_gpus = all(one["gpu"] for one in ranks) and dist.is_nccl_available()
    device = torch.device("cuda", local) if on_gpus else torch.device("cpu")
    inner: Any = None
    if on_gpus:
        torch.cuda.set_device(device)
        inner = dist.new_group(backend="nccl", timeout=timedelta(seconds=timeout))
    result: dict[str, Any] = {"backend": "nccl" if on_gpus else "gloo", "size": size, "ranks": ranks}
    with compactdist.wrap(inner, timeout=timeout) as group:
        measured = _exchange(group, device)
    every: list[Any] = [None] * size
    dist.all_gather_object(every, measured)
    return result | {**every[0], "problem": _problem(every)}


def _problem(measured: Sequence[Mapping[str, Any]]) -> str:
    """What is wrong with what the ranks measured; empty if nothing is."""
    for place in range(len(measured)):
        seen = {one["digests"][place] for rank, one in enumerate(measured) if rank != place}
        if len(seen) > 1:
            return f"the ranks hold different bytes of what rank {place} sent"
    for rank, one in enumerate(measured):
        if not one["rel_error"] < _LARGEST_ERROR:
            return f"rank {rank} received tensors with an error of {one['rel_error']:.3g}"
        if one["compressed"] != measured[0]["compressed"]:
            return f"rank {rank} and rank 0 do not compress the same calls"
    return ""


def between_launched_ranks(timeout: float, own: Sequence[str]) -> dict[str, Any]:
    """The check between the ranks that torchrun started; every rank calls it and gets the same answer."""
    try:
        dist.init_process_group("gloo", timeout=timedelta(seconds=timeout))
    except Exception as error:  # torch raises errors of many kinds
        problem = f"the ranks did not find one another: {_one_line(error)}"
        return _failed(int(os.environ["WORLD_SIZE"]), problem) | {"remedy": _MEETING}
    try:
        return _among_ranks(timeout, own)
    except Exception as error:
        return _failed(dist.get_world_size(), _one_line(error))
    finally:
        dist.destroy_process_group()


def work(rank: int, size: int, store_file: str, result: str, timeout: float) -> None:
    """What a process started by :func:`between_own_ranks` does."""
    torch.set_num_threads(1)
    store = _FILE_STORE(store_file, size)
    store.set_timeout(timedelta(seconds=timeout))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=timeout))
    try:
        made = _among_ranks(timeout, [])
    except Exception as error:
        made = _failed(size, f"rank {rank}: {_one_line(error)}")
    Path(result).write_text(json.dumps(made))


def _failed(size: int, problem: str) -> dict[str, Any]:
    return {"size": size, "problem": problem}


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


# --- the side of who starts them


def between_own_ranks(size: int, timeout: float) -> dict[str, Any]:
    """The check between ``size`` processes of this machine.

    Args:
        size: ranks.
        timeout: seconds that each call may take; when it and what processes need to start are over, they are killed.

    Returns:
        What the check gave; ``problem`` says what went wrong.
    """
    # torchrun's names must not lead the ranks elsewhere
    environment = {name: value for name, value in os.environ.items() if name not in (*_LAUNCHED_BY, "LOCAL_RANK")}
    with tempfile.TemporaryDirectory() as folder:
        results = [Path(folder) / f"rank{rank}.json" for rank in range(size)]
        logs = [Path(folder) / f"rank{rank}.txt" for rank in range(size)]
        started = []
        try:
            for rank in range(size):
                arguments = f"{rank}, {size}, {str(Path(folder) / 'store')!r}, {str(results[rank])!r}, {timeout!r}"
                body = f"from compactdist.cli.ranks_check import work; work({arguments})"
                with logs[rank].open("w") as log:
                    started.append(
                        subprocess.Popen([sys.executable, "-c", body], stdout=log, stderr=log, env=environment)
                    )
            late = _wait(started, timeout + _START_SECONDS)
        finally:
            for process in started:
                if process.poll() is None:
                    process.kill()
                process.wait()
        return _collected(results, logs, late, timeout)


def _wait(started: Sequence[subprocess.Popen[bytes]], seconds: float) -> list[int]:
    """The ranks that did not end in time."""
    until = time.monotonic() + seconds
    late = []
    for rank, process in enumerate(started):
        try:
            process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            late.append(rank)
    return late


def _collected(results: Sequence[Path], logs: Sequence[Path], late: Sequence[int], timeout: float) -> dict[str, Any]:
    size = len(results)
    if late:
        ranks = ", ".join(map(str, late))
        return _failed(size, f"rank {ranks} did not end within {timeout + _START_SECONDS:g} s and was killed")
    for rank, (result, log) in enumerate(zip(results, logs, strict=True)):
        if not result.exists():
            last = (log.read_text(errors="replace").strip().splitlines() or ["nothing was printed"])[-1]
            return _failed(size, f"rank {rank} ended without a result: {last}")
    made = [cast("dict[str, Any]", json.loads(result.read_text())) for result in results]
    return next((one for one in made if one["problem"]), made[0])


# --- what it says


def rank_findings(result: Mapping[str, Any], rank: int = 0) -> list[Finding]:
    """Findings of a check between ranks, as seen by one of them, whose own errors are among its findings already."""
    where, size = "Ranks", result["size"]
    found = [
        Finding(where, f"rank {one['rank']} on {one['host']}", error, "error")
        for one in result.get("ranks", ())
        for error in one["errors"]
        if one["rank"] != rank
    ]
    if result["problem"]:
        return [*found, Finding(where, f"{size} ranks", result["problem"], "error", result.get("remedy", ""))]
    link = f"{size} ranks over {result['backend']}"
    if result["compressed"]:
        ratio = result["raw_bytes"] / result["wire_bytes"]
        sent = f"{result['wire_bytes']} bytes for {result['raw_bytes']} ({ratio:.1f})"
        told = f"error {result['rel_error']:.1e}, last call {result['ms']:.1f} ms"
        return [*found, Finding(where, link, f"compressed with {result['codec']}: {sent}, {told}")]
    why = "; ".join(f"{name} ({text})" for name, text in result["reasons"].items()) or "nothing was counted"
    return [*found, Finding(where, link, f"passed through: {why}", "warning", _REMEDY)]


_REMEDY = "wrap() takes its options from the variables above: if this is not what you want, look at these"
_MEETING = "set MASTER_ADDR to an address that all ranks reach, and GLOO_SOCKET_IFNAME to the network they share"
