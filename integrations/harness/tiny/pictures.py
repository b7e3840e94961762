"""Tiny text-to-picture pipelines. Each function returns a pipeline and the arguments to call it with."""

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

SIDE = 128  # pixels, of height and width


def flux(noise: Noise) -> tuple[Any, dict[str, Any]]:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=TEXT_CHANNELS,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )
    pipe = without_text_encoders(
        FluxPipeline,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=picture_vae(latent_channels=4, sample_size=SIDE, shift_factor=0.0),
        transformer=randomised(transformer),
    )
    return pipe, {
        "prompt_embeds": noise.text(),
        "pooled_prompt_embeds": noise(32),
        "latents": noise(64, 16),
        "height": SIDE,
        "width": SIDE,
        "guidance_scale": 3.5,
        "max_sequence_length": TEXT_TOKENS,
    }


def sd3(noise: Noise) -> tuple[Any, dict[str, Any]]:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=TEXT_CHANNELS,
        caption_projection_dim=HEADS * HEAD_DIM,
        pooled_projection_dim=32,
        pos_embed_max_size=16,
    )
    pipe = without_text_encoders(
        StableDiffusion3Pipeline,
        transformer=randomised(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=picture_vae(latent_channels=4, sample_size=SIDE, shift_factor=0.0),
    )
    return pipe, {
        "prompt_embeds": noise.text(),
        "negative_prompt_embeds": noise.text(),
        "pooled_prompt_embeds": noise(32),
        "negative_pooled_prompt_embeds": noise(32),
        "latents": noise(4, 16, 16),
        "height": SIDE,
        "width": SIDE,
        "guidance_scale": 4.0,
    }


def pixart(noise: Noise) -> tuple[Any, dict[str, Any]]:
    from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel

    transformer = PixArtTransformer2DModel(
        sample_size=16,
        num_layers=4,
        patch_size=2,
        in_channels=4,
        out_channels=8,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        cross_attention_dim=HEADS * HEAD_DIM,
        caption_channels=TEXT_CHANNELS,
        use_additional_conditions=False,
    )
    pipe = without_text_encoders(
        PixArtAlphaPipeline,
        vae=picture_vae(latent_channels=4, sample_size=SIDE, shift_factor=0.0),
        transformer=randomised(transformer),
        scheduler=DPMSolverMultistepScheduler(),
    )
    return pipe, {
        # xDiT's wrapper of this pipeline has no default for the two prompts.
        "prompt": None,
        "negative_prompt": None,
        "prompt_embeds": noise.text(),
        "prompt_attention_mask": noise.mask(),
        "negative_prompt_embeds": noise.text(),
        "negative_prompt_attention_mask": noise.mask(),
        "latents": noise(4, 16, 16),
        "height": SIDE,
        "width": SIDE,
        "guidance_scale": 4.5,
        "use_resolution_binning": False,
    }


def qwenimage(noise: Noise) -> tuple[Any, dict[str, Any]]:
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )

    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=3,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=TEXT_CHANNELS,
        axes_dims_rope=(8, 12, 12),
    )
    pipe = without_text_encoders(
        QwenImagePipeline,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=AutoencoderKLQwenImage(base_dim=3, dim_mult=[1, 1, 1, 1], num_res_blocks=1).eval(),
        transformer=randomised(transformer),
    )
    return pipe, {
        "prompt_embeds": noise.text(),
        "prompt_embeds_mask": noise.mask(),
        "negative_prompt_embeds": noise.text(),
        "negative_prompt_embeds_mask": noise.mask(),
        "latents": noise(64, 16),
        "height": SIDE,
        "width": SIDE,
        "true_cfg_scale": 4.0,
    }


def pixart_sigma(noise: Noise) -> tuple[Any, dict[str, Any]]:
    from diffusers import PixArtSigmaPipeline

    alpha, call_kwargs = pixart(noise)
    parts = {name: alpha.components[name] for name in ("vae", "transformer", "scheduler")}
    return without_text_encoders(PixArtSigmaPipeline, **parts), call_kwargs


def hunyuandit(noise: Noise) -> tuple[Any, dict[str, Any]]:
    from diffusers import DPMSolverMultistepScheduler, HunyuanDiT2DModel, HunyuanDiTPipeline

    transformer = HunyuanDiT2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        num_layers=4,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        hidden_size=HEADS * HEAD_DIM,
        cross_attention_dim=TEXT_CHANNELS,
        cross_attention_dim_t5=TEXT_CHANNELS,
        pooled_projection_dim=32,
        text_len=TEXT_TOKENS,
        text_len_t5=TEXT_TOKENS,
    )
    pipe = without_text_encoders(
        HunyuanDiTPipeline,
        vae=picture_vae(latent_channels=4, sample_size=SIDE, shift_factor=0.0),
        transformer=randomised(transformer),
        scheduler=DPMSolverMultistepScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    texts = {
        f"{negative}prompt_{what}{suffix}": noise.text() if what == "embeds" else noise.mask()
        for suffix in ("", "_2")
        for negative in ("", "negative_")
        for what in ("embeds", "attention_mask")
    }
    return pipe, {
        **texts,
        "latents": noise(4, 16, 16),
        "height": SIDE,
        "width": SIDE,
        "guidance_scale": 5.0,
        "use_resolution_binning": False,
    }


def lumina2(noise: Noise) -> tuple[Any, dict[str, Any]]:
    from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Pipeline, Lumina2Transformer2DModel

    transformer = Lumina2Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        hidden_size=HEADS * HEAD_DIM,
        num_layers=3,
        num_refiner_layers=1,
        num_attention_heads=HEADS,
        num_kv_heads=HEADS // 2,
        multiple_of=32,
        axes_dim_rope=(8, 12, 12),
        axes_lens=(32, 32, 32),
        cap_feat_dim=TEXT_CHANNELS,
    )
    pipe = without_text_encoders(
        Lumina2Pipeline,
        transformer=randomised(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=picture_vae(latent_channels=4, sample_size=SIDE, shift_factor=0.0),
    )
    return pipe, {
        "prompt_embeds": noise.text(),
        "prompt_attention_mask": noise.mask(),
        "negative_prompt_embeds": noise.text(),
        "negative_prompt_attention_mask": noise.mask(),
        "latents": noise(4, 16, 16),
        "height": SIDE,
        "width": SIDE,
        "guidance_scale": 4.0,
    }


def flux2(noise: Noise) -> tuple[Any, dict[str, Any]]:
    from diffusers import (
        AutoencoderKLFlux2,
        FlowMatchEulerDiscreteScheduler,
        Flux2Pipeline,
        Flux2Transformer2DModel,
    )

    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=TEXT_CHANNELS,
        axes_dims_rope=(8, 8, 8, 8),
    )
    vae = AutoencoderKLFlux2(
        block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=4, latent_channels=4, sample_size=SIDE
    )
    pipe = without_text_encoders(
        Flux2Pipeline,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae.eval(),
        transformer=randomised(transformer),
    )
    return pipe, {
        "prompt_embeds": noise.text(),
        "latents": noise(16, 8, 8),
        "height": SIDE,
        "width": SIDE,
        "guidance_scale": 4.0,
        "max_sequence_length": TEXT_TOKENS,
    }
