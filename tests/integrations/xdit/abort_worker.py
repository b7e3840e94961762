"""Requests that are broken off, and the requests after them. Started by test_abort.py: abort_worker.py OUT.json PART.

PART `all`: every rank breaks off in the same step, and xfuser keeps its groups. PART `one`: one rank breaks off, the
other one's receive times out, and xfuser's groups are made anew.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from compactdist_harness.cpu import xdit as xdit_on_cpu
from compactdist_xdit import enable
from tests.integrations.xdit.ranks import hand_in

torch.set_num_threads(1)
os.environ.setdefault("LOG_LEVEL", "error")
xdit_on_cpu.install()
from xfuser.core.distributed import initialize_runtime_state, parallel_state  # noqa: E402

from compactdist_harness.xdit import engine, tiny_under  # noqa: E402

STEPS, LAST = 6, 2  # the step in which a request is broken off
TIMEOUT = timedelta(seconds=8)
ROUTES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # xfuser's degrees, options of enable
    "ring": ({"ring_degree": 2}, {}),
    "ulysses": ({"ulysses_degree": 2}, {}),
    "distrifusion": ({"ring_degree": 2}, {"parallel_method": "distrifusion"}),
    "pipefusion": ({"pipefusion_parallel_degree": 2, "num_pipeline_patch": 2, "warmup_steps": 1}, {}),
}


class BrokenOff(Exception):
    pass


def break_off(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    if step == LAST:
        raise BrokenOff
    return {}


def draw(pipe: Any, call_kwargs: dict[str, Any], **more: Any) -> torch.Tensor | None:
    result = pipe(**call_kwargs, **more)
    return None if result is None else result[0].clone()


def same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    return a is None or b is None or torch.equal(a, b)


def ended_by(pipe: Any, call_kwargs: dict[str, Any], **more: Any) -> str:
    """The error that ends a request."""
    try:
        draw(pipe, call_kwargs, **more)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


@contextlib.contextmanager
def short_timeouts() -> Iterator[None]:
    """Groups made in this block give up early."""
    with mock.patch("torch.distributed.distributed_c10d.default_pg_timeout", TIMEOUT):
        yield


def make_anew(pipe: Any, engine_config: Any) -> None:
    dist.barrier()
    parallel_state.destroy_model_parallel()
    initialize_runtime_state(pipe.module, engine_config)


def measure(route: str, part: str) -> dict[str, Any]:
    degrees, options = ROUTES[route]
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    engine_config = engine("tiny", STEPS, **degrees)
    pipe, call_kwargs = tiny_under(engine_config, "flux", steps=STEPS)
    seen: dict[str, Any] = {}
    with enable(pipe, codec="int4", min_numel=1, **options) as handle:
        fresh = draw(pipe, call_kwargs)
        if part == "all":
            seen["ended"] = ended_by(pipe, call_kwargs, callback_on_step_end=break_off)
        else:
            with short_timeouts():
                make_anew(pipe, engine_config)
            callback = break_off if dist.get_rank() == 1 else None
            seen["ended"] = ended_by(pipe, call_kwargs, callback_on_step_end=callback)
            if route == "pipefusion":
                dist.barrier()
                seen["with the same groups"] = ended_by(pipe, call_kwargs)
            make_anew(pipe, engine_config)
        seen["next"] = [same(draw(pipe, call_kwargs), fresh) for _ in range(2)]
        seen["compressed calls"] = sum(stats.compressed_calls for stats in handle.stats().values())
    return seen


part = sys.argv[2]
routes = ("ring", "ulysses", "distrifusion") if part == "all" else ("ring", "pipefusion")
hand_in({route: measure(route, part) for route in routes}, Path(sys.argv[1]))
