"""Every public call of torch.distributed reaches the method it should, and is counted as compressed or passed through.

Counting matters: a call that goes round the wrapper gives right numbers and saves nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch.distributed as dist

import compactdist
from compactdist.testing import act_like_nccl
from tests.group import spy_functional, spy_torch  # noqa: F401 - they fill the table
from tests.group.kit import Seen, Watch
from tests.group.spy_kit import SIZE, rows_on
from tests.launch import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:torch.*")


INNER = {"gloo": lambda: dist.group.WORLD, "nccl_like": lambda: act_like_nccl(dist.group.WORLD)}


def run_table(rank: int, world_size: int, inner: str) -> dict[str, list[Seen]]:
    group = compactdist.wrap(INNER[inner](), codec="int8", min_numel=64)
    watch = Watch(group)
    table: dict[str, list[Seen]] = {}
    for name, line in rows_on(inner).items():
        table[name] = []
        with group.key(name):
            for _ in range(2):  # a keyframe, then a residual
                group.step()
                table[name].append(watch(lambda line=line: line.call(group, rank)))
                dist.barrier()
        group.reset()
    return table


@pytest.fixture(scope="module")
def tables() -> Callable[[str], list[dict[str, list[Seen]]]]:
    return cache(lambda inner: run_ranks(run_table, SIZE, args=(inner,), timeout=60, pg_timeout=20))


@pytest.mark.parametrize(("inner", "name"), [(inner, name) for inner in INNER for name in rows_on(inner)])
def test_a_call_reaches_its_method_and_is_counted(tables, inner, name):
    expected = rows_on(inner)[name]
    for rank, table in enumerate(tables(inner)):
        for step, seen in enumerate(table[name]):
            where = f"rank {rank}, step {step}"
            assert seen.error == expected.error, where
            assert seen.reached == expected.reaches, where
            assert (seen.compressed, seen.passed) == (expected.compressed, expected.passed), where
            assert seen.value is (None if expected.error else True), f"{where}: wrong numbers"
