"""`enable` reaches attention layers that keep their groups: names, layouts, forwarding, and everything given back."""

from __future__ import annotations

import importlib.util
import json
import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from compactdist_xdit.captured import Captured, holders
from tests.integrations.xdit.ranks import run_worker

STEPS, LAYERS, WORLD = 6, 2, 4
CALLS = 2 * STEPS  # two requests
CASES = ["processor 1 x 4", "module 2 x 2", "linear 1 x 4"]
needs_xfuser = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("xfuser", "triton", "yunchang")),
    reason="xfuser is not installed",
)
pytestmark = [pytest.mark.xdit, pytest.mark.slow, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    out = tmp_path_factory.mktemp("captured") / "out.json"
    run_worker("captured_worker.py", out, ranks=WORLD)
    return json.loads(out.read_text())


@needs_xfuser
@pytest.mark.parametrize("case", CASES)
def test_raw_is_exact_and_int4_is_close(ranks: list[dict[str, Any]], case: str) -> None:
    for record in (rank[case] for rank in ranks):
        assert record["raw"]["error"] == 0
        assert 0 < record["int4"]["error"] < 2e-2
        assert record["raw"]["repeats"]
        assert record["int4"]["repeats"]


@needs_xfuser
@pytest.mark.parametrize("case", ["processor 1 x 4", "linear 1 x 4"])
def test_a_ring_encodes_once_and_forwards(ranks: list[dict[str, Any]], case: str) -> None:
    for me, rank in enumerate(ranks):
        expected = {
            f"ring ring/blocks.{layer}/send/{me}>{(me + 1) % WORLD}/t0#{hop}": [CALLS, 0 if hop < 2 else CALLS]
            for layer in range(LAYERS)
            for hop in range(2 * (WORLD - 1))
        }
        assert rank[case]["int4"]["sites"] == expected
        assert rank[case]["int4"]["passed"] == {"ring": {}}


@needs_xfuser
def test_ulysses_around_a_ring_of_two(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        record = rank["module 2 x 2"]["int4"]
        names = [name for name in record["sites"] if name.startswith("ulysses")]
        assert sorted(names) == sorted(
            f"ulysses {site}/blocks.{layer}.parallel/all_to_all#{n}"
            for layer in range(LAYERS)
            for site, count in (("in", 3), ("out", 1))
            for n in range(count)
        )
        assert len(record["sites"]) == len(names) + 2 * LAYERS
        assert all(site == [CALLS, 0] for site in record["sites"].values())
        assert record["passed"] == {"ring": {}, "ulysses": {}}


@needs_xfuser
def test_layouts(ranks: list[dict[str, Any]]) -> None:
    batch, tokens, heads, channels = 2, 32, 4, 16
    for rank in ranks:
        ring = rank["processor 1 x 4"]["int4"]["layouts"]
        assert set(map(tuple, ring.values())) == {(1, batch * tokens // 4, heads * channels, True)}
        both = rank["module 2 x 2"]["int4"]["layouts"]
        assert all(layout[3] for layout in both.values())
        # Sana turns other buffers, for which the encoder finds a layout
        assert not any(layout[3] for layout in rank["linear 1 x 4"]["int4"]["layouts"].values())


@needs_xfuser
@pytest.mark.parametrize("case", CASES)
def test_sessions_take_turns_and_give_back(ranks: list[dict[str, Any]], case: str) -> None:
    for rank in ranks:
        assert rank[case]["turns"]
        assert rank[case]["turns, groups"]
        assert rank[case]["given back"]
        assert rank[case]["afterwards"]
        assert rank["plain at last"]


class Group:
    def __init__(self, inner: Any = None, size: int = 2) -> None:
        self.inner, self._size = inner, size

    def size(self) -> int:
        return self._size


def test_layers_are_found_where_xfuser_keeps_them() -> None:
    module, nested = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    module.ring_pg = module.ulysses_pg = None
    layer = SimpleNamespace(ring_pg=None, ulysses_pg=None)
    nested.processor = SimpleNamespace(hybrid_seq_parallel_attn=layer)
    other = torch.nn.Linear(1, 1)
    other.ring_pg = None  # one group alone is something else
    found = holders([module, nested, other, nested])
    assert len(found) == 2
    assert found[0] is module
    assert found[1] is layer


def test_only_the_group_that_is_wrapped_is_replaced(caplog: pytest.LogCaptureFixture) -> None:
    plain, single, stale = Group(), Group(size=1), Group()
    wrapped = Group(plain)
    layer = SimpleNamespace(ring_pg=plain, ulysses_pg=single)
    old = SimpleNamespace(ring_pg=stale, ulysses_pg=None)
    captured = Captured()
    with caplog.at_level(logging.WARNING, logger="compactdist"):
        captured.install([layer, old], {"ring": wrapped})
        assert (layer.ring_pg, layer.ulysses_pg, old.ring_pg) == (wrapped, single, stale)
        captured.remove()
        captured.install([layer, old], {"ring": wrapped})
        captured.remove()
    captured.remove()
    assert (layer.ring_pg, layer.ulysses_pg, old.ring_pg) == (plain, single, stale)
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        "SimpleNamespace keeps a ring group that xfuser has replaced since"
    ]
