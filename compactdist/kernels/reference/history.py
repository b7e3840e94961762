"""Channel scales from the frame before: what ``scales="token_history"`` computes, by elementwise torch operations.

A scale for each channel takes a pass over the tensor before the one that codes it. Here both ends already hold channel
scales ``c``, float32 ``(G, 1, C)``, and a row's scale follows from that row and ``c`` alone, so one pass does it all:

* a row's scale ``t`` is the one of least error, or the sigma, for the scales ``t * c``: what ``steps.py`` does for a
  channel, with rows and channels in each other's places. However little ``c`` fits a channel, the error energy of a row
  stays below its energy;
* the frame carries, for each channel, the root of the sum of squares of the residual, from which both ends make the
  ``c`` of the next frame (:func:`scales_after`). Not the decoded residual's: at one bit that is what ``c`` said. Where
  there are many rows, some hundreds of them are enough (:func:`rows_apart`).

The payload has the sections of ``sections.py`` with ``wide_rows``: codes; ``t`` as bfloat16, for what it is relative to
is not known before all rows have been read; and the roots as bfloat16 in the place of channel scales.

A stream's first frame has no frame before it. It is coded as with ``scales="token_channel"``, in the first bytes of the
payload, zeros follow, and its channel scales are where ``c`` begins (:func:`scales_from`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from compactdist.kernels.reference import codes, scales, steps
from compactdist.kernels.reference.rows import channel_sums, row_sums
from compactdist.kernels.reference.scales import divide_or_zero
from compactdist.kernels.sections import Sections
from compactdist.kernels.spec import QuantizerSpec

__all__ = [
    "FLOOR",
    "LARGEST_BITS",
    "SMALLEST",
    "SMALLEST_BITS",
    "decode",
    "encode",
    "rows_apart",
    "scales_after",
    "scales_from",
]

FLOOR = 2.0**-6
"""A channel that ever moved has this of its group's mean scale at least: if it moves again, its row is not spoilt."""

SMALLEST = 2.0**-60
"""What is less, beside its group's largest, is zero: machines differ in subnormal numbers."""

SMALLEST_BITS, LARGEST_BITS = 0x0080, 0x7180
"""The smallest normal number and 2**100 as bfloat16. What is not between them in a payload counts as zero."""


def encode(
    spec: QuantizerSpec, values: Tensor, magnitude: Tensor, amax: Tensor, c: Tensor, sections: Sections
) -> Tensor:
    """Encode without looking at any value from the host.

    Args:
        spec: of the quantizer.
        values: float32 ``(G, R, C)``, finite.
        magnitude: their absolute values in memory of their own; overwritten.
        amax: float32 ``(G, 1, 1)``, the largest magnitude of each group.
        c: the channel scales that both ends hold, ``(G, 1, C)``, as :func:`scales_after` gives them.
        sections: of the payload, with wide rows.
    """
    one = torch.ones((), dtype=torch.float32, device=values.device)
    inverse = divide_or_zero(one, c)
    statistic = _row_statistic(spec, magnitude, c, inverse)
    # where nothing of a group has a scale there is nothing to be made safe
    factor = scales.scale_factor(statistic, torch.where(statistic.amax(1, keepdim=True) == 0, 0.0, amax))
    magnitude.mul_(factor)
    statistic = _row_statistic(spec, magnitude, c, inverse)
    t = _row_scales(spec, magnitude, statistic, c, inverse)
    roots = channel_sums(magnitude * magnitude, rows_apart(sections.rows)).double().sqrt().float() / factor
    payload = torch.zeros(sections.total_nbytes, dtype=torch.uint8, device=values.device)
    payload[: sections.codes_nbytes] = steps.pack(spec, values, codes.normalised(magnitude, t, c))
    t_bytes = scales.encode_bf16(scales.storable_scale(t / factor))
    payload[sections.row_scales_at :][: t_bytes.numel()] = t_bytes
    root_bytes = scales.encode_bf16(scales.storable_scale(roots.clamp(max=2.0**100)))
    payload[sections.channel_scales_at :][: root_bytes.numel()] = root_bytes
    return payload


def decode(spec: QuantizerSpec, payload: Tensor, c: Tensor, sections: Sections) -> Tensor:
    """Decode to float32 ``(G, R, C)`` of the sections."""
    t_bytes = payload[sections.row_scales_at :][: 2 * sections.row_scale_count]
    t = scales.decode_bf16(t_bytes).view(sections.groups, sections.rows, 1)
    return codes.dequantize(steps.levels_of(spec, payload[: sections.codes_nbytes], sections.elements), t, c)


def rows_apart(rows: int) -> int:
    """Of so many rows every how many are in the sums of squares: a power of two that leaves 512 or more, at most 64."""
    return 1 << min(6, max(0, (rows // 512).bit_length() - 1))


def scales_from(payload: Tensor, sections: Sections) -> Tensor:
    """The channel scales ``(G, 1, C)`` that a first frame leaves behind; ``sections``: with narrow rows."""
    roots = _normalised(_stored(payload, sections))
    return _raised(roots, roots)


def scales_after(payload: Tensor, c: Tensor, sections: Sections) -> Tensor:
    """The channel scales ``(G, 1, C)`` after a frame that was coded with ``c``.

    Only their ratios within a group matter. They are zero, or from about ``FLOOR / (2 * C)`` to 1. A group that stood
    still keeps its own.
    """
    roots = _normalised(_stored(payload, sections))
    return torch.where(roots.amax(2, keepdim=True) > 0, _raised(roots, c), c)


def _stored(payload: Tensor, sections: Sections) -> Tensor:
    """The channels' section as float32 ``(G, 1, C)``."""
    data = payload[sections.channel_scales_at :][: 2 * sections.groups * sections.channels].reshape(-1, 2)
    bits = data[:, 0].to(torch.int32) | (data[:, 1].to(torch.int32) << 8)
    bits = torch.where((bits < SMALLEST_BITS) | (bits > LARGEST_BITS), torch.zeros_like(bits), bits)
    return (bits << 16).view(torch.float32).view(sections.groups, 1, sections.channels)


def _normalised(x: Tensor) -> Tensor:
    """Each group times the power of two that brings its largest below 1, not below 1/2."""
    x = x * (0.5 * scales.power_of_two_near_inverse(x.amax(2, keepdim=True)))
    return torch.where(x < SMALLEST, torch.zeros_like(x), x)


def _raised(x: Tensor, before: Tensor) -> Tensor:
    """What is not zero, or was not ``before``, is raised to ``FLOOR`` of its group's mean."""
    floor = row_sums(x) * (FLOOR / x.shape[2])
    return torch.where((x > 0) | (before > 0), torch.maximum(x, floor), x)


def _row_statistic(spec: QuantizerSpec, magnitude: Tensor, c: Tensor, inverse: Tensor) -> Tensor:
    """``(G, R, 1)``: the largest ``m / c``, or the sum of ``m * c``."""
    return (magnitude * inverse).amax(2, keepdim=True) if spec.by_maximum else row_sums(magnitude * c)


def _row_scales(spec: QuantizerSpec, magnitude: Tensor, statistic: Tensor, c: Tensor, inverse: Tensor) -> Tensor:
    """Bfloat16-valued ``t``, ``(G, R, 1)``."""
    if spec.by_maximum:
        return scales.storable_scale(statistic / spec.reach, up=True)
    weight = row_sums(c * c)
    if spec.kind == "sign":
        return scales.storable_scale(divide_or_zero(statistic, weight))
    energy = row_sums((magnitude * c) * (magnitude * inverse))  # without channels that have no scale
    if spec.kind == "trits":
        return scales.storable_scale(scales.gaussian_scale(energy, statistic, weight) * scales.LEVEL_OF_TRITS)
    return scales.gaussian_scale(energy, statistic, weight, spec.magnitudes[0], spec.widening)
