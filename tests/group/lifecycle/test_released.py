"""A reset frees histories at once, without the garbage collector and although the caller still holds works."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from compactdist import Rule
from tests.group.lifecycle import kit
from tests.launch import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")


@pytest.mark.parametrize("options", [{}, {"order": 2}, {"state": "int8"}, {"error_feedback": False}])
def test_histories_are_freed_by_a_reset(options):
    def body(rank, world):
        gc.collect()
        gc.disable()
        with kit.wrap(policy=Rule("int8", op="all_reduce"), **options) as dist:
            for step in range(3):
                dist.step()
                kit.gather(dist, kit.tensor(rank, step))
                dist.all_to_all_single(torch.empty(2 * kit.N), kit.tensor(rank, step, 2 * kit.N))
                dist.broadcast(kit.tensor(0, step), src=0)
                dist.all_reduce(kit.tensor(rank, step, 4 * kit.N))
                ops = [
                    dist.P2POp(dist.isend, kit.tensor(rank, step), 1 - rank),
                    dist.P2POp(dist.irecv, torch.empty(kit.N), 1 - rank),
                ]
                works = dist.batch_isend_irecv(ops)
                for work in works:
                    work.wait()
            held = [
                (site.key, weakref.ref(tensor))
                for site in dist._engine.store.sites()
                for stream in (*site.encoders.values(), *site.decoders.values())
                for tensor in stream.predictor.held
            ]
            assert len(held) >= 11
            assert all(ref() is not None for _, ref in held)
            dist.reset()
            left = [key for key, ref in held if ref() is not None]
            assert not left, left
            assert works

    run_ranks(body)
