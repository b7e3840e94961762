"""What every test shares: one torch thread, reproducible hypothesis runs, no process group left behind."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed
from hypothesis import HealthCheck, settings

from compactdist.kernels import sources

# The multi-rank launcher forks, which is sound only while no thread pool exists: so before any operation.
torch.set_num_threads(1)

# What each rank would import, and read, of its own, once for all that are forked.
if importlib.util.find_spec("numba"):
    importlib.import_module("compactdist.kernels.cpu.steps")
sources.digest()

_common = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
settings.register_profile("ci", _common, derandomize=True, max_examples=50)
settings.register_profile("explore", _common, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests first, those with the longest limits before all, so that no worker is left alone with one at the end.

    Each worker begins with a stretch of the list of its own, so as many stretches begin with slow tests. The slow
    tests of a module stay together: what they share is then made once, not by each worker.
    """
    quick = [item for item in items if item.get_closest_marker("slow") is None]
    modules: dict[Path, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("slow") is not None:
            modules.setdefault(item.path, []).append(item)
    slow = sorted(modules.values(), key=lambda tests: max(map(_limit, tests)), reverse=True)
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    ordered: list[pytest.Item] = []
    for worker in range(workers):
        end = len(items) * (worker + 1) // workers
        ordered += (item for tests in slow[worker::workers] for item in tests)
        taken = max(end - len(ordered), 0) if worker + 1 < workers else len(quick)
        ordered += quick[:taken]
        del quick[:taken]
    items[:] = ordered


def _limit(item: pytest.Item) -> float:
    """Seconds that a test may take; 0 for the default."""
    marker = item.get_closest_marker("timeout")
    return float(marker.args[0]) if marker is not None and marker.args else 0.0


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Tests that draw tensors give the same ones every time, alone or in the whole run."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_group_left() -> Iterator[None]:
    """The parent may join a group of one rank, but must leave it: forked ranks would inherit a broken one."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        pytest.fail("the test left the default process group initialised")
