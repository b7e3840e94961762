"""Requests that meet in one process. Started by test_sessions.py: sessions_worker.py OUT.json ROUTE."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch

from compactdist_harness.cpu import xdit as xdit_on_cpu
from compactdist_xdit import enable
from tests.integrations.xdit.ranks import hand_in

torch.set_num_threads(1)
os.environ.setdefault("LOG_LEVEL", "error")
xdit_on_cpu.install()
from yunchang.globals import PROCESS_GROUP  # noqa: E402

from compactdist_harness.xdit import parallel_tiny  # noqa: E402

out, route = Path(sys.argv[1]), sys.argv[2]
degrees = {f"{route}_degree": 2}
attribute = f"{route.upper()}_PG"
seen: dict[str, Any] = {}


def draw(pipe: Any, call_kwargs: dict[str, Any], **more: Any) -> torch.Tensor | None:
    result = pipe(**{**call_kwargs, **more})
    return None if result is None else result[0].clone()


def same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    return a is None or b is None or torch.equal(a, b)


one, one_kwargs = parallel_tiny("flux", **degrees)
two, two_kwargs = parallel_tiny("flux", batch=2, **degrees)
plain_group = getattr(PROCESS_GROUP, attribute)
uncompressed = draw(one, one_kwargs)
with enable(one, codec="int4"):
    alone = draw(one, one_kwargs)
with enable(two, codec="binary", order=2):
    alone_too = draw(two, two_kwargs)
seen["restored"] = getattr(PROCESS_GROUP, attribute) is plain_group
seen["compressed"] = not same(alone, uncompressed)

first, second = enable(one, codec="int4"), enable(two, codec="binary", order=2)
try:
    enable(one, codec="int4")
except ValueError as error:
    seen["twice"] = str(error)
seen["alternating"] = all(
    same(draw(one, one_kwargs), alone) and same(draw(two, two_kwargs), alone_too) for _ in range(2)
)


def meanwhile(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    if step in (2, 5):  # a whole request of the other pipeline in the middle of this one
        seen[f"inner {step}"] = same(draw(two, two_kwargs), alone_too)
    return {}


seen["interleaved"] = same(draw(one, one_kwargs, callback_on_step_end=meanwhile), alone)
first.disable()
seen["other goes on"] = same(draw(two, two_kwargs), alone_too)
second.disable()
seen["restored at last"] = getattr(PROCESS_GROUP, attribute) is plain_group
seen["uncompressed again"] = same(draw(one, one_kwargs), uncompressed)

# another batch size in the next request
small = parallel_tiny("flux", **degrees)[1]
with enable(two, codec="int4") as handle:
    at_two = draw(two, two_kwargs)
    draw(two, small)
    seen["batch changes"] = same(draw(two, two_kwargs), at_two)

hand_in(seen, out)
