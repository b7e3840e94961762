"""Image error of the parallel methods and codecs on the digits FLUX, over several noise seeds.

    python -m benchmarks.quality.methods_quality --seeds 4 --json benchmarks/results/methods_quality.json
    python -m benchmarks.quality.methods_quality --show benchmarks/results/methods_quality.json

Starts torchrun with two ranks by itself. For every seed the uncompressed ring is the reference; prints median and range
of ||x - x_ref|| / ||x_ref|| of the final latents (which are this model's pictures) over the seeds, and the bytes that
the ring's gathers put on the link. All methods and codecs warm up for one step. Below the table some variants are
compared seed by seed. `--show` prints stored results again.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.quality import over_seeds
from compactdist import Rule
from compactdist_harness.demo_worker import pass_everything
from compactdist_harness.digits import STEPS

LAST = STEPS - 1
PASS: dict[str, Any] = {"codec": "raw", "policy": pass_everything}
STALE: dict[str, Any] = {"parallel_method": "distrifusion", "method_warmup_steps": 1}
LAST_SYNC: dict[str, Any] = {**STALE, "method_sync_from_step": LAST}


def last_step(codec: str) -> Rule:
    """The policy of another codec in the last step, whose number is known from the number of steps."""
    return Rule(codec, first_step=LAST)


VARIANTS: dict[str, dict[str, Any]] = {
    "DistriFusion": {**PASS, **STALE},
    "DistriFusion, last step synchronous": {**PASS, **LAST_SYNC},
    "ring, int4": {"codec": "int4"},
    "ring, int2": {"codec": "int2"},
    "ring, binary": {"codec": "binary"},
    "ring, int2, last step int8": {"codec": "int2", "policy": last_step("int8")},
    "ring, int2, last step raw": {"codec": "int2", "policy": last_step("raw")},
    "ring, binary, last step int8": {"codec": "binary", "policy": last_step("int8")},
    "ring, binary, last step raw": {"codec": "binary", "policy": last_step("raw")},
    "patch": {**PASS, "parallel_method": "patch"},
    "patch, int2": {"codec": "int2", "parallel_method": "patch"},
    "patch, int2, own chunk as others see it": {"codec": "int2", "parallel_method": "patch", "exact_own": False},
    "DistriFusion, int4": {"codec": "int4", **STALE},
    "DistriFusion, int2": {"codec": "int2", **STALE},
    "DistriFusion, binary": {"codec": "binary", **STALE},
    "DistriFusion, int2, last step synchronous": {"codec": "int2", **LAST_SYNC},
}

PAIRS = [
    ("DistriFusion", "ring, binary"),
    ("DistriFusion", "ring, int2"),
    ("DistriFusion, int4", "DistriFusion"),
    ("DistriFusion, int2", "DistriFusion"),
    ("DistriFusion, last step synchronous", "DistriFusion"),
    ("ring, int2, last step raw", "ring, int2"),
    ("ring, int2, last step int8", "ring, int2"),
    ("ring, binary, last step raw", "ring, binary"),
    ("patch, int2, own chunk as others see it", "patch, int2"),
]


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table, the smallest median first."""
    return over_seeds.table(sorted(rows, key=lambda row: row["median"]))


def paired(rows: list[dict[str, Any]], pairs: Sequence[tuple[str, str]] = tuple(PAIRS)) -> str:
    """Errors of one variant over those of another at the same noise: median (range) over the seeds."""
    errors = {row["variant"]: row["errors"] for row in rows}
    lines = []
    for one, other in pairs:
        if not {one, other} <= errors.keys():  # not asked for
            continue
        ratios = [a / b for a, b in zip(errors[one], errors[other], strict=True)]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        lines.append(f"| {one} | {other} | {spread} |")
    return "\n".join(["| error of | over error of | ratio: median (range) |", "|---|---|---|", *lines])


def show(rows: list[dict[str, Any]]) -> str:
    """Both tables."""
    return f"{table(rows)}\n\n{paired(rows)}"


if __name__ == "__main__":
    over_seeds.main(__doc__ or "", "methods_quality", "ring", VARIANTS, 4, show)
