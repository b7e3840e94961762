"""Compiled transformers, one cell after another. Started by test_compile.py:

    compile_worker.py OUT.json "flux/ring/wrapper/before/eager, wan/ring/in place/after/eager"

A cell is a model, a route (the same in all cells), a way to compile (`WAYS`), whether that comes before or after
`enable`, and a backend.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from compactdist_common import unwrapped
from compactdist_harness.cpu import xdit as xdit_on_cpu
from compactdist_xdit import enable
from tests.integrations.xdit.ranks import hand_in

torch.set_num_threads(1)
os.environ.setdefault("LOG_LEVEL", "error")
xdit_on_cpu.install()
from xfuser.model_executor.models.runner_models.flux import xFuserFluxModel  # noqa: E402

from compactdist_harness.xdit import parallel_tiny  # noqa: E402

STEPS = 3


def draw(pipe: Any, call_kwargs: dict[str, Any]) -> Tensor | None:
    result = pipe(**call_kwargs)
    while result is not None and not torch.is_tensor(result):  # tuples, and outputs that hold a list
        result = result[0]
    return None if result is None else result.clone()


def relative(a: Tensor | None, b: Tensor | None) -> float | None:
    return None if a is None or b is None else float((a - b).norm() / b.norm())


def on_wrapper(pipe: Any, backend: str, call_kwargs: dict[str, Any]) -> None:
    pipe.transformer = torch.compile(pipe.transformer, backend=backend)


def on_inner(pipe: Any, backend: str, call_kwargs: dict[str, Any]) -> None:
    on_wrapper(unwrapped(pipe), backend, call_kwargs)


def in_place(pipe: Any, backend: str, call_kwargs: dict[str, Any]) -> None:
    pipe.transformer.compile(backend=backend)


def repeated_blocks(pipe: Any, backend: str, call_kwargs: dict[str, Any]) -> None:
    unwrapped(pipe.transformer).compile_repeated_blocks(backend=backend)


def forward(pipe: Any, backend: str, call_kwargs: dict[str, Any]) -> None:
    """As xfuser's pipeline wrappers with `--use_torch_compile`."""
    pipe.transformer.forward = torch.compile(pipe.transformer.forward, backend=backend)


def runner(pipe: Any, backend: str, call_kwargs: dict[str, Any], *, shards: int = 1) -> None:
    """xfuser's runner: it compiles the transformer, or every block where these are sharded, and makes a request."""
    model = object.__new__(xFuserFluxModel)
    model.pipe = pipe
    model.config = SimpleNamespace(fully_shard_degree=shards, cache_method=None)
    model._get_compile_mode = lambda: "default"  # asks what GPU this is
    model._run_compile_warmup = lambda arguments: draw(pipe, {**call_kwargs, **arguments})
    with mock.patch("torch.compile", functools.partial(torch.compile, backend=backend)):
        model._compile_model({})


WAYS: dict[str, Callable[[Any, str, dict[str, Any]], None]] = {
    "wrapper": on_wrapper,
    "inner": on_inner,
    "in place": in_place,
    "repeated blocks": repeated_blocks,
    "forward": forward,
    "runner": runner,
    "runner by blocks": functools.partial(runner, shards=2),
}


ALIKE = ("inner", "in place", "forward", "runner")
"""Ways to compile a whole transformer; `wrapper` does, too, and shows that alike blocks stay apart in a graph."""


def pipeline(model: str, route: str, way: str) -> tuple[Any, dict[str, Any]]:
    """A pipeline; for a way that is like another one, Flux has one block of each kind: most time is spent tracing."""
    pipe, call_kwargs = parallel_tiny(model, steps=STEPS, **{f"{route}_degree": 2})
    if model == "flux" and way in ALIKE:
        transformer = unwrapped(pipe.transformer)
        for blocks in (transformer.transformer_blocks, transformer.single_transformer_blocks):
            del blocks[1:]
    return pipe, call_kwargs


class Eager:
    """What a model draws on a route without a compiler, uncompressed and compressed, and in how many calls."""

    def __init__(self, model: str, route: str, way: str) -> None:
        pipe, call_kwargs = pipeline(model, route, way)
        self.plain = draw(pipe, call_kwargs)
        with enable(pipe, codec="int8", min_numel=1) as handle:
            self.compressed = draw(pipe, call_kwargs)
            self.calls = handle.stats()[route].compressed_calls


def cell(eager: Eager, model: str, route: str, way: str, when: str, backend: str) -> dict[str, Any]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    pipe, call_kwargs = pipeline(model, route, way)
    if when == "before":
        WAYS[way](pipe, backend, call_kwargs)
    with enable(pipe, codec="int8", min_numel=1) as handle:
        if when == "after":
            WAYS[way](pipe, backend, call_kwargs)
        before = handle.stats()[route].compressed_calls
        latents, again = draw(pipe, call_kwargs), draw(pipe, call_kwargs)
        stats = handle.stats()[route]
    counters = torch._dynamo.utils.counters
    return {
        "calls": stats.compressed_calls - before,
        "eager calls": 2 * eager.calls,
        "passed": stats.passed_reasons,
        "error": relative(latents, eager.plain),
        "eager error": relative(eager.compressed, eager.plain),
        "repeats": latents is None or torch.equal(latents, again),
        "graphs": counters["stats"]["unique_graphs"],
        "breaks": dict(counters["graph_break"]),
    }


def main() -> None:
    records: dict[str, Any] = {}
    eager: dict[tuple[str, bool], Eager] = {}
    for name in sys.argv[2].split(", "):
        model, route, way, when, backend = name.split("/")
        kind = (model, way in ALIKE)
        if kind not in eager:
            eager[kind] = Eager(model, route, way)
        records[name] = cell(eager[kind], model, route, way, when, backend)
    hand_in(records, Path(sys.argv[1]))


main()
