"""yunchang on its own, as docs/diffusers.md shows it: swap the groups, then build the layer."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("yunchang")

import compactdist
from compactdist_harness.cpu import yunchang as yunchang_on_cpu
from tests.integrations.diffusers.kit import relative_error
from tests.launch import run_ranks

pytestmark = [pytest.mark.xdit, pytest.mark.filterwarnings("ignore")]

B, S, H, D, STEPS = 1, 64, 4, 32, 4


@pytest.mark.parametrize(("route", "calls"), [("ring", 2), ("ulysses", 4)])
def test_long_context_attention(route: str, calls: int) -> None:
    def body(rank: int, size: int) -> None:
        from yunchang import LongContextAttention, set_seq_parallel_pg
        from yunchang.globals import PROCESS_GROUP
        from yunchang.kernels import AttnType

        yunchang_on_cpu.install()
        degrees = (size, 1) if route == "ulysses" else (1, size)
        set_seq_parallel_pg(*degrees, rank, size)
        name = f"{route.upper()}_PG"
        group = compactdist.wrap(getattr(PROCESS_GROUP, name), codec="int4", local="exact")
        setattr(PROCESS_GROUP, name, group)
        layer = LongContextAttention(ring_impl_type="basic", attn_type=AttnType.TORCH_FLASH)

        generator = torch.Generator().manual_seed(0)
        q, k, v = torch.randn(3, B, S, H, D, generator=generator)
        for _ in range(STEPS):
            q, k, v = (x + 0.05 * torch.randn(x.shape, generator=generator) for x in (q, k, v))
            exact = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
            with group.step(), torch.no_grad():
                out = layer(*(x.chunk(size, 1)[rank].contiguous() for x in (q, k, v)))
            assert relative_error(out, exact.transpose(1, 2).chunk(size, 1)[rank]) < 2e-2
        stats = group.stats()
        assert stats.compressed_calls == calls * STEPS
        assert stats.passed_through == 0

    run_ranks(body, timeout=60)
