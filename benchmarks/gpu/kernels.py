"""Check and time the Triton kernels on a GPU.

    python -m benchmarks.gpu.kernels --json benchmarks/results/gpu_kernels.json
    python -m benchmarks.gpu.kernels --quick          # one dtype, [1088, 3072] and 64 MB: a minute
    python -m benchmarks.gpu.kernels --interpret      # the checks alone, small, on CPU tensors in Triton's interpreter

Checks: payloads, new bases and decodings of every codec equal those of the reference on the CPU, bit for bit, codecs
in parallel processes, as most of that time is Triton's compiler; two gloo ranks that share the GPU receive what two
ranks on the CPU receive; a step does not make the host wait, does not allocate, and gives the same bytes when captured
in a CUDA graph and replayed.

Times: medians of CUDA events, the second-level cache overwritten before each run, all memory allocated before. Bytes
moved count each tensor once (x and base read, new base and payload written), although scales by row and channel read x
and base three times. The table shows microseconds of a replayed CUDA graph, beside each what part of the speed of a
device copy of as many bytes in the same run that is, and microseconds of the host to launch the smallest size without
a graph.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks.common import on_two_ranks
from benchmarks.gpu import checks
from benchmarks.gpu.common import EXIT_WITHOUT_GPU, Clock, cell, graph_of, host_us, lines_of, parser, settle, table
from compactdist import codecs
from compactdist.state.matrix_view import plain

TIMED = [f"{codec_id} {scales}" for codec_id in ("binary", "int2", "int4", "int8") for scales in checks.SCALES]
CHANNELS = 3072
SIZES = {"[1088, 3072]": 1088} | {
    name: (megabytes << 20) // (2 * CHANNELS) for name, megabytes in (("64 MB", 64), ("256 MB", 256), ("1 GB", 1024))
}
"""Rows of x in bfloat16, by what the table calls them."""
QUICK = ["[1088, 3072]", "64 MB"]
DIRECTIONS = ("encode", "decode")


def _exact(name: str, device: str, small: bool, quick: bool, sizes: list[str]) -> dict[str, Any]:
    """One codec's exactness, in a process of its own; what the times need is compiled on the way."""
    torch.set_num_threads(1)
    codec_id, scales = name.split()
    codec = codecs.get(codec_id, scales=scales)
    line = checks.exactness(codec, torch.device(device), small=small, dtypes=checks.DTYPES[: 1 if quick else None])
    if name in TIMED and not small:
        for size in sizes[:2]:
            step = checks.Step(codec, plain(SIZES[size] * CHANNELS, 1, CHANNELS), torch.device(device))
            step.encode(), step.decode()
        torch.cuda.synchronize()
    return line


@contextmanager
def exactness(names: list[str], jobs: int, *args: Any) -> Iterator[dict[str, Future[dict[str, Any]]]]:
    """The exactness of each codec, under way in ``jobs`` processes while the block runs."""
    context: Any = torch.multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=jobs, mp_context=context) as pool:
        yield {name: pool.submit(_exact, name, *args) for name in names}


def timed(name: str, size: str, clock: Clock) -> dict[str, Any]:
    """Times of one codec at one size; raises where a step is not what the module says of it."""
    codec_id, scales = name.split()
    rows = SIZES[size]
    step = checks.Step(codecs.get(codec_id, scales=scales), plain(rows * CHANNELS, 1, CHANNELS), torch.device("cuda"))
    step.encode(), step.decode()
    line: dict[str, Any] = {"codec": codec_id, "scales": scales, "size": size, "rows": rows, "channels": CHANNELS}
    line |= {"megabytes": round(step.x.nbytes / 1e6, 1), "payload_bytes": step.payload.nbytes}
    results = [step.payload.clone(), step.out.clone(), step.held.clone()]
    line["ends_equal"] = torch.equal(step.out, step.held)
    line["host_waits"] = checks.host_reads(step)
    line["allocations"] = checks.allocations(step)
    works = {"encode": (step.encode, step.encode_bytes), "decode": (step.decode, step.decode_bytes)}
    for direction, (work, moved) in works.items():
        graph = graph_of(work)
        graph_us, copy_us = clock.us(graph.replay), clock.copy_us(moved)
        line[f"{direction}_graph_us"], line[f"{direction}_graph_gb_s"] = graph_us, moved / graph_us / 1e3
        line[f"{direction}_of_copy"] = copy_us / graph_us
        line[f"{direction}_us"], line[f"{direction}_host_us"] = clock.us(work), host_us(work)
    # replayed from memory that holds something else
    for tensor in (step.payload, step.out, step.held):
        tensor.zero_()
    graph_of(step.encode).replay(), graph_of(step.decode).replay()
    torch.cuda.synchronize()
    line["graph_equal"] = all(map(torch.equal, results, (step.payload, step.out, step.held)))
    broken = [what for what in ("ends_equal", "graph_equal") if not line[what]]
    broken += [what for what in ("host_waits", "allocations") if line[what]]
    return line | ({"error": ", ".join(f"{what} {line[what]}" for what in broken)} if broken else {})


def times(sizes: list[str], rounds: int) -> list[dict[str, Any]]:
    """Every timed codec at every size."""
    clock, lines = Clock(rounds), []
    for size in sizes:
        lines += lines_of(
            (f"{name} {size}" for name in TIMED), lambda name, s=size: timed(name[: -len(s) - 1], s, clock)
        )
        torch.cuda.empty_cache()
    return lines


def shown(lines: list[dict[str, Any]]) -> str:
    """The table: two rows for each codec, of encoding and decoding."""
    sizes = [size for size in SIZES if any(line.get("size") == size for line in lines)]
    head = ["", *(part for size in sizes for part in (f"{size} us", "copy")), "host us"]
    rows = []
    for direction in DIRECTIONS:
        for name in TIMED:
            of = {line["size"]: line for line in lines if "size" in line and line["name"] == f"{name} {line['size']}"}
            cells = [f"{name} {direction}"]
            for size in sizes:
                there = of.get(size)
                cells += [cell(there and there[f"{direction}_graph_us"], 1 if size == sizes[0] else 0)]
                cells += ["-" if there is None else f"{there[f'{direction}_of_copy']:.0%}"]
            small = of.get(sizes[0])
            rows.append([*cells, cell(small and small[f"{direction}_host_us"])])
    return table(head, rows)


def two_ranks(codec_id: str, kernels: str, numel: int) -> dict[str, Any]:
    """Whether two ranks on these kernels receive what two on the CPU do."""
    try:
        got, expected = (on_two_ranks(checks.digests, one, codec_id, numel) for one in (kernels, "reference"))
    except SystemExit as ended:  # a rank has printed why
        raise RuntimeError(str(ended)) from None
    return {"equal": got == expected} | ({} if got == expected else {"error": "received other bytes than on the CPU"})


def main() -> None:
    made = parser(__doc__ or "")
    made.add_argument("--interpret", action="store_true", help="the checks alone, without a GPU")
    made.add_argument("--quick", action="store_true", help="one dtype, one codec on two ranks, two sizes")
    made.add_argument("--rounds", type=int, default=30, help="samples of each time (default 30)")
    cores = len(os.sched_getaffinity(0))
    made.add_argument("--jobs", type=int, default=max(1, min(14, cores - 2)), help="processes that check exactness")
    args = made.parse_args()
    if args.interpret and os.environ.get("TRITON_INTERPRET") != "1":
        # Triton asks when it is imported, which torch may have done by now.
        again = [sys.executable, "-m", "benchmarks.gpu.kernels", *sys.argv[1:]]
        os.execve(sys.executable, again, {**os.environ, "TRITON_INTERPRET": "1"})
    if not args.interpret and not torch.cuda.is_available():
        print("no CUDA device: nothing was checked or timed (--interpret checks the kernels without one)")
        sys.exit(EXIT_WITHOUT_GPU)
    began = time.monotonic()
    device, small = ("cpu", True) if args.interpret else ("cuda", False)
    sizes = [] if args.interpret else QUICK if args.quick else list(SIZES)
    names = TIMED if args.quick else [f"{codec_id} {scales}" for codec_id in checks.CODECS for scales in checks.SCALES]
    with exactness(names, args.jobs, device, small, args.quick, sizes) as under_way:
        numel = 20 * 80 if small else 1088 * 3072
        kernels, on_ranks = "interpreted" if small else device, ["int2"] if args.quick else ["int2", "int8"]
        ranks = lines_of(on_ranks, lambda codec_id: two_ranks(codec_id, kernels, numel))
        exact = lines_of(names, lambda name: under_way[name].result())
    for line in exact:
        print(f"{line['name']:21} {line.get('cases', 0):3} cases  {'exact' if line.get('exact') else 'FAILED'}")
    for line in ranks:
        print(f"two ranks, {line['name']}: {'as on the CPU' if line.get('equal') else 'FAILED'}")
    print(f"checked in {time.monotonic() - began:.0f} s", flush=True)
    lines = times(sizes, args.rounds) if sizes else []
    if lines:
        print(shown(lines))
    print(f"{time.monotonic() - began:.0f} s in all")
    settle(args.json, {"exact": exact, "two_ranks": ranks, "lines": lines}, [*exact, *ranks, *lines])


if __name__ == "__main__":
    main()
