"""Equally spaced levels between the two ends of a block: ``centroids="minmax"``.

The codes are ``round((v - min) / step)`` with ``step = (max - min) / (2**b - 1)``. Offset and step are then fitted
again to the codes, by least squares: for codes q with mean q', values v with mean v',

    step   = sum((q - q') * (v - v')) / sum((q - q') ** 2)
    offset = v' - step * q'

so that the error energy is below the energy of the block, which the ends of the range alone would not ensure. Should
rounding offset and step to bfloat16 spoil that, the block is sent as its mean.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compactdist.errors import CodecConfigError
from compactdist.kernels import reference as kernels
from compactdist.kernels.sections import Sections

_SMALLEST = 2.0**-87


def wanted(codec_id: str, centroids: str, scales: str) -> bool:
    """Whether the options ask for levels between the two ends of a block.

    Raises:
        CodecConfigError: They do, but without ``scales="block"``.
    """
    if centroids == "minmax" and scales != "block":
        raise CodecConfigError(f"codec {codec_id!r}: centroids='minmax' needs scales='block', got scales={scales!r}")
    return centroids == "minmax"


def encode(values: Tensor, amax: Tensor, sections: Sections) -> Tensor:
    """Encode float32 ``(G, 1, L)``, each group a block; ``amax`` is ``(G, 1, 1)``."""
    factor = kernels.power_of_two_near_inverse(amax)
    v = values * factor
    last = float((1 << sections.bits) - 1)
    low, high = v.amin(2, keepdim=True), v.amax(2, keepdim=True)
    step = (high - low) / last
    one = torch.ones((), dtype=torch.float32, device=v.device)
    codes = ((v - low) * kernels.divide_or_zero(one, step)).round_().clamp_(0, last)
    count = float(sections.channels)
    mean_v, mean_q = kernels.row_sums(v) / count, kernels.row_sums(codes) / count
    dq = codes - mean_q
    above = kernels.row_sums(dq * (v - mean_v)).clamp_(min=0)
    c = _rounded(kernels.divide_or_zero(above, kernels.row_sums(dq * dq)), factor)
    a = _rounded(mean_v - c * mean_q, factor)
    error = v - (a + codes * c)
    worse = kernels.row_sums(error * error) >= kernels.row_sums(v * v)
    c = torch.where(worse, torch.zeros_like(c), c)
    a = torch.where(worse, _rounded(mean_v, factor), a)
    payload = torch.zeros(sections.total_nbytes, dtype=torch.uint8, device=v.device)
    payload[: sections.codes_nbytes] = kernels.pack_codes(codes.to(torch.uint8).view(-1), sections.bits)
    c_bytes = kernels.encode_bf16(c / factor)
    payload[sections.channel_scales_at :][: c_bytes.numel()] = c_bytes
    a_bytes = kernels.encode_signed_bf16(a / factor)
    payload[_offsets_at(sections) :][: a_bytes.numel()] = a_bytes
    return payload


def decode(payload: Tensor, sections: Sections) -> Tensor:
    """Decode to float32 ``(G, 1, L)``."""
    c = kernels.decode_bf16(payload[sections.channel_scales_at :][: 2 * sections.groups]).view(-1, 1, 1)
    a = kernels.decode_bf16(payload[_offsets_at(sections) :][: 2 * sections.groups]).view(-1, 1, 1)
    codes = kernels.unpack_codes(payload[: sections.codes_nbytes], sections.bits, sections.elements)
    return (codes.to(torch.float32).view(sections.groups, 1, sections.channels) * c).add_(a)


def _offsets_at(sections: Sections) -> int:
    return (sections.channel_scales_at + sections.total_nbytes) // 2


def _rounded(value: Tensor, factor: Tensor) -> Tensor:
    """Round to bfloat16, to nearest; a value that would be almost subnormal in the payload becomes zero."""
    return kernels.round_signed_bf16(value, _SMALLEST * factor)
