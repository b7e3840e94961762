"""The small trained FLUX model that draws handwritten digits (made by `tools/train_digits.py`).

It is an ordinary diffusers `FluxPipeline`: code that runs it runs any FLUX checkpoint. Its latents are the picture
itself, 16x16 with one channel. The pipeline needs a VAE and never calls it, so the VAE is untrained.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compactdist_harness.tiny.parts import picture_vae, without_text_encoders

CHECKPOINT = Path(__file__).parent / "assets" / "digits_flux.safetensors"
CLASSES = 10
STEPS = 28
SEED = 0
_VAE_SCALE = 8  # FluxPipeline divides height and width by this to get the size of the latents


def load_digits_pipeline(
    path: str | Path | None = None, *, seed: int = SEED, steps: int = STEPS
) -> tuple[Any, dict[str, Any]]:
    """The pipeline and the arguments of a call that draws the digits 0 to 9 as one batch.

    `pipe(**call_kwargs)[0]` is the tensor of packed latents `(10, 64, 4)`, float32, which `decode_latents` makes into
    pictures. `seed` fixes the initial noise, which is passed as `latents`: repeated calls and all ranks draw the same
    digits.

    Args:
        path: the checkpoint; `None`: the one in this package.
        seed: of the initial noise.
        steps: denoising steps.

    Raises:
        FileNotFoundError: no checkpoint at `path`.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from safetensors import safe_open

    path = Path(path) if path is not None else CHECKPOINT
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; make it with: python tools/train_digits.py --out {path}")
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    prompt_embeds = tensors.pop("prompt_embeds")
    pooled_prompt_embeds = tensors.pop("pooled_prompt_embeds")
    side = int(metadata["image_side"])

    with torch.random.fork_rng(devices=[]):  # modules draw their first weights from the global generator
        transformer = FluxTransformer2DModel(**json.loads(metadata["config"]))
        vae = picture_vae(latent_channels=1, sample_size=side * _VAE_SCALE)
    transformer.load_state_dict({name.removeprefix("transformer."): value for name, value in tensors.items()})
    pipe = without_text_encoders(
        FluxPipeline,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=vae,
        transformer=transformer.eval().requires_grad_(False),
    )
    pipe.set_progress_bar_config(disable=True)

    call_kwargs = {
        "prompt_embeds": prompt_embeds,
        "pooled_prompt_embeds": pooled_prompt_embeds,
        "max_sequence_length": prompt_embeds.shape[1],
        "height": side * _VAE_SCALE,
        "width": side * _VAE_SCALE,
        "num_inference_steps": steps,
        "latents": noise_latents(seed, side),
        "output_type": "latent",
        "return_dict": False,
    }
    return pipe, call_kwargs


def noise_latents(seed: int, side: int = 16) -> Tensor:
    """The initial noise of the ten digits, packed as FLUX packs latents: `(10, side * side / 4, 4)`."""
    from diffusers import FluxPipeline

    noise = torch.randn(CLASSES, 1, side, side, generator=torch.Generator().manual_seed(seed))
    return FluxPipeline._pack_latents(noise, CLASSES, 1, side, side)


def decode_latents(latents: Tensor) -> Tensor:
    """Packed latents `(B, 64, 4)` -> pictures `(B, 16, 16)`, float32 from 0 (paper) to 1 (ink).

    Raises:
        ValueError: latents of another shape.
    """
    b, tokens, channels = latents.shape
    grid = round(tokens**0.5)
    if grid * grid != tokens or channels != 4:
        raise ValueError(f"expected packed one-channel latents (B, n * n, 4), got {tuple(latents.shape)}")
    pixels = latents.float().view(b, grid, grid, 2, 2).permute(0, 1, 3, 2, 4).reshape(b, 2 * grid, 2 * grid)
    return (pixels.clamp(-1, 1) + 1) / 2
