"""Groups that xfuser makes after `enable`, or makes anew. Started by test_regroup.py: regroup_worker.py OUT.json.

Every rank writes what it saw; a rank without output has no latents to compare and says True.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import compactdist
from compactdist_harness.cpu import xdit as xdit_on_cpu
from compactdist_harness.tiny import build
from compactdist_xdit import enable
from tests.integrations.xdit.ranks import hand_in

torch.set_num_threads(1)
os.environ.setdefault("LOG_LEVEL", "error")
xdit_on_cpu.install()
from diffusers import FlowMatchEulerDiscreteScheduler  # noqa: E402
from xfuser import xFuserArgs  # noqa: E402
from xfuser.core.distributed import initialize_runtime_state, parallel_state  # noqa: E402
from xfuser.model_executor.pipelines.register import xFuserPipelineWrapperRegister  # noqa: E402
from yunchang.globals import PROCESS_GROUP  # noqa: E402

STEPS = 4
PIPEFUSION = {"pipefusion_parallel_degree": 2, "num_pipeline_patch": 2, "warmup_steps": 1}


WARM = {"warmup_steps": 2}  # keyframes that only a clock can count


def config(**degrees: Any) -> Any:
    # the only CPU kernel that rings can merge; the others may use it too
    arguments = xFuserArgs(model="tiny", attention_backend="SDPA_FLASH", num_inference_steps=STEPS, **degrees)
    engine_config, _ = arguments.create_config()
    engine_config.runtime_config.dtype = torch.float32
    return engine_config


def wrapped_by_xfuser(pipe: Any, engine_config: Any) -> Any:
    return xFuserPipelineWrapperRegister.get_class(pipe)(pipeline=pipe, engine_config=engine_config)


def make_anew(pipe: Any, engine_config: Any) -> None:
    """Destroy xfuser's groups and make others."""
    parallel_state.destroy_model_parallel()
    initialize_runtime_state(getattr(pipe, "module", pipe), engine_config)


def draw(pipe: Any, call_kwargs: dict[str, Any]) -> torch.Tensor | None:
    result = pipe(**call_kwargs)
    return None if result is None else result[0].clone()


def same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    return a is None or b is None or torch.equal(a, b)


def counted(handle: Any) -> dict[str, list[int]]:
    return {route: [s.compressed_calls, s.passed_through] for route, s in handle.stats().items()}


def enabled_first(seen: dict[str, Any]) -> None:
    """`enable` while there are no groups, not even torch's, on a pipeline that xfuser has not seen."""
    pipe, call_kwargs = build("flux", steps=STEPS)
    early = enable(pipe, codec="int4", **WARM)
    seen["no groups yet"] = not dist.is_initialized() and early.groups == {}
    engine_config = config(ring_degree=2)
    parallel = wrapped_by_xfuser(pipe, engine_config)
    first, second = draw(parallel, call_kwargs), draw(parallel, call_kwargs)
    seen["early"] = counted(early)
    seen["early steps"] = early.groups["ring"].current_step
    seen["early repeats"] = same(first, second)
    seen["early sites"] = sorted(early.stats()["ring"].sites)
    early.disable()
    uncompressed = draw(parallel, call_kwargs)
    with enable(parallel, codec="int4", **WARM) as late:
        seen["early is late"] = same(draw(parallel, call_kwargs), first)
        seen["late"] = counted(late)
        seen["late sites"] = sorted(late.stats()["ring"].sites)
    seen["early is compressed"] = first is None or not same(first, uncompressed)

    # a scheduler given to the pipeline after enable
    with enable(parallel, codec="int4", **WARM) as handle:
        parallel.module.scheduler = FlowMatchEulerDiscreteScheduler.from_config(parallel.scheduler.config)
        again = draw(parallel, call_kwargs), draw(parallel, call_kwargs)
        seen["other scheduler, calls"] = counted(handle)
    with enable(parallel, codec="int4", **WARM):
        fresh = draw(parallel, call_kwargs)
        seen["other scheduler"] = same(again[0], fresh) and same(again[1], fresh)


def remade(seen: dict[str, Any], degrees: dict[str, Any], routes: str | None, name: str) -> None:
    """Groups made anew between the requests of one handle."""
    engine_config = config(**degrees)
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    pipe, call_kwargs = build("flux", steps=STEPS)
    parallel = wrapped_by_xfuser(pipe, engine_config)
    uncompressed = draw(parallel, call_kwargs)
    handle = enable(parallel, codec="int4", routes=routes, min_numel=1)
    first = draw(parallel, call_kwargs)
    before, calls = dict(handle.groups), counted(handle)
    make_anew(parallel, engine_config)
    second = draw(parallel, call_kwargs)
    seen[name] = {
        "same": same(first, second) and not (first is not None and same(first, uncompressed)),
        "other groups": list(before) == list(handle.groups)
        and all(handle.groups[route] is not before[route] for route in before),
        "calls": calls,
        "calls again": counted(handle),
    }
    # and once more, with no request before the handle goes
    make_anew(parallel, engine_config)
    latest = PROCESS_GROUP.RING_PG, PROCESS_GROUP.ULYSSES_PG
    handle.disable()
    now = PROCESS_GROUP.RING_PG, PROCESS_GROUP.ULYSSES_PG
    seen[name]["new groups stay"] = all(a is b for a, b in zip(latest, now, strict=True))
    seen[name]["plain"] = not any(isinstance(group, compactdist.CompressedProcessGroup) for group in now)
    seen[name]["uncompressed again"] = same(draw(parallel, call_kwargs), uncompressed)


def other_degrees(seen: dict[str, Any]) -> None:
    """The ring's group goes, a Ulysses group comes."""
    parallel_state.destroy_model_parallel()
    pipe, call_kwargs = build("flux", steps=STEPS)
    parallel = wrapped_by_xfuser(pipe, config(ring_degree=2))
    with enable(parallel, codec="int4") as handle:
        draw(parallel, call_kwargs)
        routes = [list(handle.groups)]
        make_anew(parallel, config(ulysses_degree=2))
        after = draw(parallel, call_kwargs)
        routes.append(list(handle.groups))
        calls = counted(handle)
    with enable(parallel, codec="int4"):
        seen["other degrees"] = {"routes": routes, "calls": calls, "same": same(draw(parallel, call_kwargs), after)}


def taking_turns(seen: dict[str, Any]) -> None:
    """Two pipelines, and groups made anew while the other one's are in place."""
    parallel_state.destroy_model_parallel()
    engine_config = config(ring_degree=2)
    one, one_kwargs = build("flux", steps=STEPS)
    two, two_kwargs = build("flux", steps=STEPS, batch=2)
    one, two = wrapped_by_xfuser(one, engine_config), wrapped_by_xfuser(two, engine_config)
    handles = enable(one, codec="int4"), enable(two, codec="binary")
    alone = draw(one, one_kwargs), draw(two, two_kwargs)
    make_anew(two, engine_config)
    after = draw(one, one_kwargs), draw(two, two_kwargs), draw(one, one_kwargs)
    latest = [handle.groups["ring"].inner for handle in handles]
    seen["turns"] = all(same(a, b) for a, b in zip(after, (*alone, alone[0]), strict=True))
    for handle in handles:
        handle.disable()
    seen["turns, groups"] = latest[0] is latest[1] is PROCESS_GROUP.RING_PG


def main() -> None:
    seen: dict[str, Any] = {}
    enabled_first(seen)
    remade(seen, {"ring_degree": 2}, "ring,sp", "ring")
    remade(seen, {"ulysses_degree": 2}, None, "ulysses")
    remade(seen, PIPEFUSION, None, "pipefusion")
    other_degrees(seen)
    taking_turns(seen)
    hand_in(seen, Path(sys.argv[1]))


main()
