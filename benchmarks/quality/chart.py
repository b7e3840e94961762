"""Error of pictures over the bytes of a request: every codec, preset and parallel method on the digits FLUX.

    R=benchmarks/results/chart.json
    python -m benchmarks.quality.chart --json $R --out docs/images/chart.svg
    python -m benchmarks.quality.chart --from-json $R --out docs/images/chart.svg

Starts torchrun with two ranks by itself, once for each route: ring, Ulysses, and PipeFusion with two patches and one
synchronous step. The same 28 steps and noise seeds everywhere. Bytes are those of a whole request in float32, of both
ranks, keyframes, scales and headers included. Errors are ||x - x_ref|| / ||x_ref|| of the final latents, which are this
model's pictures; the reference are those that diffusers draws in one process, whatever the route. Prints
tables, stores the rows (`--json`) and draws them (`--out`, an SVG, or whatever matplotlib knows by its ending).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import add_json, write_json
from benchmarks.quality import over_seeds
from benchmarks.quality.methods_quality import PASS, STALE
from compactdist import codecs
from compactdist.presets import PRESETS, expand
from compactdist_harness.digits import STEPS, load_digits_pipeline

SEEDS = 3
SHOWN = {"ring": "ring", "ulysses": "Ulysses", "pipefusion": "PipeFusion"}
ROUTES = tuple(SHOWN)
Options = dict[str, Any]
UNCOMPRESSED = "uncompressed"
LADDER = ("binary", "int2", "int4")  # what methods and predictions are shown with
RATES = (0.5, 2, 4)  # beside the default of `transform`, one bit


def built_in() -> list[str]:
    """The ids of the package's own codecs; a program may have registered others."""
    return [name for name in codecs.list() if type(codecs.get(name)).__module__.startswith("compactdist.")]


FAMILIES: dict[str, dict[str, Options]] = {
    "codec": {codec: {"codec": codec} for codec in built_in()},
    "transform": {f"transform:bits={bits}": {"codec": f"transform:bits={bits}"} for bits in RATES}
    | {"transform:bits=0.4, int4 keyframe": {"codec": "transform:bits=0.4", "keyframe": "int4"}},
    "preset": {f"preset {name}": expand({"preset": name}) for name in PRESETS},
    "target": {f"target {said}": {"codec": "rates", "target": said} for said in ("nmse_db=-26", "nmse_db=-32")},
    "order 2": {f"{codec}, order 2": {"codec": codec, "order": 2} for codec in LADDER},
    "order auto": {
        f"{codec}, order auto": {"codec": codec, "order": "auto"}
        for codec in (*LADDER, "transform", *(f"transform:bits={bits}" for bits in RATES))
    },
    "raw keyframe": {f"{codec}, raw keyframe": {"codec": codec, "keyframe": "raw"} for codec in ("binary", "int2")},
    "without": {
        "binary, no layout hint": {"codec": "binary", "layouts": None},
        "binary, no residual": {"codec": "binary", "order": 0},
    },
}
"""Options of ring and Ulysses, by what they have in common."""

DISTRIFUSION: dict[str, Options] = {
    "DistriFusion": {**PASS, **STALE},
    **{f"DistriFusion, {codec}": {"codec": codec, **STALE} for codec in LADDER},
}
PIPEFUSION: dict[str, Options] = {
    "PipeFusion": PASS,
    **{f"PipeFusion, {codec}": {"codec": codec} for codec in (*LADDER, "int8")},
}
OF_ROUTE: dict[str, dict[str, dict[str, Options]]] = {
    "ring": {UNCOMPRESSED: {UNCOMPRESSED: PASS}, **FAMILIES, "DistriFusion": DISTRIFUSION},
    "ulysses": {UNCOMPRESSED: {UNCOMPRESSED: PASS}, **FAMILIES},
    "pipefusion": {"PipeFusion": PIPEFUSION},
}


def settled(options: Options) -> Options:
    """Options with the defaults that presets name, so that equal runs are measured once."""
    return {"keyframe": "int8", "order": 1, **options}


def of_one_process() -> Callable[[Options], Tensor]:
    """Draws the pictures of a call with diffusers alone."""
    pipe, _ = load_digits_pipeline(steps=STEPS)

    @torch.no_grad()
    def draw(call_kwargs: Options) -> Tensor:
        latents: Tensor = pipe(**call_kwargs)[0]
        return latents

    return draw


def be_rank(route: str, seeds: int, path: Path) -> None:
    """Measure a route and write its rows."""
    families = OF_ROUTE[route]
    family_of = {name: family for family, variants in families.items() for name in variants}
    options = {name: settled(own) for variants in families.values() for name, own in variants.items()}
    rows = over_seeds.measure(route, options, seeds, of_one_process())
    if rows:
        write_json(path, {"rows": [{"route": route, "family": family_of[row["variant"]], **row} for row in rows]})
    over_seeds.end_rank()


def measured(routes: list[str], seeds: int, path: Path | None) -> dict[str, Any]:
    """The rows of all routes, with what is needed to judge them; ends the script where a rank fails.

    Args:
        routes: of `ROUTES`.
        seeds: how many.
        path: where they are stored, after every route.
    """
    rows: list[dict[str, Any]] = []
    command = f"python -m benchmarks.quality.chart --seeds {seeds}"
    record = {"command": command, "steps": STEPS, "ranks": over_seeds.RANKS, "torch": torch.__version__, "rows": rows}
    for route in routes:
        with tempfile.TemporaryDirectory() as folder:
            of_route = Path(folder, "rows.json")
            words = ["--rank-of", route, str(of_route), "--seeds", str(seeds)]
            if status := over_seeds.start_ranks("chart", words):
                sys.exit(f"{route}: a rank failed, exit status {status}")
            rows += json.loads(of_route.read_text())["rows"]
        write_json(path, record)
    return record


def table(rows: list[dict[str, Any]], routes: Sequence[str]) -> str:
    """A Markdown table with columns for each of the routes."""
    by_name: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        by_name.setdefault(row["variant"], {})[row["route"]] = row
    heads = [f"{SHOWN[route]}: MB of a request (ratio) | error: median (range)" for route in routes]
    lines = [f"| variant | {' | '.join(heads)} |", "|---|" + "---:|---|" * len(routes)]
    for name, on in by_name.items():
        if any(route in on for route in routes):
            lines.append(f"| {name} | {' | '.join(_cells(on.get(route)) for route in routes)} |")
    return "\n".join(lines)


def _cells(row: dict[str, Any] | None) -> str:
    """Bytes and error of a variant on a route; empty where it was not measured."""
    if row is None:
        return " | "
    return f"{row['wire_bytes'] / 1e6:.2f} ({row['raw_bytes'] / row['wire_bytes']:.2f}) | {over_seeds.spread(row)}"


def tables(rows: list[dict[str, Any]]) -> list[str]:
    """One for routes that send the same tensors by other calls, one for PipeFusion."""
    there = {row["route"] for row in rows}
    columns = [[route for route in routes if route in there] for routes in (ROUTES[:2], ROUTES[2:])]
    return [table(rows, routes) for routes in columns if routes]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--routes", nargs="+", choices=ROUTES, default=list(ROUTES))
    parser.add_argument("--from-json", type=Path, metavar="FILE", help="show these results instead of measuring")
    parser.add_argument("--out", type=Path, metavar="FILE", help="draw them here")
    parser.add_argument("--rank-of", nargs=2, metavar=("ROUTE", "FILE"), help=argparse.SUPPRESS)
    add_json(parser)
    args = parser.parse_args()
    if args.rank_of is not None:
        return be_rank(args.rank_of[0], args.seeds, Path(args.rank_of[1]))
    record = json.loads(args.from_json.read_text()) if args.from_json else measured(args.routes, args.seeds, args.json)
    print("\n\n".join(tables(record["rows"])))
    if args.out:
        from benchmarks.quality import drawing  # matplotlib is in the extra `bench`

        drawing.draw(record["rows"], args.out)
    return None


if __name__ == "__main__":
    main()
