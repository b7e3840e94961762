"""What was asked of ``target=`` and what was met: ``python -m benchmarks.quality.targets --json FILE``.

Plays the committed traces, step by step and frame by frame, and a request whose prompt changes half-way: half of the
steps of every site, then as many of another site of the trace. Of that request the error is also given without the one
step of the change, the size of whose frames was announced before.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import add_json, write_json
from compactdist import codecs
from compactdist.cli.evaluate import Recorded, Setting, recorded
from compactdist.observe.trace import Trace
from compactdist.state import RateControl, StreamConfig, StreamDecoder, StreamEncoder, Target

TRACES = Path(__file__).parents[1] / "traces"
TARGETS = ("nmse_db=-26", "nmse_db=-32", "bits=0.6", "bits=1.5")


def changed(entries: list[Recorded]) -> list[Recorded]:
    """The sites of a request whose prompt changes half-way."""
    made = []
    for entry, other in zip(entries, [*entries[1:], entries[0]], strict=True):
        half = len(entry.x) // 2
        made.append(Recorded(entry.site, torch.cat([entry.x[:half], other.x[half:]]), entry.groups))
    return made


@torch.no_grad()
def play(entries: list[Recorded], setting: Setting, cut: int) -> dict[str, Any]:
    """One request; ``cut``: the step of the change, 0 for none."""
    assert setting.target is not None
    control, config, codec = RateControl(setting.target), setting.config, setting.codec
    ends = [(StreamEncoder(config, 0, entry.site), StreamDecoder(config, 0, entry.site)) for entry in entries]
    for (encoder, _), entry in zip(ends, entries, strict=True):
        encoder.steers = control.stream((entry.site, 0))
    error = energy = 0.0
    keyframes, rates = 0, set()
    for step in range(len(entries[0].x)):
        for (encoder, decoder), entry in zip(ends, entries, strict=True):
            flat = entry.x[step].reshape(-1)
            keyframe = encoder.is_fresh(flat.numel(), flat.dtype)
            staged = encoder.stage(flat, codec, keyframe=keyframe, step=step)
            encoder.commit(staged, entry.hint)
            value = decoder.decode(staged.frame, codec, flat.numel(), flat.dtype, step=step, hint=entry.hint)
            keyframes += keyframe
            rates.add(staged.header.rate)
            if step and step != cut:
                error += float((value.double() - flat.double()).square().sum())
                energy += float(flat.double().square().sum())
    made = control.met().to_dict() | {"keyframes": keyframes, "rates": sorted(rates - {0})}
    return made | ({"nmse_db_without_the_change": 10 * math.log10(error / energy)} if cut else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_json(parser)
    arguments = parser.parse_args()
    codec, config = codecs.get("rates"), StreamConfig(find_layout=False)
    results: dict[str, Any] = {}
    for trace in ("digits_ring", "photos_dit"):
        entries = list(recorded(Trace(TRACES / f"{trace}.safetensors"), None, 1))
        half = len(entries[0].x) // 2
        for name, request, cut in ((trace, entries, 0), (f"{trace}, changed half-way", changed(entries), half)):
            rows = results[name] = {}
            for target in TARGETS:
                row = rows[target] = play(request, Setting(codec, config, Target.parse(target)), cut)
                shown = ", ".join(f"{k} {v:.3f}" for k, v in row.items() if isinstance(v, float))
                print(f"{name}: {target}: {shown}, {row['keyframes']} keyframes, rates {row['rates']}", flush=True)
            write_json(arguments.json, results)


if __name__ == "__main__":
    main()
