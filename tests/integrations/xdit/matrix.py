"""The compatibility table: runs its columns and renders docs/integrations.md.

python -m tests.integrations.xdit.matrix            # every column, about three minutes
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from tests.integrations.xdit.ranks import run_worker
from tests.scripts import ROOT

JSON = ROOT / "benchmarks" / "results" / "integrations.json"
PAGE = ROOT / "docs" / "integrations.md"
START, END = "<!-- table: python -m tests.integrations.xdit.matrix -->", "<!-- end of table -->"
STEPS = 8  # of the page
ALL = ("flux", "sd3", "pixart", "cogvideox", "wan")
COLUMNS: dict[str, tuple[int, tuple[str, ...]]] = {  # ranks, models
    "ulysses 2": (2, ALL),
    "ring 2": (2, ALL),
    "pipefusion 2": (2, ("flux", "pixart")),
    "pipefusion 2, raw keyframes": (2, ("flux", "pixart")),
    "cfg 2": (2, ("sd3", "pixart", "cogvideox")),
    "ulysses 2 x ring 2": (4, ("flux",)),
    "ring 4": (4, ("flux",)),
}
MORE: dict[str, tuple[str, ...]] = {  # further models of a column
    "ulysses 2": ("hunyuandit", "latte", "pixart_sigma", "lumina2", "flux2", "qwenimage", "hunyuanvideo"),
    "ring 2": ("hunyuandit", "latte", "pixart_sigma", "flux2", "qwenimage", "hunyuanvideo"),
    "pipefusion 2": ("pixart_sigma",),
    "cfg 2": ("hunyuandit", "pixart_sigma", "lumina2"),
}

# What the adapter sends otherwise than with the codec named: `integrations/xdit/fine.py`.
LABELS = {
    "cfg 2": "cfg 2, sent as int8",
    "pipefusion 2": "pipefusion 2, in part as int8",
    "pipefusion 2, raw keyframes": "pipefusion 2, in part as int8, raw keyframes",
}


def run(column: str, models: tuple[str, ...], steps: int = STEPS) -> dict[str, Any]:
    """The records of one column, by model, each of requests of so many steps; raises if a rank failed."""
    ranks, _ = COLUMNS[column]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out.json")
        run_worker("matrix_worker.py", out, column, str(steps), *models, ranks=ranks, timeout=240)
        records: dict[str, Any] = json.loads(out.read_text())
    assert set(records) == set(models), records
    return records


def run_more(column: str, steps: int = STEPS) -> dict[str, Any]:
    """The records of the column's further models."""
    return run(column, MORE[column], steps) if column in MORE else {}


def render(records: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| pipeline | route | runs | latent error, raw | latent error, int4 | ratio, int4 | state, int4 | calls |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for column, models in records.items():
        for model, record in models.items():
            raw, int4, route = record["raw"], record["int4"], LABELS.get(column, column)
            lines.append(
                f"| {model} | {route} | yes | {raw['error']:.0e} | {int4['error']:.1e} | {int4['ratio']:.2f} |"
                f" {int4['state_bytes'] / 1024:.0f} KiB | {int4['calls']} |"
            )
    return "\n".join(lines)


def main() -> None:
    records = {column: run(column, models) | run_more(column) for column, (_, models) in COLUMNS.items()}
    for models in records.values():
        for record in models.values():
            for codec in ("raw", "int4"):
                del record[codec]["explain"]
    JSON.write_text(
        json.dumps({"command": "python -m tests.integrations.xdit.matrix", "columns": records}, indent=1) + "\n"
    )
    before, _, rest = PAGE.read_text().partition(START)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{START}\n\n{render(records)}\n\n{END}{after}")


if __name__ == "__main__":
    main()
