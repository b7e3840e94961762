"""What the tiny models have in common: sizes, a picture's pipeline parts, inputs from a fixed seed, random weights."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

HEADS = 4
HEAD_DIM = 32
TEXT_TOKENS = 16
TEXT_CHANNELS = 32


class Noise:
    """Draws the tensors that a pipeline is called with. Two `Noise` objects of one batch draw the same tensors.

    Args:
        batch: prompts of a call; the first dimension of every tensor.
    """

    def __init__(self, batch: int) -> None:
        self.batch = batch
        self._generator = torch.Generator().manual_seed(2)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(self.batch, *shape, generator=self._generator)

    def text(self) -> Tensor:
        """The embeddings of a prompt, `(B, TEXT_TOKENS, TEXT_CHANNELS)`."""
        return self(TEXT_TOKENS, TEXT_CHANNELS)

    def mask(self) -> Tensor:
        """A mask of the prompt's tokens, `(B, TEXT_TOKENS)`, that leaves none of them out."""
        return torch.ones(self.batch, TEXT_TOKENS, dtype=torch.long)


def randomised(model: Any) -> Any:
    """Fill every matrix of `model` with noise, and return `model` without gradients.

    diffusers fills with zeros the matrices by which a block adds to its residual stream. Left at zero, the tensors that
    ranks exchange would have no effect on the result.
    """
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            std = max(0.05, parameter[0].numel() ** -0.5)
            parameter.data.normal_(0, std, generator=generator)
    return model.eval().requires_grad_(False)


def picture_vae(latent_channels: int, sample_size: int, **options: Any) -> Any:
    """A VAE that halves height and width three times.

    Called only by pipelines of a saved folder. Others read its scale factor, 8, and its configuration.
    """
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=latent_channels,
        sample_size=sample_size,
        **options,
    ).eval()


def without_text_encoders(pipeline: type, **components: Any) -> Any:
    """A pipeline of these components, whose text encoders and tokenizers are `None`: the call passes embeddings."""
    names = inspect.signature(pipeline.__init__).parameters
    absent = {name: None for name in names if name.startswith(("text_encoder", "tokenizer"))}
    return pipeline(**absent, **components)
