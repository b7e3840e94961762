"""What a quantizer's steps compute, by its spec: the definition, for every device and every value.

The encoder is free to choose scales and codes; it keeps three rules:

* the decoder's rounded ``t`` is used from the moment it exists, so later steps correct its rounding;
* nothing is divided by a scale that may be zero;
* a channel scale below 2**-87 becomes zero. Every product in the decoder then stays a normal float, and
  machines that flush subnormals agree with those that do not. Residuals that small (1e-26) are left for the
  receiver as they are.

Every element is coded so that the error energy of a group stays below its energy: signs by the least-squares scale,
integers and float8 because zero is a level and no element's error exceeds the element, the rest as
``scales.gaussian_scale`` says.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from compactdist.kernels.reference import codes, scales
from compactdist.kernels.reference.rows import row_sums
from compactdist.kernels.reference.scales import RowScales, divide_or_zero
from compactdist.kernels.sections import Sections
from compactdist.kernels.spec import FLOAT8, QuantizerSpec

__all__ = ["decode", "encode", "levels_of", "pack"]


def encode(spec: QuantizerSpec, values: Tensor, magnitude: Tensor, amax: Tensor, sections: Sections) -> Tensor:
    """Encode without looking at any value from the host.

    Args:
        spec: of the quantizer.
        values: float32 ``(G, R, C)``, finite.
        magnitude: their absolute values in memory of their own; overwritten.
        amax: float32 ``(G, 1, 1)``, the largest magnitude of each group.
        sections: of the payload.
    """
    statistic = _row_statistic(spec, magnitude)
    factor = scales.scale_factor(statistic, amax)
    if bool((factor != 1).any()):
        magnitude.mul_(factor)
        statistic = _row_statistic(spec, magnitude)
    payload = torch.zeros(sections.total_nbytes, dtype=torch.uint8, device=values.device)
    rows = RowScales.of(statistic, sections)
    if sections.row_scale_count:
        payload[sections.row_scales_at :][: rows.codes.numel()] = rows.codes.reshape(-1)
    packed, c = _fit(spec, values, magnitude, rows, sections)
    payload[: sections.codes_nbytes] = packed
    c_bytes = scales.encode_bf16(scales.storable_scale(c / factor))
    payload[sections.channel_scales_at :][: c_bytes.numel()] = c_bytes
    return payload


def decode(spec: QuantizerSpec, payload: Tensor, sections: Sections) -> Tensor:
    """Decode to float32 ``(G, R, C)`` of the sections."""
    if sections.row_scale_count:
        t_codes = payload[sections.row_scales_at :][: sections.row_scale_count]
        t = scales.decode_ue5m3(t_codes).view(sections.groups, sections.rows, 1)
    else:
        t = torch.ones((sections.groups, sections.rows, 1), dtype=torch.float32, device=payload.device)
    per_group = sections.channel_scales_per_group
    c_bytes = payload[sections.channel_scales_at :][: 2 * sections.groups * per_group]
    c = scales.decode_bf16(c_bytes).view(sections.groups, 1, per_group)
    return codes.dequantize(levels_of(spec, payload[: sections.codes_nbytes], sections.elements), t, c)


def pack(spec: QuantizerSpec, values: Tensor, size: Tensor) -> Tensor:
    """Packed codes ``(codes_nbytes,)``.

    Args:
        spec: of the quantizer.
        values: float32 ``(G, R, C)``, for the signs only.
        size: their magnitudes in units of ``t * c``, the same shape; may be overwritten. Signs need none.
    """
    if spec.kind == "sign":
        return codes.pack_codes((values >= 0).view(-1).to(torch.uint8), 1)
    negative = (values < 0).to(torch.uint8)
    if spec.kind == "linear":
        size = size.round_().clamp_(max=spec.reach)
        return torch.where(negative > 0, -size, size).to(torch.int8).view(-1).view(torch.uint8)
    if spec.kind in FLOAT8:
        return (codes.float8_codes(size, FLOAT8[spec.kind]) | (negative << 7)).view(-1)
    if spec.kind == "trits":
        return codes.pack_trits((size > 0.5).to(torch.uint8).mul_(negative.add_(1)).view(-1))
    borders = [(low + high) / 2 for low, high in pairwise(spec.magnitudes)]
    index = codes.count_above(size, borders)
    return codes.pack_codes(negative.mul_(len(spec.magnitudes)).add_(index).view(-1), spec.bits)


def _row_statistic(spec: QuantizerSpec, magnitude: Tensor) -> Tensor:
    """What ``t`` is proportional to, ``(G, R, 1)``: the largest magnitude, or the sum of magnitudes."""
    return magnitude.amax(2, keepdim=True) if spec.by_maximum else row_sums(magnitude)


def _fit(
    spec: QuantizerSpec, values: Tensor, magnitude: Tensor, rows: RowScales, sections: Sections
) -> tuple[Tensor, Tensor]:
    """Choose codes and channel scales.

    Args:
        spec: of the quantizer.
        values: float32 ``(G, R, C)``, for the signs only.
        magnitude: float32 ``(G, R, C)``, scaled to a largest value of about 1; may be overwritten.
        rows: their scales.
        sections: tells whether channels have scales of their own.

    Returns:
        Packed codes ``(codes_nbytes,)`` and bfloat16-valued ``c``, ``(G, 1, C)`` or ``(G, 1, 1)``.
    """
    if spec.by_maximum:
        return _fit_maximum(spec, values, magnitude, rows, sections)
    if spec.kind == "sign":
        # Least squares: the error energy is sum(m ** 2) - sum(m * t) ** 2 / sum(t ** 2), less than there was.
        c = divide_or_zero(scales.mean_sums(magnitude, rows, sections), scales.row_weight(rows, sections))
        return pack(spec, values, magnitude), scales.storable_scale(c)
    moments = scales.moments(magnitude, rows, sections)
    if spec.kind == "trits":
        # The largest element of a channel lies above the border, so something is sent wherever there is something.
        c = scales.storable_scale(scales.gaussian_scale(*moments) * scales.LEVEL_OF_TRITS)
    else:
        c = scales.gaussian_scale(*moments, spec.magnitudes[0], spec.widening)
    packed = pack(spec, values, codes.normalised(magnitude, rows.t, c))
    if sections.rows > 1:
        return packed, c
    levels = levels_of(spec, packed, sections.elements).abs_().view_as(magnitude)
    return packed, scales.refitted_scale(c, magnitude, levels)


def _fit_maximum(
    spec: QuantizerSpec, values: Tensor, magnitude: Tensor, rows: RowScales, sections: Sections
) -> tuple[Tensor, Tensor]:
    one = torch.ones((), dtype=torch.float32, device=magnitude.device)
    reach = (magnitude * divide_or_zero(one, rows.weight)).amax(1, keepdim=True) / rows.norm
    if sections.channel_scales_per_group == 1:
        reach = reach.amax(2, keepdim=True)
    c = scales.storable_scale(reach / spec.reach, up=True)
    return pack(spec, values, codes.normalised(magnitude, rows.t, c)), c


def levels_of(spec: QuantizerSpec, packed: Tensor, count: int) -> Tensor:
    """The float32 levels ``(count,)`` of packed codes."""
    if spec.kind == "linear":
        return packed[:count].view(torch.int8).to(torch.float32)
    if spec.kind == "trits":
        return codes.unpack_trit_levels(packed, (0.0, 1.0, -1.0), count)
    if spec.kind in FLOAT8:
        return codes.unpack_levels(packed, codes.float8_levels(FLOAT8[spec.kind]), 8, count)
    if spec.kind == "sign":
        return codes.unpack_levels(packed, (-1.0, 1.0), 1, count)
    signed = spec.magnitudes + tuple(-level for level in spec.magnitudes)
    return codes.unpack_levels(packed, signed, spec.bits, count)
