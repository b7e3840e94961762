"""More models: pipelines, transformers alone, in a denoising loop of the test, and FLUX that starts from a picture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")

import diffusers

import compactdist_diffusers
from compactdist_harness import tiny
from compactdist_harness.cpu import diffusers as diffusers_on_cpu
from compactdist_harness.tiny.parts import HEAD_DIM, HEADS, TEXT_CHANNELS, TEXT_TOKENS, randomised
from tests.integrations.diffusers.kit import config, parallel, relative_error
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


@pytest.mark.parametrize(
    ("model", "route", "ranks"),
    [("flux2", "ring", 2), ("flux2", "ulysses", 2), ("flux2", "both", 4), ("ltx", "ring", 2)],
)
def test_a_pipeline(model: str, route: str, ranks: int) -> None:
    def body(rank: int, size: int) -> None:
        single, call_kwargs = tiny.build(model, steps=STEPS)
        expected = single(**call_kwargs)[0]
        pipe, call_kwargs = parallel(model, route, size, steps=STEPS)
        plain = pipe(**call_kwargs)[0]
        assert relative_error(plain, expected) < 1e-5
        with compactdist_diffusers.enable(pipe, codec="int4") as handle:
            assert 1e-7 < relative_error(pipe(**call_kwargs)[0], plain) < 2e-2
            stats = handle.stats()
        assert list(stats) == (["ring", "ulysses"] if route == "both" else [route])
        for group in stats.values():
            assert group.sites
            assert all((site.calls, site.keyframes) == (STEPS, 1) for site in group.sites.values())

    run_ranks(body, ranks, timeout=100)


@pytest.mark.parametrize(("model", "route"), [("ltx", "ulysses"), ("hunyuanvideo", "ring")])
def test_what_diffusers_cannot_run_uncompressed_either(model: str, route: str) -> None:
    """docs/integrations.md lists these: where a later diffusers can, they move to the test above."""

    def body(rank: int, size: int) -> None:
        pipe, call_kwargs = parallel(model, route, size, steps=STEPS)
        pipe(**call_kwargs)

    reason = "cp_plan" if model == "hunyuanvideo" else "must match the size of tensor"
    for outcome in run_ranks(body, timeout=60, expect_error=True):
        assert reason in outcome.error_text


@pytest.mark.parametrize("name", ["FluxImg2ImgPipeline", "FluxInpaintPipeline", "FluxKontextPipeline"])
def test_flux_with_a_picture_to_start_from(name: str) -> None:
    def body(rank: int, size: int) -> None:
        diffusers_on_cpu.install()
        picture, call_kwargs = tiny.build("flux", steps=STEPS)
        pipe = getattr(diffusers, name)(**picture.components)
        pipe.set_progress_bar_config(disable=True)
        side = call_kwargs["height"]
        call_kwargs["image"] = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(4))
        if name == "FluxKontextPipeline":
            call_kwargs |= {"max_area": side * side, "_auto_resize": False}
        else:
            del call_kwargs["latents"]
            call_kwargs["strength"] = 1.0
        if name == "FluxInpaintPipeline":
            call_kwargs["mask_image"] = torch.ones(1, 1, side, side)

        def draw() -> Tensor:
            return pipe(**call_kwargs, generator=torch.Generator().manual_seed(5))[0]

        expected = draw()
        pipe.transformer.enable_parallelism(config=config("ring", size))
        plain = draw()
        assert relative_error(plain, expected) < 1e-5
        with compactdist_diffusers.enable(pipe, codec="int4") as handle:
            assert 1e-7 < relative_error(draw(), plain) < 2e-2
            sites = handle.stats()["ring"].sites
        assert len(sites) == 4
        assert all((site.calls, site.keyframes) == (STEPS, 1) for site in sites.values())

    run_ranks(body, timeout=100)
