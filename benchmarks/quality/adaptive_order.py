"""Order "auto" beside orders 1 and 2, for every site of recorded traces, as `compactdist evaluate` plays them.

    python -m benchmarks.quality.adaptive_order --json benchmarks/results/adaptive_order.json
    python -m benchmarks.quality.adaptive_order --show benchmarks/results/adaptive_order.json

Errors are means of ||x - x_hat|| / ||x|| over the frames after the keyframe, in dB; gains are in dB below order 1.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from benchmarks import common
from compactdist import codecs
from compactdist.cli.evaluate import Setting, play_sites, recorded
from compactdist.cli.score import Score
from compactdist.observe.trace import Trace
from compactdist.state import Order, StreamConfig

TRACES = {"digits_ring": "digits", "photos_dit": "photos"}
CODECS = ("binary", "int2", "int4", "lowrank_int4", "transform:bits=0.5", "transform:bits=1", "transform:bits=2")
STEPS = (28, 8, 4)
ORDERS: tuple[Order, ...] = (1, 2, "auto")
FOLDER = Path(__file__).parents[1] / "traces"


def played(trace: str, steps: int, names: list[str]) -> list[dict[str, Any]]:
    """One row for each codec and site: its error by order."""
    rows: list[dict[str, Any]] = []
    for entry in recorded(Trace(FOLDER / f"{trace}.safetensors"), steps, 1):
        for name in names:
            row: dict[str, Any] = {"trace": trace, "steps": steps, "codec": name, "site": entry.site}
            for order in ORDERS:
                score = Score()
                play_sites(score, Setting(codecs.get(name), StreamConfig(order, find_layout=False)), [entry])
                row[f"order_{order}_db"] = 20 * float(torch.tensor(score.residuals.rel_error).log10())
            rows.append(row)
    return rows


def gains(rows: list[dict[str, Any]], order: Order, **like: object) -> str:
    """Smallest and largest gain over order 1, in dB, of the rows with these values."""
    mine = [row for row in rows if like.items() <= row.items()]
    found = [row["order_1_db"] - row[f"order_{order}_db"] for row in mine]
    return f"{min(found):+.2f} to {max(found):+.2f}"


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table, a column for each codec."""
    names = list(dict.fromkeys(row["codec"] for row in rows))
    lines = ["| trace, steps | " + " | ".join(f"`{name}`" for name in names) + " |", "|---|" + "---|" * len(names)]
    for trace, steps in dict.fromkeys((row["trace"], row["steps"]) for row in rows):
        for order, said in ((ORDERS[2], "auto"), (ORDERS[1], "order 2")):
            cells = [gains(rows, order, trace=trace, steps=steps, codec=name) for name in names]
            lines.append("| " + " | ".join([f"{TRACES[trace]}, {steps}, {said}", *cells]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = common.parser(__doc__ or "")
    parser.add_argument("--codec", action="append")
    parser.add_argument("--steps", type=int, action="append")
    parser.add_argument("--show", type=Path, help="print these results instead of measuring")
    args = parser.parse_args()
    if args.show is not None:
        print(table(json.loads(args.show.read_text())["rows"]))
        return
    rows: list[dict[str, Any]] = []
    for trace in TRACES:
        for steps in args.steps or STEPS:
            rows += played(trace, steps, args.codec or list(CODECS))
    print(table(rows))
    common.finish(args.json, {"ranks": "none", "rows": rows})


if __name__ == "__main__":
    main()
