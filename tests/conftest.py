"""What every test shares: one torch thread, reproducible hypothesis runs, no process group left behind."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
import torch.distributed
from hypothesis import HealthCheck, settings

# The multi-rank launcher forks, which is sound only while no thread pool exists: so before any operation.
torch.set_num_threads(1)

_common = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
settings.register_profile("ci", _common, derandomize=True, max_examples=50)
settings.register_profile("explore", _common, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


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
