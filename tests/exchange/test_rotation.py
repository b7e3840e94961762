"""Rings made of all-to-alls with one chunk, as torch's context parallelism turns its keys and values."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch.distributed.tensor.experimental import _attention
from torch.nn.functional import scaled_dot_product_attention

from compactdist import Layout
from tests.exchange.rings import N, chunk, relative, wrap
from tests.launch import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")


def turn(g, x):
    """To the next rank; like torch's rotater, what is sent is a new tensor each time."""
    k, v = x.view(2, -1)
    y = funcol.permute_tensor(torch.cat([k, v]), [*range(1, g.size()), 0], g)
    return funcol.wait_tensor(y)


def forwarded(g):
    return [g.stats().sites[f"all_to_all#{h}"].forwarded for h in range(g.size() - 1)]


@pytest.mark.parametrize(
    ("size", "options"), [(2, {}), (4, {}), (3, {"order": 2}), (3, {"state": "int8"}), (3, {"keyframe": "raw"})]
)
def test_a_rotation_is_compressed_and_forwarded(size, options):
    def body(rank, size):
        g = wrap(**options)
        seen = []
        for t in range(6):
            g.step()
            x, hops = chunk(rank, t), []
            for _ in range(size - 1):
                x = turn(g, x)
                hops.append(x.clone())
            seen.append(hops)
        return seen, forwarded(g), g.stats()

    ranks = run_ranks(body, size)
    for t in range(6):
        for owner in range(size):
            copies = [ranks[(owner + 1 + h) % size][0][t][h] for h in range(size - 1)]
            assert all(torch.equal(copy, copies[0]) for copy in copies[1:])
            assert relative(copies[0], chunk(owner, t)) < 0.2
    for _, each, stats in ranks:
        assert each == [0] + [6] * (size - 2)
        assert stats.wire_bytes < 0.4 * stats.raw_bytes
        assert stats.passed_reasons == {}


def test_a_touched_rotation_is_encoded_again_at_the_agreed_size():
    def body(rank, size):
        g = wrap()
        seen = []
        for t in range(6):
            g.step()
            x, hops = chunk(rank, t), []
            for h in range(size - 1):
                if t == 3 and h == 1 and rank == 0:
                    x[7] += 1
                hops.append(x.clone())
                x = turn(g, x)
                hops.append(x.clone())
            seen.append(hops)
        site = g.stats().sites["all_to_all#1"]
        return seen, site.keyframes, forwarded(g)

    ranks = run_ranks(body, 3)
    assert [(keyframes, each) for _, keyframes, each in ranks] == [(1, [0, 3]), (1, [0, 6]), (1, [0, 6])]
    for t in range(6):
        sent, arrived = ranks[0][0][t][2], ranks[1][0][t][3]
        assert relative(arrived, sent) < 0.1
        assert torch.equal(arrived, sent) == (t < 3)


@pytest.mark.parametrize("size", [2, 4])
def test_torchs_ring_attention_with_the_alltoall_rotater(size):
    """Two layers of the attention that xfuser and torch's context parallelism run on their ring group."""
    b, h, s, d = 1, 4, 32, 16

    def qkv(rank, t, layer):
        like = torch.stack([chunk(rank + 20 * (3 * layer + i), t, s * h * d) for i in range(3)])
        return like.view(3, b, s, h, d).transpose(2, 3) / 4

    def op(q, k, v, is_causal=False):
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, is_causal=is_causal)[:2]

    def body(rank, size):
        _attention.set_rotate_method("alltoall")
        _attention._cp_options.enable_load_balance = False
        layout = Layout("(kv b h s d) -> kv (b s) (h d)", kv=2, b=b, h=h, s=s, d=d)
        worst = {}
        for codec in ("raw", "int4"):
            g = wrap(codec=codec, layouts={"*": layout})
            errors = []
            for t in range(5):
                g.step()
                for layer in range(2):
                    parts = [qkv(r, t, layer) for r in range(size)]
                    with torch.no_grad():
                        out = _attention._templated_ring_attention(g, 2, op, *parts[rank])[0]
                    everything = torch.cat(parts, dim=3)
                    truth = scaled_dot_product_attention(parts[rank][0], everything[1], everything[2])
                    errors.append(relative(out, truth))
            worst[codec] = max(errors)
            stats = g.stats()
            assert stats.passed_reasons == {}
            assert stats.compressed_calls == 5 * 2 * (size - 1)
        assert stats.forwarded == 5 * 2 * (size - 2)
        return worst

    for worst in run_ranks(body, size):
        assert worst["raw"] < 1e-6
        assert 0 < worst["int4"] < 0.05


def test_torch_finds_the_group_of_some_ranks_by_its_tag():
    """Otherwise permute_tensor makes a plain group to learn a rank, and waits for ranks that are not in this one."""

    def body(rank, size):
        halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        inner = halves[rank // 2]
        known = len(dist.distributed_c10d._world.pg_map)
        with wrap(group=inner) as g:
            assert g.size() == 2
            for t in range(3):
                g.step()
                assert relative(turn(g, chunk(rank, t)), chunk(rank ^ 1, t)) < 0.1
            assert len(dist.distributed_c10d._world.pg_map) == known + 1
        assert len(dist.distributed_c10d._world.pg_map) == known

    run_ranks(body, 4, timeout=20)


def test_an_ordinary_exchange_does_not_look_for_anything_to_pass_on():
    def body(rank, size):
        g = wrap()
        x = torch.cat([chunk(0, 0, N // 4) for _ in range(size)])
        for _ in range(4):
            g.step()
            y = torch.empty_like(x)
            g.all_to_all_single(y, x)
            g.all_to_all_single(y, y.clone())
        assert not g._engine.arrivals._by_stream
        return g.stats().forwarded

    assert run_ranks(body, 2) == [0, 0]
