"""A request is what it would be in a process of its own, whatever ran before it or in its middle: bit for bit."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from tests.integrations.xdit.ranks import run_worker

if any(importlib.util.find_spec(name) is None for name in ("xfuser", "triton", "yunchang")):
    pytest.skip("xfuser is not installed", allow_module_level=True)

from safetensors.torch import load_file

pytestmark = [pytest.mark.xdit, pytest.mark.slow, pytest.mark.timeout(300)]

TOGETHER = "ring 0+1, ring 0(1), pipefusion 0+1"
# The order of routes differs: what comes first in a process is beyond doubt fresh.
ALONE = ("ring 0, pipefusion 0", "pipefusion 1, ring 1")


def run(out: Path, plan: str) -> dict[str, torch.Tensor]:
    run_worker("requests_worker.py", out, plan, timeout=180)
    return load_file(out)


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    return run(tmp_path_factory.mktemp("together") / "latents.safetensors", TOGETHER)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    folder = tmp_path_factory.mktemp("alone")
    runs = [run(folder / f"{number}.safetensors", plan) for number, plan in enumerate(ALONE)]
    return runs[0] | runs[1]


@pytest.mark.parametrize("route", ["ring", "pipefusion"])
def test_two_requests_in_a_row_are_two_fresh_processes(
    together: dict[str, torch.Tensor], alone: dict[str, torch.Tensor], route: str
) -> None:
    for request in (0, 1):
        assert torch.equal(together[f"{route} {request}"], alone[f"{route} {request}"])
    # and the requests differ from each other, and from what no codec touched
    assert not torch.allclose(together[f"{route} 0"], together[f"{route} 1"], rtol=0.1)
    assert not torch.equal(together[f"{route} 0"], together[f"{route} 0 uncompressed"])


def test_a_request_inside_another_is_as_alone(
    together: dict[str, torch.Tensor], alone: dict[str, torch.Tensor]
) -> None:
    assert torch.equal(together["ring 0 outside"], alone["ring 0"])
    assert torch.equal(together["ring 1 inside"], alone["ring 1"])
