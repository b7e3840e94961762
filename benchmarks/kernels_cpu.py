"""Time the fused CPU steps against Tensor.copy_ of the same tensor and against the reference.

    python -m benchmarks.kernels_cpu --json benchmarks/results/kernels_cpu.json

For each codec, dtype and number of threads at [4096, 3072]: ``encode_residual`` with the new base, and
``decode_residual`` in place. The runs of one line are interleaved, and medians are taken.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.common import check_load, parser
from compactdist import codecs
from compactdist.codecs.kernels import use
from compactdist.state.layout import plain

ROWS, CHANNELS = 4096, 3072
CODECS = ("binary", "int2", "int4", "int8")
DTYPES = (torch.float32, torch.bfloat16)


def _timed(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return (time.perf_counter() - start) * 1e3


def _line(codec_id: str, dtype: torch.dtype, threads: int, rounds: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    codec, cut = codecs.get(codec_id), plain(ROWS * CHANNELS, 1, CHANNELS)
    g = torch.Generator().manual_seed(0)
    base = torch.randn(cut.numel, generator=g).to(dtype)
    x = base + (0.1 * torch.randn(cut.numel, generator=g)).to(dtype)
    out, held = torch.empty_like(x), base.clone()
    payload = codec.encode_residual(x, base, cut, out)

    def encode() -> None:
        codec.encode_residual(x, base, cut, out)

    def decode() -> None:
        codec.decode_residual(payload, held, cut, held)

    work = {"copy": lambda: out.copy_(x), "encode": encode, "decode": decode}
    samples: dict[str, list[float]] = {name: [] for name in (*work, "reference_encode", "reference_decode")}
    for round_ in range(rounds + 1):
        taken = {name: _timed(one) for name, one in work.items()}
        if round_ % 4 == 0:
            held.copy_(base)
            with use("reference"):
                taken["reference_encode"], taken["reference_decode"] = _timed(encode), _timed(decode)
        if round_:  # the first one compiles
            for name, value in taken.items():
                samples[name].append(value)
    ms = {name: round(statistics.median(values), 2) for name, values in samples.items()}
    return {
        "codec": codec_id,
        "dtype": str(dtype).removeprefix("torch."),
        "threads": threads,
        **{f"{name}_ms": value for name, value in ms.items()},
        "encode_copies": round(ms["encode"] / ms["copy"], 1),
        "decode_copies": round(ms["decode"] / ms["copy"], 1),
        "encode_speedup": round(ms["reference_encode"] / ms["encode"], 1),
        "decode_speedup": round(ms["reference_decode"] / ms["decode"], 1),
    }


def main() -> None:
    made = parser(__doc__ or "")
    made.add_argument("--rounds", type=int, default=12, help="samples of each (default 12)")
    args = made.parse_args()
    check_load(args.max_load)
    lines = []
    for threads, dtype, codec_id in itertools.product((1, 2), DTYPES, CODECS):
        line = _line(codec_id, dtype, threads, args.rounds)
        lines.append(line)
        print(
            f"{codec_id:7} {line['dtype']:9} {threads} thread(s)  copy {line['copy_ms']:6.2f} ms"
            + "".join(
                f"  {what} {line[f'{what}_ms']:6.1f} ms = {line[f'{what}_copies']:5.1f} copies,"
                f" {line[f'{what}_speedup']:4.1f} x faster"
                for what in ("encode", "decode")
            ),
            flush=True,
        )
    if args.json:
        about = {
            "shape": [ROWS, CHANNELS],
            "torch": torch.__version__,
            "machine": platform.processor() or platform.machine(),
            "cores": len(os.sched_getaffinity(0)),
            "load_after": os.getloadavg()[0],
        }
        args.json.write_text(json.dumps({"about": about, "lines": lines}, indent=1) + "\n")


if __name__ == "__main__":
    main()
