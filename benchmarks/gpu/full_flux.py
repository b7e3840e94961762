"""A diffusers FLUX pipeline of full width and few blocks on the current GPU.

Weights are random, in bfloat16; nothing is downloaded. 24 heads of 128 channels, 512 tokens of text and 4,096 of a
picture of 1024 x 1024, as FLUX.1 has them.
"""

from __future__ import annotations

from typing import Any

import torch

TEXT_TOKENS, TEXT_CHANNELS, POOLED_CHANNELS = 512, 4096, 768
PICTURE_TOKENS, PICTURE_CHANNELS, SIDE = 4096, 64, 1024


def build(steps: int, double: int, single: int) -> tuple[Any, dict[str, Any]]:
    """The pipeline, and the arguments to call it with.

    Args:
        steps: of a call.
        double: blocks of two streams, 19 in FLUX.1.
        single: blocks of one, 38 in FLUX.1.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    torch.manual_seed(0)
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=_transformer(double, single),
    )
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator("cuda").manual_seed(1)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device="cuda").bfloat16()

    return pipe, {
        "prompt_embeds": noise(1, TEXT_TOKENS, TEXT_CHANNELS),
        "pooled_prompt_embeds": noise(1, POOLED_CHANNELS),
        "latents": noise(1, PICTURE_TOKENS, PICTURE_CHANNELS),
        "height": SIDE,
        "width": SIDE,
        "guidance_scale": 3.5,
        "max_sequence_length": TEXT_TOKENS,
        "num_inference_steps": steps,
        "output_type": "latent",
        "return_dict": False,
    }


def _transformer(double: int, single: int) -> Any:
    from diffusers import FluxTransformer2DModel

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)  # made in float32, a whole one would need twice the memory for a moment
    try:
        with torch.device("cuda"):
            made = FluxTransformer2DModel(
                patch_size=1,
                in_channels=PICTURE_CHANNELS,
                num_layers=double,
                num_single_layers=single,
                attention_head_dim=128,
                num_attention_heads=24,
                joint_attention_dim=TEXT_CHANNELS,
                pooled_projection_dim=POOLED_CHANNELS,
                guidance_embeds=True,
                axes_dims_rope=(16, 56, 56),
            )
    finally:
        torch.set_default_dtype(before)
    return made.to("cuda", torch.bfloat16).eval().requires_grad_(False)


def _vae() -> Any:
    """Never called, as latents are asked for; the pipeline reads its configuration."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=16,
        sample_size=SIDE // 8,
        shift_factor=0.0,
    ).to("cuda", torch.bfloat16)
