"""Image error of calls answered with their prediction, beside DistriFusion's staleness, on the digits FLUX.

    python -m benchmarks.quality.predict_now --json benchmarks/results/predict_now.json
    python -m benchmarks.quality.predict_now --show benchmarks/results/predict_now.json

Starts torchrun with two ranks by itself. Patch parallelism gathers the keys and values of every attention once; it
waits for them, or attends to what was predicted (`mode="predict-now"`), or to those of the step before (DistriFusion).
For every seed the uncompressed ring is the reference; all of it is float32. Errors are ||x - x_ref|| / ||x_ref|| of the
final latents. All methods and codecs warm up for one step. Below the table some variants are compared seed by seed.
"""

from __future__ import annotations

from typing import Any

from benchmarks.quality import over_seeds
from benchmarks.quality.methods_quality import LAST, LAST_SYNC, PASS, STALE, paired, table
from compactdist import Rule

PATCH: dict[str, Any] = {"parallel_method": "patch"}
NOW: dict[str, Any] = {**PATCH, "mode": "predict-now"}
ORDERS: tuple[Any, ...] = (1, 2, "auto")
LAST_WAITS = Rule(None, op="all_gather", first_step=LAST, mode="wait")

VARIANTS: dict[str, dict[str, Any]] = {
    "DistriFusion": {**PASS, **STALE},
    "DistriFusion, last step waits": {**PASS, **LAST_SYNC},
    "DistriFusion, int4": {"codec": "int4", **STALE},
    "DistriFusion, binary": {"codec": "binary", **STALE},
    **{
        f"{codec}, order {order}, {how}": {"codec": codec, "order": order, **options}
        for codec in ("int4", "binary")
        for order in ORDERS
        for how, options in (("waits", PATCH), ("predicts", NOW))
    },
    "int4, order auto, predicts, last step waits": {"codec": "int4", "order": "auto", **NOW, "policy": LAST_WAITS},
    "binary, order auto, predicts, last step waits": {"codec": "binary", "order": "auto", **NOW, "policy": LAST_WAITS},
}

PAIRS = [
    *((f"{codec}, order {order}, predicts", "DistriFusion") for codec in ("int4", "binary") for order in ORDERS),
    *((f"{codec}, order auto, predicts", f"DistriFusion, {codec}") for codec in ("int4", "binary")),
    *((f"{codec}, order auto, predicts", f"{codec}, order auto, waits") for codec in ("int4", "binary")),
    *(
        (f"{codec}, order auto, predicts, last step waits", f"{codec}, order auto, predicts")
        for codec in ("int4", "binary")
    ),
]


def show(rows: list[dict[str, Any]]) -> str:
    """Both tables."""
    return f"{table(rows)}\n\n{paired(rows, PAIRS)}"


if __name__ == "__main__":
    over_seeds.main(__doc__ or "", "predict_now", "ring", VARIANTS, 3, show)
