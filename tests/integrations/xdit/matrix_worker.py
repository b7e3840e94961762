"""One column of the compatibility table: pipelines under one parallel configuration. Started by test_matrix.py.

    matrix_worker.py OUT.json COLUMN STEPS MODEL...

The rank with output writes, for every model: latent errors of codec raw and int4 against the uncompressed run, calls
that were compressed, ratio, state, and whether a second request repeats the first bit for bit.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from compactdist_harness.cpu import xdit as xdit_on_cpu
from compactdist_xdit import enable

torch.set_num_threads(1)
os.environ.setdefault("LOG_LEVEL", "error")
xdit_on_cpu.install()
from compactdist_harness.xdit import parallel_tiny  # noqa: E402

COLUMNS: dict[str, dict[str, Any]] = {
    "ulysses 2": {"ulysses_degree": 2},
    "ring 2": {"ring_degree": 2},
    "pipefusion 2": {"pipefusion_parallel_degree": 2, "num_pipeline_patch": 2, "warmup_steps": 1},
    "pipefusion 2, raw keyframes": {"pipefusion_parallel_degree": 2, "num_pipeline_patch": 2, "warmup_steps": 1},
    "cfg 2": {"use_cfg_parallel": True},
    "ulysses 2 x ring 2": {"ulysses_degree": 2, "ring_degree": 2},
    "ring 4": {"ring_degree": 4},
}
OPTIONS: dict[str, dict[str, Any]] = {"cfg 2": {"routes": "cfg"}, "pipefusion 2, raw keyframes": {"keyframe": "raw"}}


def draw(pipe: Any, call_kwargs: dict[str, Any]) -> torch.Tensor | None:
    result = pipe(**call_kwargs)
    while result is not None and not torch.is_tensor(result):  # tuples, and outputs that hold a list
        result = result[0]
    return None if result is None else result.clone()


def relative(a: torch.Tensor | None, b: torch.Tensor | None) -> float:
    return -1.0 if a is None or b is None else float((a - b).norm() / b.norm())


def cell(model: str, column: str, steps: int) -> dict[str, Any]:
    pipe, call_kwargs = parallel_tiny(model, steps=steps, **COLUMNS[column])
    plain = draw(pipe, call_kwargs)
    record: dict[str, Any] = {}
    for codec in ("raw", "int4"):
        with enable(pipe, codec=codec, min_numel=256, **OPTIONS.get(column, {})) as handle:
            first, second = draw(pipe, call_kwargs), draw(pipe, call_kwargs)
            stats = list(handle.stats().values())
            counted = torch.tensor(
                [
                    sum(getattr(s, name) for s in stats)
                    for name in ("compressed_calls", "raw_bytes", "wire_bytes", "state_bytes")
                ]
            )
            dist.all_reduce(counted)
            calls, raw, wire, state = counted.tolist()
            record[codec] = {
                "error": relative(first, plain),
                "repeats": relative(second, first) == 0.0,
                "calls": calls,
                "ratio": raw / wire,
                "state_bytes": state // dist.get_world_size(),
                "explain": handle.explain(),
            }
    record["plain again"] = relative(draw(pipe, call_kwargs), plain)
    record["output"] = plain is not None
    return record


def main() -> None:
    out, column, steps, models = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4:]
    records: dict[str, Any] = {}
    for model in models:
        try:
            records[model] = cell(model, column, steps)
        except Exception as error:
            records[model] = {"failed": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
            break  # the ranks may be at different places now
    gathered: list[Any] = [None] * dist.get_world_size()
    if not any("failed" in r for r in records.values()):
        dist.all_gather_object(gathered, records)
    else:
        gathered = [records]
    best = {
        model: next((g[model] for g in reversed(gathered) if g and g.get(model, {}).get("output")), records[model])
        for model in records
    }
    if dist.get_rank() == 0 or "failed" in str(best)[:200]:
        out.write_text(json.dumps(best, indent=1))
    sys.exit(records[model].get("trace"))  # other ranks may wait for one that failed


main()
