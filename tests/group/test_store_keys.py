"""Wrapping again and again leaves a constant number of keys in the store."""

from __future__ import annotations

import torch.distributed as dist

import compactdist
from compactdist import _torch
from tests.launch import run_ranks


def test_wraps_overwrite_their_store_keys():
    def body(rank, size):
        store = _torch.group_store(dist.group.WORLD)
        counts = []
        for i in range(12):
            compactdist.wrap(codec="int4" if i % 3 else "int8", timeout=20).close()
            dist.barrier()
            counts.append(store.num_keys())
            dist.barrier()
        assert len(set(counts[2:])) == 1, counts

    run_ranks(body, world_size=3, pg_timeout=15, timeout=60)
