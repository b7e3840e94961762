"""Transformers whose pipelines the harness does not build: each alone, in a denoising loop of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")

import diffusers

import compactdist_diffusers
from compactdist_harness.cpu import diffusers as diffusers_on_cpu
from compactdist_harness.tiny.parts import HEAD_DIM, HEADS, TEXT_CHANNELS, TEXT_TOKENS, randomised
from tests.integrations.diffusers.kit import config, relative_error
from tests.launch import run_ranks

pytestmark = [
    pytest.mark.xdit,
    pytest.mark.slow,
    pytest.mark.timeout(120),
    pytest.mark.filterwarnings("ignore"),
]

STEPS = 5
LAYERS = 2


def noise(*shape: int) -> Tensor:
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(3))


def grid(*sizes: int) -> Tensor:
    """Coordinates of tokens, four for each."""
    axes = [torch.arange(size) for size in sizes]
    return torch.cartesian_prod(*axes).float()


def flux2() -> tuple[Any, Tensor, dict[str, Any]]:
    model = diffusers.Flux2Transformer2DModel(
        in_channels=16,
        num_layers=LAYERS,
        num_single_layers=1,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=TEXT_CHANNELS,
        axes_dims_rope=(8, 8, 8, 8),
    )
    return (
        model,
        noise(64, 16),
        {
            "encoder_hidden_states": noise(TEXT_TOKENS, TEXT_CHANNELS),
            "img_ids": grid(1, 8, 8, 1)[None],
            "txt_ids": grid(1, 1, 1, TEXT_TOKENS)[None],
            "guidance": torch.tensor([4.0]),
        },
    )


def ltx() -> tuple[Any, Tensor, dict[str, Any]]:
    model = diffusers.LTXVideoTransformer3DModel(
        in_channels=16,
        out_channels=16,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        cross_attention_dim=HEADS * HEAD_DIM,
        num_layers=LAYERS,
        caption_channels=TEXT_CHANNELS,
    )
    return (
        model,
        noise(64, 16),
        {
            "encoder_hidden_states": noise(TEXT_TOKENS, TEXT_CHANNELS),
            "encoder_attention_mask": None,
            "num_frames": 4,
            "height": 4,
            "width": 4,
        },
    )


def chronoedit() -> tuple[Any, Tensor, dict[str, Any]]:
    model = diffusers.ChronoEditTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=16,
        out_channels=16,
        text_dim=TEXT_CHANNELS,
        freq_dim=32,
        ffn_dim=64,
        num_layers=LAYERS,
        rope_max_seq_len=64,
    )
    return model, noise(16, 3, 8, 8), {"encoder_hidden_states": noise(TEXT_TOKENS, TEXT_CHANNELS)}


def drawn(model: Any, start: Tensor, inputs: dict[str, Any]) -> Tensor:
    x = start
    for timestep in torch.linspace(1, 0.2, STEPS):
        moved = model(hidden_states=x, timestep=timestep[None], return_dict=False, **inputs)[0]
        x = x - 0.1 * moved
    return x


@pytest.mark.parametrize("make", [flux2, ltx, chronoedit])
def test_a_transformer_alone(make: Callable[[], tuple[Any, Tensor, dict[str, Any]]]) -> None:
    def body(rank: int, size: int) -> None:
        diffusers_on_cpu.install()
        for route in ("ring", "ulysses"):
            torch.manual_seed(0)
            model, start, inputs = make()
            randomised(model)
            expected = drawn(model, start, inputs)
            model.enable_parallelism(config=config(route, size))
            plain = drawn(model, start, inputs)
            assert relative_error(plain, expected) < 1e-5, route
            with compactdist_diffusers.enable(model, codec="raw"):
                assert relative_error(drawn(model, start, inputs), plain) <= 1e-6, route
            with compactdist_diffusers.enable(model, codec="int4") as handle:
                assert 1e-7 < relative_error(drawn(model, start, inputs), plain) < 2e-2, route
                sites = handle.stats()[route].sites
            assert sites, route
            assert all((site.calls, site.keyframes) == (STEPS, 1) for site in sites.values()), route

    run_ranks(body, timeout=100)
