"""CompactFusion's encoders and ours on the recorded trace, at the same bits.

    python -m benchmarks.quality.reference_quality --json benchmarks/results/reference_quality.json

The trace is played through the closed loop of order 1 (error feedback, the first step sent as it is, bases in the
trace's float16) with the encoders of ``reference_formulas.py`` and with our codecs. K and V are matrices of their own,
[102, 128], in both. NMSE is error energy over energy, all steps but the first, all sites. Bits count scales, and for
ours the frame's header of 128 bytes, which is 0.04 of a bit at this size. As the two sides still differ by some
hundredths of a bit, the gain is also given at the same bits, one bit being worth 6.02 dB. Matrices this small cannot
have CompactFusion's rank 32 for a hundredth of their size: the low-rank rows compare equal ranks, not the ratio.

The second table is about size alone: compression at the FLUX cell [1088, 3072] in 16 bits, our header counted; theirs
have none.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import add_json, finish
from benchmarks.quality import reference_formulas as theirs
from compactdist import codecs
from compactdist.cli.evaluate import play
from compactdist.observe.trace import Trace
from compactdist.state import StreamConfig
from compactdist.wire import HEADER_NBYTES

TRACE = Path(__file__).parents[1] / "traces/digits_ring.safetensors"
FLUX_CELL = (1088, 3072)
Formula = Callable[[Tensor, torch.Generator], tuple[Tensor, int]]

FORMULAS: dict[str, tuple[Formula, dict[str, Any]]] = {
    "binary": (lambda r, g: theirs.binary(r), {"id": "binary"}),
    "int2": (lambda r, g: theirs.int2(r), {"id": "int2"}),
    "int4": (lambda r, g: theirs.int4(r), {"id": "int4"}),
    "low-rank 8": (lambda r, g: theirs.lowrank(r, 8, g), {"id": "lowrank", "rank": 8}),
    "low-rank int4, 32": (lambda r, g: theirs.lowrank_int4(r, 32, g), {"id": "lowrank_int4", "rank": 32}),
    "low-rank int4, 32; ours by energy": (
        lambda r, g: theirs.lowrank_int4(r, 32, g),
        {"id": "lowrank_int4", "rank": 32, "allocation": "energy"},
    ),
}
PUBLISHED_RATIOS = {"binary": 15.69, "int2": 7.92, "lowrank_int4": 100.05}


class _Sites(Trace):
    """The first sites of a trace."""

    def __init__(self, path: Path, count: int | None) -> None:
        super().__init__(path)
        self.sites = self.sites[:count]


def _play_formula(trace: Trace, formula: Formula) -> tuple[float, float]:
    """Bits for each element, and NMSE in dB."""
    bits = elements = 0
    error = energy = 0.0
    generator = torch.Generator().manual_seed(0)
    for site in trace.sites:
        x = trace.load(site)
        for part in x.chunk(trace.groups(site, x.shape[1]), 1):
            base = part[0]
            for value in part[1:]:
                decoded, cost = formula(value.float() - base.float(), generator)
                base = (base.float() + decoded).to(x.dtype)
                bits, elements = bits + cost, elements + value.numel()
                error += float((base.double() - value.double()).square().sum())
                energy += float(value.double().square().sum())
    return bits / elements, 10 * math.log10(error / energy)


def rows(sites: int | None = None, names: tuple[str, ...] = tuple(FORMULAS)) -> list[dict[str, Any]]:
    """One line for each pair of encoders.

    Args:
        sites: How many of the trace's sites to play; ``None`` for all.
        names: Which pairs.
    """
    trace = _Sites(TRACE, sites)
    scores = play(trace, {name: codecs.get(FORMULAS[name][1]) for name in names}, StreamConfig(order=1, keyframe=None))
    lines = []
    for name in names:
        bits, nmse = _play_formula(trace, FORMULAS[name][0])
        ours = scores[name].residuals
        header = 8 * HEADER_NBYTES * ours.frames / ours.elements
        lines.append(
            {
                "codec": name,
                "their_bits": round(bits, 3),
                "our_bits": round(ours.bits_per_element, 3),
                "our_header_bits": round(header, 3),
                "their_nmse_db": round(nmse, 2),
                "our_nmse_db": round(ours.nmse_db, 2),
                "gain_db": round(nmse - ours.nmse_db, 2),
                "gain_at_same_bits_db": round(
                    nmse - ours.nmse_db + 20 * math.log10(2) * (bits - ours.bits_per_element), 2
                ),
            }
        )
    return lines


def ratios() -> list[dict[str, Any]]:
    """Compression at the FLUX cell."""
    raw = 2 * math.prod(FLUX_CELL)
    return [
        {
            "codec": codec_id,
            "theirs": published,
            "ours": round(raw / (codecs.get(codec_id).payload_nbytes(FLUX_CELL, torch.float16) + HEADER_NBYTES), 2),
        }
        for codec_id, published in PUBLISHED_RATIOS.items()
    ]


def table(lines: list[dict[str, Any]], sizes: list[dict[str, Any]]) -> str:
    """Both tables as Markdown."""
    text = [
        "| codec | bits theirs | bits ours (header) | NMSE dB theirs | NMSE dB ours | gain dB | at the same bits |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    text += [
        f"| {line['codec']} | {line['their_bits']:.3f} | {line['our_bits']:.3f} ({line['our_header_bits']:.3f}) "
        f"| {line['their_nmse_db']:.2f} | {line['our_nmse_db']:.2f} | {line['gain_db']:.2f} "
        f"| {line['gain_at_same_bits_db']:.2f} |"
        for line in lines
    ]
    text += ["", "| codec at [1088, 3072] | ratio theirs | ratio ours |", "|---|---:|---:|"]
    text += [f"| `{size['codec']}` | {size['theirs']:.2f} | {size['ours']:.2f} |" for size in sizes]
    return "\n".join(text)


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_json(made)
    args = made.parse_args()
    torch.set_num_threads(1)
    lines, sizes = rows(), ratios()
    print(table(lines, sizes))
    finish(args.json, {"ranks": "none", "trace": TRACE.name, "rows": lines, "ratios": sizes})


if __name__ == "__main__":
    main()
