"""What was asked of ``target=`` and what was met.

    python -m benchmarks.quality.targets --json benchmarks/results/targets.json
    python -m benchmarks.quality.targets --show benchmarks/results/targets.json
    python -m benchmarks.quality.targets --rungs trellis --json benchmarks/results/targets_trellis.json

Plays the committed traces, step by step and frame by frame, and a request whose prompt changes half-way: half of the
steps of every site, then as many of another site of the trace. Of that request it is also played what is met where the
caller says that the prompt changes, by ``reset()``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import add_json, write_json
from compactdist import codecs
from compactdist.cli.evaluate import Played, Recorded, Setting, play_sites, recorded
from compactdist.cli.score import Score
from compactdist.codecs.rates import LADDERS
from compactdist.observe.trace import Trace
from compactdist.state import RateControl, StreamConfig, Target

TRACES = Path(__file__).parents[1] / "traces"
TARGETS = ("nmse_db=-26", "nmse_db=-32", "bits=0.6", "bits=1.5")


def halves(entries: list[Recorded]) -> tuple[list[Recorded], list[Recorded]]:
    """Half of the steps of every site, and as many of another one."""
    others = [*entries[1:], entries[0]]
    first = [Recorded(one.site, one.x[: len(one.x) // 2], one.groups) for one in entries]
    return first, [
        Recorded(one.site, other.x[len(one.x) // 2 :], one.groups) for one, other in zip(entries, others, strict=True)
    ]


def changed(entries: list[Recorded]) -> list[Recorded]:
    """The sites of a request whose prompt changes half-way."""
    both = zip(*halves(entries), strict=True)
    return [Recorded(one.site, torch.cat([one.x, other.x]), one.groups) for one, other in both]


def with_a_reset(entries: list[Recorded], setting: Setting) -> dict[str, Any]:
    """What is met over both halves, with ``reset()`` between them."""
    assert setting.target is not None
    score, control = Score(), RateControl(setting.target)
    for half in halves(entries):
        control.restart()
        play_sites(score, setting, half, control=control)
    residuals, bits = score.residuals, score.request.bits_per_element
    met = {"nmse_db": residuals.nmse_db, "bits": residuals.bits_per_element, "request_bits": bits}
    return {"asked": str(setting.target), **met}


def play(entries: list[Recorded], setting: Setting) -> dict[str, Any]:
    """One request."""
    score = Score()
    keyframes: list[bool] = []
    rates: set[int] = set()

    def watch(frame: Played) -> None:
        keyframes.append(frame.keyframe)
        rates.add(frame.rate)

    play_sites(score, setting, entries, watch)
    assert score.met is not None
    return score.met.to_dict() | {"keyframes": sum(keyframes), "rates": sorted(rates - {0})}


def table(results: dict[str, Any]) -> str:
    """A Markdown table, a column for each request."""
    names = " | ".join(results).replace("digits_ring", "digits").replace("photos_dit", "photographs")
    lines = [f"| asked | {names} |", "|---|" + "---:|" * len(results)]
    for target in TARGETS:
        cells = [_cell(rows[target]) for rows in results.values()]
        lines.append("| " + " | ".join([f"`{target}`", *cells]) + " |")
    return "\n".join(lines)


def _cell(row: dict[str, Any]) -> str:
    """What was met; in brackets the bits of the whole request, keyframes included."""
    if row["asked"].startswith("bits"):
        return f"{row['bits']:.2f} ({row['request_bits']:.2f}), {row['nmse_db']:.1f} dB"
    return f"{row['nmse_db']:.2f}, {row['bits']:.2f} bits ({row['request_bits']:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_json(parser)
    parser.add_argument("--show", type=Path, help="print these results instead of measuring")
    parser.add_argument("--rungs", choices=LADDERS, default="transform", help="of codec rates (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.show is not None:
        print(table(json.loads(arguments.show.read_text())))
        return
    codec, config = codecs.get("rates", rungs=arguments.rungs), StreamConfig(find_layout=False)
    results: dict[str, Any] = {}
    for trace in ("digits_ring", "photos_dit"):
        entries = list(recorded(Trace(TRACES / f"{trace}.safetensors"), None, 1))
        requests: dict[str, Callable[[Setting], dict[str, Any]]] = {
            trace: partial(play, entries),
            f"{trace}, changed half-way": partial(play, changed(entries)),
            f"{trace}, the same with `reset()`": partial(with_a_reset, entries),
        }
        for name, request in requests.items():
            rows = results[name] = {}
            for target in TARGETS:
                row = rows[target] = request(Setting(codec, config, Target.parse(target)))
                print(f"{name}: {target}: " + ", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
            write_json(arguments.json, results)


if __name__ == "__main__":
    main()
