"""cache-dit's own context parallelism and its DBCache, on a CPU with two of its kernels replaced (`cpu.cache_dit`)."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist

pytest.importorskip("diffusers")
pytest.importorskip("cache_dit")

import cache_dit
from cache_dit.caching.cache_contexts.cache_manager import CachedContextManager

import compactdist_diffusers
from compactdist_harness import tiny
from compactdist_harness.cpu import cache_dit as cache_dit_on_cpu
from tests.integrations.diffusers.kit import STEPS, relative_error
from tests.launch import run_ranks

pytestmark = [
    pytest.mark.xdit,
    pytest.mark.slow,
    pytest.mark.timeout(180),
    pytest.mark.filterwarnings("ignore"),
]

MODES: dict[str, dict[str, Any]] = {
    "ring": {"ring_size": 2},
    "ulysses": {"ulysses_size": 2},
    "ulysses async": {"ulysses_size": 2, "ulysses_async": True},
    "ulysses anything": {"ulysses_size": 2, "ulysses_anything": True},
}
CALLS = {"ring": 2, "ulysses": 4}  # by route, of one attention: K and V to the next rank, or q, k, v and the output


def parallel(mode: str, **caching: Any) -> tuple[Any, dict[str, Any]]:
    cache_dit_on_cpu.install()
    pipe, call_kwargs = tiny.build("flux", steps=STEPS)
    chosen = cache_dit.ParallelismConfig(attention_backend="native", **MODES[mode])
    cache_dit.enable_cache(pipe, parallelism_config=chosen, **caching)
    return pipe, call_kwargs


@pytest.mark.parametrize("mode", MODES)
def test_context_parallelism(mode: str) -> None:
    def body(rank: int, size: int) -> None:
        alone, call_kwargs = tiny.build("flux", steps=STEPS)
        expected = alone(**call_kwargs)[0]
        pipe, call_kwargs = parallel(mode)
        plain = pipe(**call_kwargs)[0]
        assert relative_error(plain, expected) < 1e-6
        with compactdist_diffusers.enable(pipe, codec="raw"):
            assert relative_error(pipe(**call_kwargs)[0], plain) <= 1e-6
        with compactdist_diffusers.enable(pipe, codec="int4") as handle:
            assert 1e-6 < relative_error(pipe(**call_kwargs)[0], plain) < 2e-2
            route = mode.split()[0]
            stats = handle.stats()[route]
            assert stats.compressed_calls == 4 * STEPS * CALLS[route]
            assert stats.wire_bytes < 0.3 * stats.raw_bytes
            assert all("_blocks." in site for site in stats.sites), "calls carry the names of layers"

    run_ranks(body, timeout=100)


def test_ranks_with_dbcache_skip_together() -> None:
    """cache-dit averages what it decides by over all ranks, so nothing is left for the adapter to do."""
    threshold = 0.478  # between what the ranks see in the last step but one
    decides = CachedContextManager.similarity

    def body(rank: int, size: int) -> None:
        noted: list[tuple[bool, bool]] = []

        def noting(self: Any, before: Any, now: Any, **options: Any) -> bool:
            own = bool((before - now).abs().mean() / before.abs().mean() < threshold)
            noted.append((own, decides(self, before, now, **options)))
            return noted[-1][1]

        chosen = cache_dit.DBCacheConfig(
            Fn_compute_blocks=1, Bn_compute_blocks=0, residual_diff_threshold=threshold, max_warmup_steps=1
        )
        pipe, call_kwargs = parallel("ring", cache_config=chosen)
        with compactdist_diffusers.enable(pipe, codec="raw"):
            plain = pipe(**call_kwargs)[0]
        CachedContextManager.similarity = noting
        with compactdist_diffusers.enable(pipe, codec="int4") as handle:
            assert 1e-6 < relative_error(pipe(**call_kwargs)[0], plain) < 2e-2
            sites = handle.stats()["ring"].sites
        everyones: list[Any] = [None] * size
        dist.all_gather_object(everyones, noted)
        own, together = ([[step[which] for step in mine] for mine in everyones] for which in (0, 1))
        assert own[0] != own[1], f"ranks do not part at this threshold: {own}"
        assert together[0] == together[1]
        computed = STEPS - sum(together[0])
        assert 1 < computed < STEPS
        for key, site in sites.items():
            if f"send/{rank}>" in key:
                first = "/transformer_blocks.0." in key
                assert (site.calls, site.keyframes) == (STEPS if first else computed, 1), key

    run_ranks(body, timeout=100)
