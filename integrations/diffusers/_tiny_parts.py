"""What the tiny models have in common: sizes, inputs drawn from a fixed seed, random weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

HEADS = 4
HEAD_DIM = 32
TEXT_TOKENS = 16
TEXT_CHANNELS = 32


class Noise:
    """Draws the inputs of a call, the same for the same batch; `batch` is put before every shape."""

    def __init__(self, batch: int) -> None:
        self.batch = batch
        self._generator = torch.Generator().manual_seed(2)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(self.batch, *shape, generator=self._generator)

    def text(self) -> Tensor:
        return self(TEXT_TOKENS, TEXT_CHANNELS)

    def mask(self) -> Tensor:
        """Every text token counts."""
        return torch.ones(self.batch, TEXT_TOKENS, dtype=torch.long)


def randomised(transformer: Any) -> Any:
    """Fill every matrix with noise.

    Diffusers begins with zeros where a block feeds its residual stream; left at that, what the ranks exchange would
    have no effect on the result.
    """
    generator = torch.Generator().manual_seed(1)
    for parameter in transformer.parameters():
        if parameter.ndim >= 2:
            std = max(0.05, parameter[0].numel() ** -0.5)
            parameter.data.normal_(0, std, generator=generator)
    return transformer.eval().requires_grad_(False)
