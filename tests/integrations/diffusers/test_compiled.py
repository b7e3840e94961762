"""A compiled transformer: whole graphs, compressed on every step."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

import compactdist_diffusers
from tests.integrations.diffusers.kit import parallel, relative_error
from tests.launch import run_ranks

pytestmark = [pytest.mark.xdit, pytest.mark.timeout(300), pytest.mark.filterwarnings("ignore")]

STEPS = 4


def compile_whole(pipe: Any, **options: Any) -> None:
    pipe.transformer = torch.compile(pipe.transformer, **options)


def compile_in_place(pipe: Any, **options: Any) -> None:
    pipe.transformer.compile(**options)


def compile_blocks(pipe: Any, **options: Any) -> None:
    pipe.transformer.compile_repeated_blocks(**options)


def check(compile_: Any, route: str, backend: str, *, late: bool = False, kept: tuple[int, int] = (1, 1)) -> None:
    """Compiled Flux with so many double and single blocks is as it should be: most of the time is spent tracing.

    That alike blocks stay apart is shown with all blocks, each compiled by itself, and by xDiT's.
    """

    def body(rank: int, size: int) -> None:
        pipe, call_kwargs = parallel("flux", route, size, steps=STEPS)
        for number, name in zip(kept, ("transformer_blocks", "single_transformer_blocks"), strict=True):
            del getattr(pipe.transformer, name)[number:]
        plain = pipe(**call_kwargs)[0]
        if not late:
            compile_(pipe, backend=backend, fullgraph=True)
        with compactdist_diffusers.enable(pipe, codec="int4") as handle:
            if late:
                compile_(pipe, backend=backend)
            first = pipe(**call_kwargs)[0]
            assert 1e-6 < relative_error(first, plain) < 2e-2
            assert handle.stats()[route].compressed_calls == sum(kept) * STEPS * (1 if route == "ring" else 4)
            assert torch.equal(pipe(**call_kwargs)[0], first)
            assert f"steps: {2 * STEPS}; requests begun: set_timesteps 2" in handle.explain()
        assert relative_error(pipe(**call_kwargs)[0], plain) < 1e-4

    run_ranks(body, timeout=280, pg_timeout=120)


@pytest.mark.slow
@pytest.mark.parametrize(("compile_", "route"), [(compile_in_place, "ring"), (compile_whole, "ulysses")])
def test_a_full_graph(compile_: Any, route: str) -> None:
    check(compile_, route, "eager")


@pytest.mark.slow
def test_blocks_by_themselves() -> None:
    check(compile_blocks, "ulysses", "aot_eager", kept=(2, 2))


@pytest.mark.slow
def test_inductor() -> None:
    check(compile_blocks, "ring", "inductor", kept=(1, 0))


@pytest.mark.slow
def test_compiled_too_late_breaks_the_graph_and_works() -> None:
    check(compile_whole, "ulysses", "eager", late=True)
