"""Keyframes that follow layout hints: all ranks know their sizes, in every pattern."""

from __future__ import annotations

import pytest
import torch

import compactdist
from compactdist import Layout, codecs
from compactdist.errors import NonFiniteError
from compactdist.state import MatrixView, blocks
from compactdist.wire import HEADER_NBYTES
from tests.launch import run_ranks

ROWS, CHANNELS = 96, 80
N = ROWS * CHANNELS
LAYOUT = Layout("(h s d) -> 1 s (h d)", h=2, d=CHANNELS // 2)
KEYFRAME = codecs.get("int4")
HINTED = KEYFRAME.payload_nbytes(LAYOUT.resolve(N).shape, torch.float32) + HEADER_NBYTES
IN_BLOCKS = KEYFRAME.payload_nbytes(blocks(N).shape, torch.float32) + HEADER_NBYTES


def chunk(rank: int, step: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(100 * step + rank)
    return (torch.randn(2, ROWS, CHANNELS // 2, generator=g) * torch.logspace(-1, 1, CHANNELS // 2)).bfloat16()


def plain_chunk(rank: int, step: int) -> torch.Tensor:
    return torch.randn(N, generator=torch.Generator().manual_seed(100 * step + rank)).bfloat16()


def near(got: torch.Tensor, sent: torch.Tensor) -> bool:
    return bool((got.double().view(-1) - sent.double().view(-1)).norm() < 0.2 * sent.double().norm())


def of_all_patterns(rank: int, size: int) -> None:
    assert HINTED != IN_BLOCKS
    peer = 1 - rank
    with compactdist.wrap(codec="int8", keyframe="int4", warmup_steps=2, layouts={"*": LAYOUT}, min_numel=64) as g:
        for request in range(2):
            for step in range(4):
                x = chunk(rank, 10 * request + step)
                with g.step():
                    out = torch.empty(size, N, dtype=x.dtype)
                    g.all_gather_into_tensor(out, x.view(-1))
                    assert near(out[peer], chunk(peer, 10 * request + step))
                    there = torch.empty(size * N, dtype=x.dtype)
                    g.all_to_all_single(there, torch.cat([x.view(-1)] * size))
                    assert near(there.view(size, N)[peer], chunk(peer, 10 * request + step))
                    y = x.clone() if rank == 0 else torch.empty_like(x)
                    g.broadcast(y, 0)
                    assert near(y, chunk(0, 10 * request + step))
                    z = torch.empty_like(x)
                    if rank == 0:
                        g.send(x, 1)
                        g.recv(z, 1)  # what rank 1 received comes back, as it is
                        assert near(z, x)
                    else:
                        g.recv(z, 0)
                        g.send(z, 0)
                if step == 0 and request == 0:
                    sent = {each.op: each.wire_bytes for each in g.stats().sites.values()}
                    for op in ("all_gather", "all_to_all", *["broadcast"] * (rank == 0)):
                        assert sent[op] == HINTED, (op, sent, HINTED, IN_BLOCKS)
            g.reset()


@pytest.mark.timeout(120)
def test_all_patterns() -> None:
    run_ranks(of_all_patterns, 2, timeout=90)


def with_a_stream_that_begins_anew(rank: int, size: int) -> None:
    """One stream of an all-gather begins anew under another hint: all frames are as large as the largest keyframe."""
    layouts = [Layout("(s d) -> 1 s d", d=CHANNELS), Layout("(g s d) -> g s d", g=2, s=48)]
    hints: list[MatrixView] = [layout.resolve(N) for layout in layouts]
    sizes = {KEYFRAME.payload_nbytes(hint.shape, torch.float32) for hint in hints}
    assert len(sizes) == 2

    def hint(call):
        return layouts[int(call.step >= 2)]

    with compactdist.wrap(codec="int4", keyframe="int4", layouts=hint, min_numel=64) as g:
        for step in range(5):
            x, out = plain_chunk(rank, step), torch.empty(size, N, dtype=torch.bfloat16)
            if step == 2 and rank == 1:
                x.fill_(float("nan"))
            with g.step():
                if step == 2:
                    with pytest.raises(NonFiniteError):
                        g.all_gather_into_tensor(out, x.view(-1))
                else:
                    g.all_gather_into_tensor(out, x.view(-1))
                    assert near(out[1 - rank], plain_chunk(1 - rank, step))


@pytest.mark.timeout(120)
def test_a_stream_that_begins_anew() -> None:
    run_ranks(with_a_stream_that_begins_anew, 2, timeout=90)
