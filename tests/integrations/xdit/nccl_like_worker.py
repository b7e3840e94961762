"""FLUX over gloo, then over inner groups with NCCL's manners. Started by test_nccl_like.py: nccl_like_worker.py OUT."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch

from compactdist.testing import act_like_nccl, remove
from compactdist_harness.cpu import xdit as xdit_on_cpu
from compactdist_xdit import enable, routes
from tests.integrations.xdit.ranks import hand_in

torch.set_num_threads(1)
os.environ.setdefault("LOG_LEVEL", "error")
xdit_on_cpu.install()
from xfuser.core.distributed import parallel_state  # noqa: E402

from compactdist_harness.xdit import parallel_tiny  # noqa: E402

STEPS = 4
DEGREES = {
    "ring": {"ring_degree": 2},
    "ulysses": {"ulysses_degree": 2},
    "pipefusion": {"pipefusion_parallel_degree": 2, "num_pipeline_patch": 2, "warmup_steps": 1},
}


def put(slot: routes.Slot, group: Any) -> None:
    """Put a group where xfuser looks for it."""
    if slot.index is None:
        setattr(slot.owner, slot.attribute, group)
    else:
        getattr(slot.owner, slot.attribute)[slot.index] = group


def drawn(pipe: Any, call_kwargs: dict[str, Any], inner: list[Any]) -> tuple[torch.Tensor | None, list[dict[str, int]]]:
    """The latents of a compressed request, and what the wrapped groups, which must be over `inner`, counted."""
    with enable(pipe, codec="int4", min_numel=1) as handle:
        assert [group.inner for group in handle.groups.values()] == inner
        result = pipe(**call_kwargs)
        counted = [
            {"compressed": stats.compressed_calls, "passed": stats.passed_through, "wire": stats.wire_bytes}
            for stats in handle.stats().values()
        ]
    return None if result is None else result[0].clone(), counted


def compared(route: str) -> dict[str, Any]:
    pipe, call_kwargs = parallel_tiny("flux", steps=STEPS, **DEGREES[route])
    slots = routes.slots([route])
    plain = [slot.get() for slot in slots]
    over_gloo, counted = drawn(pipe, call_kwargs, plain)
    mannered = [act_like_nccl(group) for group in plain]
    for slot, group in zip(slots, mannered, strict=True):
        put(slot, group)
    with_manners, counted_again = drawn(pipe, call_kwargs, mannered)
    assert [slot.get() for slot in slots] == mannered, "disable() gives back the groups that were there"
    for slot, group, manners in zip(slots, plain, mannered, strict=True):
        put(slot, group)
        remove(manners)
    parallel_state.destroy_model_parallel()
    return {
        "gloo": counted,
        "nccl": counted_again,
        "same": None if over_gloo is None or with_manners is None else torch.equal(with_manners, over_gloo),
        "issued": sum(len(group.issued) for group in mannered),
    }


hand_in({route: compared(route) for route in DEGREES}, Path(sys.argv[1]))
