"""A plan is replayed while nothing changes, and never goes stale where policies, hints or sizes do."""

from __future__ import annotations

import pytest
import torch

import compactdist
from compactdist import Layout
from compactdist.errors import NonFiniteError
from tests.group.kit import NUMEL, data
from tests.launch import run_ranks


def _gather(g, rank, seed, numel=NUMEL, dtype=torch.float32):
    out = torch.empty(g.size() * numel, dtype=dtype)
    g.all_gather_into_tensor(out, data(rank, numel, seed).to(dtype))
    return g._engine.store.site("all_gather#0").plan


def test_a_plan_is_kept_until_size_or_dtype_change():
    def body(rank, size):
        with compactdist.wrap(codec="int4", min_numel=64, timeout=20) as g:
            plans = []
            for seed in range(4):
                g.step()
                plans.append(_gather(g, rank, seed))
            assert all(plan is plans[0] for plan in plans)
            g.step()
            other = _gather(g, rank, 4, numel=2 * NUMEL)
            assert other is not plans[0]
            g.step()
            assert _gather(g, rank, 5, numel=2 * NUMEL, dtype=torch.bfloat16) is not other

    run_ranks(body, pg_timeout=15, timeout=60)


def test_a_policy_that_changes_its_dict_is_followed():
    def body(rank, size):
        answer = {"id": "int2"}
        with compactdist.wrap(min_numel=64, policy=lambda call: answer, timeout=20) as g:
            codecs = []
            for seed in range(4):
                answer["id"] = "int2" if seed < 2 else "int8"
                g.step()
                codecs.append(_gather(g, rank, seed).codec.codec_id)
            assert codecs == ["int2", "int2", "int8", "int8"]

    run_ranks(body, pg_timeout=15, timeout=60)


def test_streams_begin_with_what_a_hint_says_then():
    """A stream that begins anew asks the hint again, though its plan is an old one."""

    def hint(call):
        return Layout("(r c) -> 1 r c", c=32 if call.step < 3 else 64)

    def body(rank, size):
        with compactdist.wrap(codec="int4", min_numel=64, layouts=hint, timeout=20) as g:
            seen = []
            for seed in range(6):
                g.step()
                if seed == 3:
                    g.reset(prefix="nothing/at/all")  # no site is there: plans stay
                    x = torch.full((NUMEL,), torch.nan) if rank == 0 else data(rank, NUMEL, seed)
                    out = torch.empty(size * NUMEL)
                    with pytest.raises(NonFiniteError):
                        g.all_gather_into_tensor(out, x)
                else:
                    _gather(g, rank, seed)
                site = g._engine.store.site("all_gather#0")
                streams = [*site.encoders.values(), *site.decoders.values()]
                seen.append(sorted({stream.view.channels for stream in streams if stream.view is not None}))
            assert seen[2] == [32]
            assert 64 in seen[4]

    run_ranks(body, pg_timeout=15, timeout=60)
