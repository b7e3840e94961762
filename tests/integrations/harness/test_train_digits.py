"""The training script: its packing is FluxPipeline's, and a run limited by time can be repeated by steps."""

from __future__ import annotations

import importlib.util
from argparse import Namespace
from pathlib import Path
from types import ModuleType

import pytest
import torch

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = Path(__file__).parents[3] / "tools" / "train_digits.py"
    spec = importlib.util.spec_from_file_location("train_digits", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_packing_is_that_of_flux_pipeline(script: ModuleType) -> None:
    images = torch.randn(3, 1, 16, 16)
    tokens = script.pack(images)
    assert torch.equal(tokens, diffusers.FluxPipeline._pack_latents(images, 3, 1, 16, 16))
    assert torch.equal(script.unpack(tokens), images)


def test_positions_are_those_of_flux_pipeline(script: ModuleType) -> None:
    expected = diffusers.FluxPipeline._prepare_latent_image_ids(1, 8, 8, "cpu", torch.float32)
    assert torch.equal(script.position_ids()[0], expected)


def test_images_fill_the_range(script: ModuleType) -> None:
    images, labels = script.digits()
    assert images.shape == (1797, 1, 16, 16)
    assert labels.shape == (1797,)
    assert images.min() == -1
    assert images.max() == 1


@pytest.mark.parametrize("noticed_at", [0, 1, 299, 300, 301])
def test_run_limited_by_time_has_the_rates_of_a_run_by_steps(script: ModuleType, noticed_at: int) -> None:
    by_time = script.Schedule(1e-3, None)
    rates = [by_time.rate(step) for step in range(noticed_at)]
    by_time.fix_length(noticed_at)
    rates += [by_time.rate(step) for step in range(noticed_at, by_time.steps)]
    by_steps = script.Schedule(1e-3, by_time.steps)
    assert rates == [by_steps.rate(step) for step in range(by_steps.steps)]


def test_training_is_repeatable(script: ModuleType) -> None:
    args = Namespace(seed=3, steps=4, minutes=25.0, batch=8, lr=1e-3, log_every=100)
    first, steps = script.train(args)
    second, _ = script.train(args)
    assert steps == 4
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
