"""Check and time the Triton kernels on a GPU.

    python -m benchmarks.gpu --json benchmarks/results/gpu.json
    python -m benchmarks.gpu --interpret        # the checks alone, small, on CPU tensors in Triton's interpreter

Checks: payloads, new bases and decodings of every codec equal those of the reference on the CPU, bit for bit; two gloo
ranks that share the GPU receive what two ranks on the CPU receive; a step does not make the host wait, does not
allocate, and gives the same bytes when captured in a CUDA graph and replayed.

Times: medians of CUDA events, the second-level cache overwritten before each run, all memory allocated before. Bytes
moved count each tensor once (x and base read, new base and payload written), although scales by row and channel read x
and base three times; the last column of each pair sets that against a device copy of as many bytes in the same run.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.common import finish, on_two_ranks, parser
from benchmarks.gpu import checks
from compactdist import codecs
from compactdist.state.matrix_view import plain

TIMED = (("binary", "token_channel"), ("binary", "block"), ("int2", "token_channel"), ("int2", "block"),
         ("int4", "token_channel"), ("int4", "block"), ("int8", "token_channel"))  # fmt: skip
CHANNELS = 3072
MEGABYTES = (0, 64, 256, 1024)
"""Sizes of x in bfloat16; 0 stands for [1088, 3072]."""
FLUSH_NBYTES = 256 << 20
EXIT_WITHOUT_GPU = 2


class Clock:
    """Times work on the device, with its second-level cache full of something else."""

    def __init__(self, rounds: int) -> None:
        self.rounds = rounds
        self.other = torch.empty(FLUSH_NBYTES, dtype=torch.uint8, device="cuda")

    def ms(self, work: Callable[[], Any]) -> float:
        taken = []
        for _ in range(self.rounds + 3):
            self.other.zero_()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            work()
            end.record()
            end.synchronize()
            taken.append(start.elapsed_time(end))
        return statistics.median(taken[3:])

    def copy_gb_s(self, nbytes: int) -> float:
        """Read half as many bytes and write the other half."""
        source = torch.empty(nbytes // 2, dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        return 2 * source.nbytes / self.ms(lambda: target.copy_(source)) / 1e6


def host_us(work: Callable[[], Any], count: int = 50) -> float:
    """Time to launch, without waiting for what was launched."""
    work()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(count):
        work()
    taken = time.perf_counter() - start
    torch.cuda.synchronize()
    return 1e6 * taken / count


def graph_of(work: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    """The work, captured; it has run before."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


def timed(codec_id: str, scales: str, megabytes: int, clock: Clock) -> dict[str, Any]:
    """One line of the table."""
    rows = (megabytes << 20) // (2 * CHANNELS) or 1088
    view = plain(rows * CHANNELS, 1, CHANNELS)
    step = checks.Step(codecs.get(codec_id, scales=scales), view, torch.device("cuda"))
    step.encode(), step.decode()
    line: dict[str, Any] = {"codec": codec_id, "scales": scales, "rows": rows, "channels": CHANNELS}
    line |= {"megabytes": round(step.x.nbytes / 1e6, 1), "payload_bytes": step.payload.nbytes}
    results = [step.payload.clone(), step.out.clone(), step.held.clone()]
    line["ends_equal"] = torch.equal(step.out, step.held)
    line["host_waits"] = checks.host_reads(step)
    line["allocations"] = checks.allocations(step)
    for name, work, moved in (("encode", step.encode, step.encode_bytes), ("decode", step.decode, step.decode_bytes)):
        ms, copy = clock.ms(work), clock.copy_gb_s(moved)
        graph = graph_of(work)
        line[f"{name}_ms"], line[f"{name}_gb_s"] = ms, moved / ms / 1e6
        line[f"{name}_of_copy"] = line[f"{name}_gb_s"] / copy
        line[f"{name}_graph_ms"], line[f"{name}_host_us"] = clock.ms(graph.replay), host_us(work)
    # replayed from memory that holds something else
    for tensor in (step.payload, step.out, step.held):
        tensor.zero_()
    graph_of(step.encode).replay(), graph_of(step.decode).replay()
    torch.cuda.synchronize()
    line["graph_equal"] = all(map(torch.equal, results, (step.payload, step.out, step.held)))
    return line


def _passed(line: dict[str, Any]) -> bool:
    return line["ends_equal"] and line["graph_equal"] and not line["host_waits"] and not line["allocations"]


def show(line: dict[str, Any]) -> None:
    """Print one line of the table."""
    print(
        f"{line['codec']:7} {line['scales']:13} {line['megabytes']:7.1f} MB"
        + "".join(
            f"  {name} {line[f'{name}_ms']:7.3f} ms {line[f'{name}_gb_s']:5.0f} GB/s {line[f'{name}_of_copy']:4.0%}"
            f" graph {line[f'{name}_graph_ms']:7.3f} ms host {line[f'{name}_host_us']:4.0f} us"
            for name in ("encode", "decode")
        )
        + ("  passed" if _passed(line) else "  FAILED"),
        flush=True,
    )


def two_ranks(device: str, forced: bool, numel: int) -> dict[str, bool]:
    """By codec, whether two ranks on the device receive what two on the CPU do."""
    equal = {}
    for codec_id in ("int2", "int8"):
        got = on_two_ranks(checks.digests, device, forced, codec_id, numel)
        equal[codec_id] = got == on_two_ranks(checks.digests, "cpu", False, codec_id, numel)
    return equal


def main() -> None:
    made = parser(__doc__ or "")
    made.add_argument("--interpret", action="store_true", help="the checks alone, without a GPU")
    made.add_argument("--rounds", type=int, default=30, help="samples of each time (default 30)")
    args = made.parse_args()
    if args.interpret and os.environ.get("TRITON_INTERPRET") != "1":
        # Triton asks when it is imported, which torch may have done by now.
        again = [sys.executable, "-m", "benchmarks.gpu", *sys.argv[1:]]
        os.execve(sys.executable, again, {**os.environ, "TRITON_INTERPRET": "1"})
    if not args.interpret and not torch.cuda.is_available():
        print("no CUDA device: nothing was checked or timed (--interpret checks the kernels without one)")
        sys.exit(EXIT_WITHOUT_GPU)
    device = torch.device("cpu" if args.interpret else "cuda")
    exact = checks.exactness(device, small=args.interpret)
    for line in exact:
        verdict = "exact" if line["exact"] else f"WRONG {line['wrong']}"
        print(f"{line['codec']:7} {line['scales']:13} {line['cases']:3} cases  {verdict}", flush=True)
    ranks = two_ranks(device.type, args.interpret, 20 * 80 if args.interpret else 1088 * 3072)
    print("two ranks as on the CPU:", ranks)
    lines = []
    if not args.interpret:
        clock = Clock(args.rounds)
        for megabytes in MEGABYTES:
            for codec_id, scales in TIMED:
                lines.append(timed(codec_id, scales, megabytes, clock))
                show(lines[-1])
                torch.cuda.empty_cache()
    gpu = "none, interpreted" if args.interpret else torch.cuda.get_device_name()
    finish(args.json, {"gpu": gpu, "exact": exact, "two_ranks_equal": ranks, "lines": lines})
    if not all([*(line["exact"] for line in exact), *ranks.values(), *map(_passed, lines)]):
        sys.exit("some checks failed")


if __name__ == "__main__":
    main()
