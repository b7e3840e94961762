"""Order "auto" beside orders 1 and 2, for every site of recorded traces, as `compactdist evaluate` plays them.

    python -m benchmarks.quality.adaptive_order --json benchmarks/results/adaptive_order.json

Errors are means of ||x - x_hat|| / ||x|| over the frames after the keyframe, in dB; gains are in dB below order 1.
"""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks import common
from compactdist import codecs
from compactdist.cli.evaluate import Setting, play_sites, recorded
from compactdist.cli.score import Score
from compactdist.observe.trace import Trace
from compactdist.state import Order, StreamConfig

TRACES = ("digits_ring", "photos_dit")
CODECS = ("binary", "int2", "int4", "lowrank_int4", "transform:bits=0.5", "transform:bits=1", "transform:bits=2")
STEPS = (28, 8, 4)
ORDERS: tuple[Order, ...] = (1, 2, "auto")
FOLDER = Path(__file__).parents[1] / "traces"


def played(trace: str, steps: int, names: list[str]) -> list[dict[str, object]]:
    """One row for each codec and site: its error by order."""
    rows: list[dict[str, object]] = []
    for entry in recorded(Trace(FOLDER / f"{trace}.safetensors"), steps, 1):
        for name in names:
            row: dict[str, object] = {"trace": trace, "steps": steps, "codec": name, "site": entry.site}
            for order in ORDERS:
                score = Score()
                play_sites(score, Setting(codecs.get(name), StreamConfig(order, find_layout=False)), [entry])
                row[f"order_{order}_db"] = 20 * float(torch.tensor(score.residuals.rel_error).log10())
            rows.append(row)
    return rows


def main() -> None:
    parser = common.parser(__doc__ or "")
    parser.add_argument("--codec", action="append")
    parser.add_argument("--steps", type=int, action="append")
    args = parser.parse_args()
    names, rows = args.codec or list(CODECS), []
    for trace in TRACES:
        for steps in args.steps or STEPS:
            rows += played(trace, steps, names)
            for name in names:
                mine = [row for row in rows if (row["trace"], row["steps"], row["codec"]) == (trace, steps, name)]
                gains = {
                    order: [float(str(row["order_1_db"])) - float(str(row[f"order_{order}_db"])) for row in mine]
                    for order in (2, "auto")
                }
                text = "; ".join(f"{o}: {min(g):+.2f} to {max(g):+.2f}" for o, g in gains.items())
                print(f"{trace} {steps} {name}: dB below order 1 on {len(mine)} sites, order {text}")
    common.finish(args.json, {"rows": rows})


if __name__ == "__main__":
    main()
