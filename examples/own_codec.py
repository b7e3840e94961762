"""A codec of one's own: eight bits an element and one scale for the whole tensor.

    python examples/own_codec.py                                    # does it keep the contract?
    compactdist evaluate benchmarks/traces/digits_ring.safetensors --import examples/own_codec.py \
        --codec one_scale --codec int8                              # what does it lose on recorded activations?
    compactdist bench codecs --import examples/own_codec.py --codec one_scale --codec int8    # what does it cost?

In a program, import the module on every rank and name the codec: ``compactdist.wrap(codec="one_scale:levels=15")``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from compactdist.codecs import Codec, register
from compactdist.codecs.base import check_payload, undisturbed
from compactdist.errors import CodecConfigError, NonFiniteError
from compactdist.testing import check_codec

FLOATS = torch.float32, torch.float16, torch.bfloat16, torch.float64


@register
class OneScale(Codec):
    """The payload: the scale, float32; a signed byte for each element; zeros up to a multiple of 16 bytes."""

    codec_id = "one_scale"

    def __init__(self, levels: int = 127) -> None:
        if isinstance(levels, bool) or not isinstance(levels, int) or not 1 <= levels <= 127:
            raise CodecConfigError(f"codec 'one_scale': levels must be an integer from 1 to 127, got {levels!r}")
        self.levels = levels

    def get_config(self) -> dict[str, Any]:
        """What both ends must agree on."""
        return {"levels": self.levels}

    def payload_nbytes(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        """Known from the shape alone, before a byte moves."""
        if dtype not in FLOATS:
            raise CodecConfigError(f"codec 'one_scale' takes floating-point tensors, got {dtype}")
        numel = math.prod(shape)
        return -(-(4 + numel) // 16) * 16 if numel else 0

    @undisturbed
    def encode(self, x: Tensor) -> Tensor:
        """May compute in any way, for no other rank repeats it."""
        payload = torch.zeros(self.payload_nbytes(x.shape, x.dtype), dtype=torch.uint8, device=x.device)
        if not x.numel():
            return payload
        flat = x.reshape(-1).float()
        if not bool(torch.isfinite(flat).all()):
            raise NonFiniteError("codec 'one_scale' was given NaN or infinity")
        scale = flat.abs().amax() / self.levels
        codes = torch.round(flat / scale.clamp(min=2.0**-120)).clamp(-self.levels, self.levels).to(torch.int8)
        payload[:4] = scale.view(1).view(torch.uint8)
        payload[4 : 4 + flat.numel()] = codes.view(torch.uint8)
        return payload

    @undisturbed
    def decode(self, payload: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Single operations on elements, so that every machine gets the same bits."""
        payload = check_payload(payload, self.payload_nbytes(shape, dtype), self.codec_id)
        numel = math.prod(shape)
        if not numel:
            return torch.empty(tuple(shape), dtype=dtype, device=payload.device)
        scale = payload[:4].clone().view(torch.float32)
        values = payload[4 : 4 + numel].view(torch.int8).float() * scale
        limit = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
        return values.clamp(-limit, limit).view(tuple(shape)).to(dtype)


if __name__ == "__main__":
    check_codec(OneScale(), examples=20)
    check_codec(OneScale(levels=15), examples=20)
    print("one_scale keeps the contract")
