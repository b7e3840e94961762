"""Tiny text-to-video pipelines. Each function returns a pipeline and the arguments to call it with."""

from __future__ import annotations

from typing import Any

from compactdist_harness.tiny.parts import (
    HEAD_DIM,
    HEADS,
    TEXT_CHANNELS,
    TEXT_TOKENS,
    Noise,
    randomised,
    without_text_encoders,
)

SIDE = 64  # pixels, of height and width
FRAMES = 9


def cogvideox(noise: Noise) -> tuple[Any, dict[str, Any]]:
    from diffusers import (
        AutoencoderKLCogVideoX,
        CogVideoXDDIMScheduler,
        CogVideoXPipeline,
        CogVideoXTransformer3DModel,
    )

    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=4,
        out_channels=4,
        time_embed_dim=16,
        text_embed_dim=TEXT_CHANNELS,
        num_layers=4,
        sample_width=SIDE // 8,
        sample_height=SIDE // 8,
        sample_frames=FRAMES,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=TEXT_TOKENS,
        use_rotary_positional_embeddings=True,
    )
    vae = AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2
    )
    pipe = without_text_encoders(
        CogVideoXPipeline,
        vae=vae.eval(),
        transformer=randomised(transformer),
        scheduler=CogVideoXDDIMScheduler(),
    )
    return pipe, {
        # xDiT's wrapper of this pipeline has no default for the two prompts.
        "prompt": None,
        "negative_prompt": None,
        "prompt_embeds": noise.text(),
        "negative_prompt_embeds": noise.text(),
        "latents": noise(3, 4, SIDE // 8, SIDE // 8),
        "height": SIDE,
        "width": SIDE,
        "num_frames": FRAMES,
        "guidance_scale": 6.0,
        "max_sequence_length": TEXT_TOKENS,
    }


def wan(noise: Noise) -> tuple[Any, dict[str, Any]]:
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel

    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=16,
        out_channels=16,
        text_dim=TEXT_CHANNELS,
        freq_dim=64,
        ffn_dim=256,
        num_layers=3,
        rope_max_seq_len=32,
    )
    pipe = without_text_encoders(
        WanPipeline,
        vae=AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=randomised(transformer),
    )
    return pipe, {
        "prompt_embeds": noise.text(),
        "negative_prompt_embeds": noise.text(),
        "latents": noise(16, 3, SIDE // 8, SIDE // 8),
        "height": SIDE,
        "width": SIDE,
        "num_frames": FRAMES,
        "guidance_scale": 5.0,
    }
