"""First Block Cache: ranks that would part skip together, and skipped blocks go on with residuals."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("diffusers")

from diffusers.hooks import FirstBlockCacheConfig, first_block_cache

import compactdist_diffusers
from compactdist_diffusers import caches
from tests.integrations.diffusers.kit import STEPS, parallel, relative_error
from tests.launch import run_ranks
from tests.quick import quick_for

pytestmark = [pytest.mark.xdit, pytest.mark.timeout(120), pytest.mark.filterwarnings("ignore")]

# Between what two ranks see of the tiny FLUX in the last step but one; both see less in the second step.
THRESHOLD = 0.475
HEAD = first_block_cache.FBCHeadBlockHook


@contextmanager
def decisions_noted() -> Iterator[list[bool]]:
    """What this rank decides by itself at every forward: whether it computes."""
    noted: list[bool] = []
    decides = HEAD._should_compute_remaining_blocks

    def noting(hook: Any, residual: torch.Tensor) -> bool:
        noted.append(decides(hook, residual))
        return noted[-1]

    HEAD._should_compute_remaining_blocks = noting
    try:
        yield noted
    finally:
        HEAD._should_compute_remaining_blocks = decides


def cached(route: str, size: int) -> tuple[Any, dict[str, Any]]:
    pipe, call_kwargs = parallel("flux", route, size)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=THRESHOLD))
    return pipe, call_kwargs


def check_sites(sites: dict[str, Any], computed: int) -> None:
    """The first block's messages are those of every step, the others' of the steps that were computed."""
    for key, site in sites.items():
        first = "/transformer_blocks.0." in key
        assert (site.calls, site.keyframes) == (STEPS if first else computed, 1), key


def decided(noted: list[bool], size: int) -> list[list[bool]]:
    everyones: list[Any] = [None] * size
    dist.all_gather_object(everyones, noted)
    return everyones


@pytest.mark.parametrize("route", quick_for(["ring"], ["ring", "ulysses"]))
def test_ranks_that_part_skip_together(route: str) -> None:
    def body(rank: int, size: int) -> None:
        pipe, call_kwargs = cached(route, size)
        with compactdist_diffusers.enable(pipe, codec="raw"):
            plain = pipe(**call_kwargs)[0]
        with decisions_noted() as noted, compactdist_diffusers.enable(pipe, codec="int4") as handle:
            picture = pipe(**call_kwargs)[0]
            sites = handle.stats()[route].sites
        everyones = decided(noted, size)
        assert any(len(set(step)) == 2 for step in zip(*everyones, strict=True)), f"ranks agree: {everyones}"
        computed = sum(any(step) for step in zip(*everyones, strict=True))
        assert 1 < computed < STEPS
        check_sites(sites, computed)
        assert 1e-6 < relative_error(picture, plain) < 2e-2

        hook = pipe.transformer.transformer_blocks[0]._diffusers_hook.get_hook(caches._FIRST_BLOCK)
        assert caches._DECIDES not in vars(hook)
        pipe.transformer.disable_cache()
        with compactdist_diffusers.enable(pipe, codec="int4"):
            pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=THRESHOLD))
            assert torch.equal(pipe(**call_kwargs)[0], picture), "a cache enabled later votes as well"

    run_ranks(body, timeout=100)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_compiled_blocks_vote_and_keep_their_histories() -> None:
    def body(rank: int, size: int) -> None:
        pipe, call_kwargs = cached("ring", size)
        with decisions_noted() as noted, compactdist_diffusers.enable(pipe, codec="int4"):
            eager = pipe(**call_kwargs)[0]
            noted_eager = list(noted)
        pipe.transformer.compile_repeated_blocks(backend="eager")
        with decisions_noted() as noted, compactdist_diffusers.enable(pipe, codec="int4") as handle:
            picture = pipe(**call_kwargs)[0]
            sites = handle.stats()["ring"].sites
        assert noted == noted_eager
        computed = sum(any(step) for step in zip(*decided(noted, size), strict=True))
        assert 1 < computed < STEPS
        assert len(sites) == 4
        for key, site in sites.items():
            first = "/transformer_blocks.0/" in key
            assert (site.calls, site.keyframes) == (STEPS if first else computed, 1), key
        assert relative_error(picture, eager) < 2e-2

    run_ranks(body, timeout=380, pg_timeout=120)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_transformer_compiled_as_a_whole_cannot_leave_blocks_out() -> None:
    def body(rank: int, size: int) -> None:
        pipe, call_kwargs = cached("ring", size)
        pipe.transformer.compile(backend="eager")
        with compactdist_diffusers.enable(pipe, codec="int4"):
            pipe(**call_kwargs)

    for outcome in run_ranks(body, timeout=380, pg_timeout=120, expect_error=True):
        assert outcome.error_type == "ConfigError", outcome
        assert "Which of them that step left out cannot be told from their order" in outcome.error_text


@pytest.mark.slow
@pytest.mark.parametrize("compressed", [False, True])
def test_without_a_vote_no_rank_gets_its_picture(compressed: bool) -> None:
    """What the vote is for: ranks hang, raise, or are ended by gloo."""

    def body(rank: int, size: int) -> None:
        pipe, call_kwargs = cached("ring", size)
        caches.follow = lambda *_: None
        with compactdist_diffusers.enable(pipe, codec="int4") if compressed else nullcontext():
            pipe(**call_kwargs)

    outcomes = run_ranks(body, timeout=30, pg_timeout=5, expect_error=True)
    assert not any(outcome.ok for outcome in outcomes), outcomes


@pytest.mark.slow
def test_ranks_of_a_route_that_is_not_compressed_vote_too() -> None:
    def body(rank: int, size: int) -> None:
        pipe, call_kwargs = cached("both", size)
        with decisions_noted() as noted, compactdist_diffusers.enable(pipe, codec="int4", routes="ring") as handle:
            pipe(**call_kwargs)
            sites = handle.stats()["ring"].sites
        everyones = decided(noted, size)
        # ranks 0 and 1 share a Ulysses group, which stays plain
        assert everyones[0] != everyones[1] or everyones[2] != everyones[3], f"ranks agree: {everyones}"
        check_sites(sites, sum(any(step) for step in zip(*everyones, strict=True)))

    run_ranks(body, 4, timeout=100, pg_timeout=30)
