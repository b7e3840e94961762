"""Time the fused CPU steps against Tensor.copy_ of the same tensor and against the reference.

    python -m benchmarks.codecs.kernels_cpu --json benchmarks/results/kernels_cpu.json
    python -m benchmarks.codecs.kernels_cpu --show benchmarks/results/kernels_cpu.json
    python -m benchmarks.codecs.kernels_cpu --scales token_history --json benchmarks/results/kernels_cpu_history.json

For each case, codec and form of scales: a session's ``encode`` with payload and new base in memory of their own, and
``decode`` in place. The runs of one line take turns, every one next to a copy; medians of the ratios. Beside
them what takes just moving the tensors (``moving.py``): no step can be faster at sizes that no cache holds.
"""

from __future__ import annotations

import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.codecs.moving import move_for_blocks, move_for_decoding, move_for_rows
from benchmarks.common import check_load, finish, parser, quartiles
from compactdist import codecs
from compactdist.kernels import use
from compactdist.state.matrix_view import plain

CHANNELS = 3072
FORMS: tuple[dict[str, Any], ...] = (
    *({"id": codec_id} for codec_id in ("binary", "int2", "int4", "int8", "int3", "ternary", "fp8")),
    *({"id": codec_id, "scales": "block"} for codec_id in ("binary", "int2", "int4", "int8")),
    *({"id": codec_id, "scales": "token_history"} for codec_id in ("binary", "int2", "int4", "int8")),
)
CASES = (  # rows, dtype, threads
    (4096, torch.bfloat16, 1),
    (4096, torch.bfloat16, 2),
    (16384, torch.bfloat16, 2),
    (4096, torch.float32, 2),
)


def _timed(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return (time.perf_counter() - start) * 1e3


def _line(spec: dict[str, Any], rows: int, dtype: torch.dtype, threads: int, rounds: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    codec, view = codecs.get(spec), plain(rows * CHANNELS, 1, CHANNELS)
    g = torch.Generator().manual_seed(0)
    base = torch.randn(view.numel, generator=g).to(dtype)
    x = base + (0.1 * torch.randn(view.numel, generator=g)).to(dtype)
    out, copied, held, moved = torch.empty_like(x), torch.empty_like(x), base.clone(), base.clone()
    session = codec.open(view, dtype, x.device)
    payload = torch.empty(session.payload_nbytes, dtype=torch.uint8)
    session.encode(x, (base,), out, payload)
    session.commit()  # with scales from the frame before, all frames but the first count

    def encode() -> None:
        session.encode(x, (base,), out, payload)

    def decode() -> None:
        session.decode(payload, (held,), held)

    def move_encode() -> None:
        (move_for_blocks if "scales" in spec else move_for_rows)(x, base, out)

    turns = {
        "encode": encode,
        "moved_encode": move_encode,
        "decode": decode,
        "moved_decode": lambda: move_for_decoding(moved),
    }
    copies: list[float] = []
    samples: dict[str, list[float]] = {name: [] for name in (*turns, "eager_encode", "eager_decode")}
    ratios: dict[str, list[float]] = {name: [] for name in turns}
    for round_ in range(rounds + 2):
        for name, work in turns.items():
            copy = _timed(lambda: copied.copy_(x))
            taken = _timed(work)
            if round_ > 1:  # the first ones compile and fault pages in
                copies.append(copy)
                samples[name].append(taken)
                ratios[name].append(taken / copy)
        for tensor in (held, moved):  # sums of moved bits would not stay numbers
            tensor.copy_(base)
        if round_ % 5 == 2:
            with use("reference"):
                for name, work in (("eager_encode", encode), ("eager_decode", decode)):
                    samples[name].append(_timed(work))
    line: dict[str, Any] = {
        "codec": spec["id"],
        "scales": spec.get("scales", "token_channel"),
        "rows": rows,
        "dtype": str(dtype).removeprefix("torch."),
        "threads": threads,
        "copy_ms": round(statistics.median(copies), 2),
    }
    return line | _figures("encode", samples, ratios) | _figures("decode", samples, ratios)


def _figures(name: str, samples: dict[str, list[float]], ratios: dict[str, list[float]]) -> dict[str, Any]:
    """Milliseconds, copies and speedup of ``encode`` or ``decode``."""
    taken, eager = statistics.median(samples[name]), statistics.median(samples[f"eager_{name}"])
    spread = quartiles(ratios[name])
    return {
        f"{name}_ms": round(taken, 2),
        f"{name}_copies": round(spread["median"], 2),
        f"{name}_copies_quartiles": [round(spread["q1"], 2), round(spread["q3"], 2)],
        f"moved_{name}_copies": round(statistics.median(ratios[f"moved_{name}"]), 2),
        f"eager_{name}_ms": round(eager, 1),
        f"{name}_speedup": round(eager / taken, 1),
    }


def table(lines: list[dict[str, Any]]) -> str:
    """The lines as Markdown."""
    text = [
        "| tensor | threads | codec | scales | copy ms "
        "| encode ms | x copy | just moved | x eager | decode ms | x copy | just moved | x eager |",
        "|---|---:|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for line in lines:
        cells = [
            f"[{line['rows']}, {CHANNELS}] {line['dtype']}",
            str(line["threads"]),
            f"`{line['codec']}`",
            line["scales"],
            f"{line['copy_ms']:.2f}",
        ]
        for name in ("encode", "decode"):
            low, high = line[f"{name}_copies_quartiles"]
            cells += [
                f"{line[f'{name}_ms']:.1f}",
                f"{line[f'{name}_copies']:.1f} ({low:.1f} to {high:.1f})",
                f"{line[f'moved_{name}_copies']:.1f}",
                f"{line[f'{name}_speedup']:.0f}",
            ]
        text.append(f"| {' | '.join(cells)} |")
    return "\n".join(text)


def main() -> None:
    made = parser(__doc__ or "")
    made.add_argument("--rounds", type=int, default=12, help="samples of each (default 12)")
    made.add_argument("--show", type=Path, metavar="FILE", help="print stored results instead of measuring")
    made.add_argument("--scales", choices=("token_channel", "block", "token_history"), help="of these alone")
    args = made.parse_args()
    if args.show is not None:
        print(table(json.loads(args.show.read_text())["lines"]))
        return
    check_load(args.max_load)
    forms = [form for form in FORMS if args.scales in (None, form.get("scales", "token_channel"))]
    lines = [_line(spec, *case, args.rounds) for case, spec in itertools.product(CASES, forms)]
    print(table(lines))
    finish(args.json, {"ranks": "none", "channels": CHANNELS, "rounds": args.rounds, "lines": lines})


if __name__ == "__main__":
    main()
