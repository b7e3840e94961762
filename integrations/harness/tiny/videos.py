"""Tiny text-to-video pipelines. Each function returns a pipeline and the arguments to call it with."""

from __future__ import annotations

from typing import Any

from compactdist_harness.tiny.parts import (
    HEAD_DIM,
    HEADS,
    TEXT_CHANNELS,
    TEXT_TOKENS,
    Noise,
    picture_vae,
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


def latte(noise: Noise) -> tuple[Any, dict[str, Any]]:
    from diffusers import DDIMScheduler, LattePipeline, LatteTransformer3DModel

    frames = 4
    transformer = LatteTransformer3DModel(
        sample_size=64,  # diffusers divides positions by a 64th of it, rounded down
        patch_size=2,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        cross_attention_dim=HEADS * HEAD_DIM,
        caption_channels=TEXT_CHANNELS,
        norm_type="ada_norm_single",
        num_embeds_ada_norm=1000,
        attention_bias=True,
        norm_elementwise_affine=False,
        video_length=frames,
    )
    pipe = without_text_encoders(
        LattePipeline,
        vae=picture_vae(latent_channels=4, sample_size=SIDE),
        transformer=randomised(transformer),
        scheduler=DDIMScheduler(beta_schedule="linear", clip_sample=False),
    )
    return pipe, {
        # Its default is a text, which excludes embeddings.
        "negative_prompt": None,
        "prompt_embeds": noise.text(),
        "negative_prompt_embeds": noise.text(),
        "latents": noise(4, frames, SIDE // 8, SIDE // 8),
        "height": SIDE,
        "width": SIDE,
        "video_length": frames,
        "guidance_scale": 7.5,
        "clean_caption": False,
        "mask_feature": False,
    }


def hunyuanvideo(noise: Noise) -> tuple[Any, dict[str, Any]]:
    from diffusers import (
        AutoencoderKLHunyuanVideo,
        FlowMatchEulerDiscreteScheduler,
        HunyuanVideoPipeline,
        HunyuanVideoTransformer3DModel,
    )

    transformer = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=TEXT_CHANNELS,
        pooled_projection_dim=32,
        rope_axes_dim=(8, 12, 12),
    )
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
    )
    pipe = without_text_encoders(
        HunyuanVideoPipeline,
        vae=vae.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=randomised(transformer),
    )
    return pipe, {
        "prompt_embeds": noise.text(),
        "pooled_prompt_embeds": noise(32),
        "prompt_attention_mask": noise.mask(),
        "latents": noise(4, 3, SIDE // 8, SIDE // 8),
        "height": SIDE,
        "width": SIDE,
        "num_frames": FRAMES,
        "guidance_scale": 6.0,
    }


def ltx(noise: Noise) -> tuple[Any, dict[str, Any]]:
    from diffusers import (
        AutoencoderKLLTXVideo,
        FlowMatchEulerDiscreteScheduler,
        LTXPipeline,
        LTXVideoTransformer3DModel,
    )

    transformer = LTXVideoTransformer3DModel(
        in_channels=16,
        out_channels=16,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        cross_attention_dim=HEADS * HEAD_DIM,
        num_layers=3,
        caption_channels=TEXT_CHANNELS,
    )
    vae = AutoencoderKLLTXVideo(
        latent_channels=16,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
    )
    side = 2 * SIDE  # the VAE halves it five times
    pipe = without_text_encoders(
        LTXPipeline,
        vae=vae.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=randomised(transformer),
    )
    return pipe, {
        "prompt_embeds": noise.text(),
        "prompt_attention_mask": noise.mask(),
        "negative_prompt_embeds": noise.text(),
        "negative_prompt_attention_mask": noise.mask(),
        "latents": noise(3 * 16, 16),
        "height": side,
        "width": side,
        "num_frames": 17,
        "guidance_scale": 3.0,
    }
