"""The tensor's own bytes: for keyframes, and for tensors that must arrive bit for bit.

Payload: the elements in row-major order in the machine's byte order, then zeros up to a multiple of 16 bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from compactdist.codecs.base import About, Codec, check_payload
from compactdist.codecs.registry import register
from compactdist.codecs.shapes import padded_nbytes


@register
class Raw(Codec):
    """Lossless copy of a tensor of any dtype; NaN payloads and the sign of zero survive."""

    codec_id = "raw"
    about = About(
        sends="the tensor's own bytes",
        use="keyframes; tensors that must arrive bit for bit",
        source="",
    )
    lossless = True

    def payload_nbytes(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        return padded_nbytes(math.prod(shape) * dtype.itemsize)

    def encode(self, x: Tensor) -> Tensor:
        # A conjugated or negated view keeps its sign flips outside memory: resolve them before taking bytes.
        flat = x.detach().resolve_conj().resolve_neg().reshape(-1)
        payload = torch.zeros(self.payload_nbytes(x.shape, x.dtype), dtype=torch.uint8, device=x.device)
        payload[: flat.numel() * x.dtype.itemsize].view(x.dtype).copy_(flat)
        return payload

    def decode(self, payload: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        payload = check_payload(payload, self.payload_nbytes(shape, dtype), self.codec_id)
        # The clone gives the result memory of its own, aligned for any dtype wherever the payload began.
        data = payload[: math.prod(shape) * dtype.itemsize].clone()
        return data.view(dtype).reshape(tuple(shape))
