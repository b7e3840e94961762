"""`enable` finds groups that xfuser makes later, or makes anew, and what replaces a transformer or a scheduler."""

from __future__ import annotations

import importlib.util
import json
from typing import Any

import pytest

from tests.integrations.xdit.ranks import run_worker

if any(importlib.util.find_spec(name) is None for name in ("xfuser", "triton", "yunchang")):
    pytest.skip("xfuser is not installed", allow_module_level=True)

pytestmark = [pytest.mark.xdit, pytest.mark.slow, pytest.mark.timeout(240)]

STEPS, LAYERS = 4, 4
PIPEFUSION = ["pipefusion[0]", "pipefusion[1]"]
# calls of one request: ring gathers once a layer, Ulysses sends twice, the final latents travel once on sp
CALLS = {"ring": {"ring": STEPS * LAYERS, "sp": 1}, "ulysses": {"ulysses": 2 * STEPS * LAYERS}}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    out = tmp_path_factory.mktemp("regroup") / "out.json"
    run_worker("regroup_worker.py", out)
    return json.loads(out.read_text())


def test_enabled_before_there_are_groups(ranks: list[dict[str, Any]]) -> None:
    for seen in ranks:
        assert seen["no groups yet"]
        assert seen["early"] == {"ring": [2 * STEPS * LAYERS, 0]}
        assert seen["early steps"] == STEPS - 1
        assert seen["late"] == {"ring": [STEPS * LAYERS, 0]}
        assert seen["early sites"] == seen["late sites"]
        assert len(seen["early sites"]) == LAYERS
        assert seen["early repeats"]
        assert seen["early is late"]
        assert seen["early is compressed"]


def test_another_scheduler_after_enable(ranks: list[dict[str, Any]]) -> None:
    for seen in ranks:
        assert seen["other scheduler"]
        assert seen["other scheduler, calls"] == {"ring": [2 * STEPS * LAYERS, 0]}


@pytest.mark.parametrize("route", ["ring", "ulysses", "pipefusion"])
def test_groups_made_anew_between_requests(ranks: list[dict[str, Any]], route: str) -> None:
    for seen in ranks:
        record = seen[route]
        assert record["same"]
        assert record["other groups"]
        assert record["calls again"] == record["calls"]
        assert all(passed == 0 for _, passed in record["calls"].values())
        if route in CALLS:
            assert {name: calls for name, (calls, _) in record["calls"].items()} == CALLS[route]
        else:
            assert list(record["calls"]) == PIPEFUSION
            assert sum(calls for calls, _ in record["calls"].values()) > 0


@pytest.mark.parametrize("route", ["ring", "ulysses", "pipefusion"])
def test_disable_leaves_xfusers_newest_groups(ranks: list[dict[str, Any]], route: str) -> None:
    for seen in ranks:
        assert seen[route]["new groups stay"]
        assert seen[route]["plain"]
        assert seen[route]["uncompressed again"]


def test_other_degrees(ranks: list[dict[str, Any]]) -> None:
    for seen in ranks:
        assert seen["other degrees"]["routes"] == [["ring"], ["ulysses"]]
        assert seen["other degrees"]["calls"] == {"ulysses": [2 * STEPS * LAYERS, 0]}
        assert seen["other degrees"]["same"]


def test_two_pipelines_and_groups_made_anew(ranks: list[dict[str, Any]]) -> None:
    for seen in ranks:
        assert seen["turns"]
        assert seen["turns, groups"]
