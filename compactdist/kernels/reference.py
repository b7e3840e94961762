"""The definition of every primitive, in elementwise torch operations.

Faster kernels have to reproduce these results bit for bit, so nothing here leaves an order or a rounding
open:

* sums are folds in a stated order (``torch.sum`` may reorder with threads and vector width);
* conversions to small formats are integer arithmetic on float bits (``.to(bfloat16)`` truncates in some
  interpreters);
* no matrix products and no fused multiply-add.

Shapes: G groups, R rows, C channels; ``t`` is ``(G, R, 1)`` and ``c`` is ``(G, 1, C)`` or ``(G, 1, 1)``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

TILE_ROWS = 64
"""Rows that are summed together first: a kernel keeps one running sum for each channel, and tiles run in parallel."""

LANES = 64
"""Running sums for each row: a kernel keeps them in vector registers."""

UE5M3_BIAS = (127 - 31) << 3
UE5M3_FIRST_NONZERO_BITS = 0x2F900000  # 0.5625 * 2**-31, midway between 0 and the smallest nonzero value
BF16_MAX_BITS = 0x7F7F


def fold_sum(x: Tensor, dim: int) -> Tensor:
    """Sum over ``dim`` by adding the upper half onto the lower half until one element is left.

    The length counts as filled up with zeros to a power of two, so element i meets element i + h with h =
    half of that power. Returns float32 with ``dim`` kept at length 1.
    """
    length = x.shape[dim]
    while length > 1:
        half = 1 << ((length - 1).bit_length() - 1)
        upper = length - half
        folded = x.narrow(dim, 0, upper) + x.narrow(dim, half, upper)
        x = folded if upper == half else torch.cat([folded, x.narrow(dim, upper, half - upper)], dim)
        length = half
    return x


def row_sums(x: Tensor) -> Tensor:
    """``(G, R, C)`` to ``(G, R, 1)``: lane i adds up elements i, i + 64, i + 128, ..., then the lanes are folded."""
    lanes = x[:, :, :LANES].clone()
    for start in range(LANES, x.shape[2], LANES):
        part = x[:, :, start : start + LANES]
        lanes[:, :, : part.shape[2]] += part
    return fold_sum(lanes, 2)


def channel_sums(x: Tensor) -> Tensor:
    """``(G, R, C)`` to ``(G, 1, C)``: each tile of 64 rows is added up from its first to its last, tiles are folded."""
    tiles = x[:, ::TILE_ROWS].clone()
    for row in range(1, min(TILE_ROWS, x.shape[1])):
        part = x[:, row::TILE_ROWS]
        tiles[:, : part.shape[1]] += part
    return fold_sum(tiles, 1)


def divide_or_zero(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Elementwise quotient of non-negative float32 tensors, 0 where the denominator is 0."""
    positive = denominator > 0
    quotient = numerator / torch.where(positive, denominator, torch.ones_like(denominator))
    return torch.where(positive, quotient, torch.zeros_like(quotient))


def power_of_two_near_inverse(value: Tensor) -> Tensor:
    """Return a power of two p with ``value * p < 4`` for any finite float32 value >= 0, and >= 1 unless
    subnormal.

    The exponent field is mirrored: 2**e goes to 2**-e, with the two ends cut to normal numbers.
    """
    exponent = value.contiguous().view(torch.int32) >> 23
    return ((254 - exponent).clamp(1, 254) << 23).view(torch.float32)


def round_3_bits(value: Tensor) -> Tensor:
    """Round non-negative float32 to three bits of mantissa, halfway up: the values of UE5M3 times a power of two."""
    bits = value.contiguous().view(torch.int32)
    return ((bits + (1 << 19)) & -(1 << 20)).view(torch.float32)


def encode_ue5m3(value: Tensor) -> Tensor:
    """Round non-negative float32 to the nearest UE5M3 code (uint8); halfway goes up, too large saturates."""
    bits = value.contiguous().view(torch.int32)
    code = ((bits + (1 << 19)) >> 20) - UE5M3_BIAS
    # Code 0 means 0, not 2**-31, so the lowest step is wider than the formula knows.
    smallest = (bits >= UE5M3_FIRST_NONZERO_BITS).to(torch.int32)
    return torch.maximum(code, smallest).clamp(max=255).to(torch.uint8)


def decode_ue5m3(code: Tensor) -> Tensor:
    """Expand UE5M3 codes (uint8) to float32, exactly."""
    bits = (code.to(torch.int32) + UE5M3_BIAS) << 20
    return torch.where(code == 0, torch.zeros_like(bits), bits).view(torch.float32)


def round_bf16(value: Tensor, *, up: bool = False) -> Tensor:
    """Round non-negative float32 to a bfloat16 value, to nearest even or up; the result stays float32."""
    bits = value.contiguous().view(torch.int32)
    bits = bits + (0xFFFF if up else 0x7FFF + ((bits >> 16) & 1))
    return (bits & -0x10000).view(torch.float32)


def round_signed_bf16(value: Tensor, smallest: float | Tensor) -> Tensor:
    """Round float32 to a bfloat16 value, to nearest even; what is below ``smallest`` in magnitude is zero."""
    size = value.abs()
    size = torch.where(size < smallest, torch.zeros_like(size), round_bf16(size))
    return torch.where(value < 0, -size, size)


def encode_bf16(value: Tensor) -> Tensor:
    """Store non-negative bfloat16 values held in float32 as bytes ``(2 * n,)``, low byte first; saturates."""
    bits = (value.reshape(-1).view(torch.int32) >> 16).clamp(max=BF16_MAX_BITS)
    return torch.stack([bits & 0xFF, bits >> 8], 1).reshape(-1).to(torch.uint8)


def encode_signed_bf16(value: Tensor) -> Tensor:
    """Store bfloat16 values of either sign held in float32 as bytes ``(2 * n,)``, low byte first; saturates."""
    bits = value.reshape(-1).view(torch.int32) >> 16
    bits = (bits & 0x7FFF).clamp(max=BF16_MAX_BITS) | (bits & 0x8000)
    return torch.stack([bits & 0xFF, bits >> 8], 1).reshape(-1).to(torch.uint8)


def decode_bf16(data: Tensor) -> Tensor:
    """Expand bytes ``(2 * n,)`` to float32 ``(n,)``, exactly."""
    halves = data.reshape(-1, 2).to(torch.int32)
    return ((halves[:, 0] << 16) | (halves[:, 1] << 24)).view(torch.float32)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack uint8 codes ``(n,)`` of 1, 2, 3, 4 or 8 bits into ``ceil(n * bits / 8)`` bytes, first code lowest."""
    if bits == 3:
        return _pack_3_bits(codes)
    per_byte = 8 // bits
    if per_byte == 1:
        return codes
    missing = -codes.numel() % per_byte
    if missing:
        codes = torch.cat([codes, codes.new_zeros(missing)])
    columns = codes.reshape(-1, per_byte)
    packed = columns[:, 0].clone()
    for position in range(1, per_byte):
        packed |= columns[:, position] << (position * bits)
    return packed


def unpack_codes(packed: Tensor, bits: int, count: int) -> Tensor:
    """Undo ``pack_codes``: uint8 ``(count,)``."""
    if bits == 3:
        return _unpack_3_bits(packed, count)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    codes = (packed.unsqueeze(1) >> shifts) & ((1 << bits) - 1)
    return codes.reshape(-1)[:count]


def _pack_3_bits(codes: Tensor) -> Tensor:
    """Eight codes to three bytes, as one 24-bit number with the lowest byte first."""
    count = codes.numel()
    missing = -count % 8
    if missing:
        codes = torch.cat([codes, codes.new_zeros(missing)])
    columns = codes.reshape(-1, 8).to(torch.int32)
    word = columns[:, 0].clone()
    for position in range(1, 8):
        word |= columns[:, position] << (3 * position)
    packed = torch.stack([word & 0xFF, (word >> 8) & 0xFF, word >> 16], 1)
    return packed.to(torch.uint8).reshape(-1)[: -(-count * 3 // 8)]


def _unpack_3_bits(packed: Tensor, count: int) -> Tensor:
    missing = -packed.numel() % 3
    if missing:
        packed = torch.cat([packed, packed.new_zeros(missing)])
    low, middle, high = packed.view(-1, 3).to(torch.int32).unbind(1)
    word = low | (middle << 8) | (high << 16)
    shifts = torch.arange(0, 24, 3, dtype=torch.int32, device=packed.device)
    return ((word.unsqueeze(1) >> shifts) & 7).to(torch.uint8).reshape(-1)[:count]


def pack_trits(trits: Tensor) -> Tensor:
    """Pack uint8 values 0, 1, 2 ``(n,)`` into ``ceil(n / 5)`` bytes, base 3, the first trit lowest."""
    missing = -trits.numel() % 5
    if missing:
        trits = torch.cat([trits, trits.new_zeros(missing)])
    columns = trits.reshape(-1, 5)
    packed = columns[:, 4].clone()
    for position in (3, 2, 1, 0):
        packed = packed.mul_(3).add_(columns[:, position])
    return packed


def unpack_trit_levels(packed: Tensor, levels: Sequence[float], count: int) -> Tensor:
    """Look up the level of every packed trit: float32 ``(count,)``. Bytes from 243 on, never packed, wrap around."""
    every_byte = torch.arange(256, dtype=torch.int32, device=packed.device)
    trits = torch.stack([torch.div(every_byte, 3**i, rounding_mode="floor") % 3 for i in range(5)], 1)
    by_trit = torch.tensor(levels, dtype=torch.float32, device=packed.device)
    table = by_trit.index_select(0, trits.reshape(-1)).reshape(256, 5)
    return table.index_select(0, packed.to(torch.int32)).reshape(-1)[:count]


def unpack_levels(packed: Tensor, levels: Sequence[float], bits: int, count: int) -> Tensor:
    """Look up the level of every packed code: float32 ``(count,)``.

    One table row holds all the levels of one byte, so the lookup is per byte and not per element (codes of 3 bits
    do not end with the bytes and are looked up one by one).
    """
    if bits == 3:
        by_code = torch.tensor(levels, dtype=torch.float32, device=packed.device)
        return by_code.index_select(0, _unpack_3_bits(packed, count).to(torch.int32))
    every_byte = torch.arange(256, device=packed.device).to(torch.uint8)
    codes = unpack_codes(every_byte, bits, 256 * (8 // bits)).to(torch.int32)
    by_code = torch.tensor(levels, dtype=torch.float32, device=packed.device)
    table = by_code.index_select(0, codes).reshape(256, -1)
    return table.index_select(0, packed.to(torch.int32)).reshape(-1)[:count]


def normalised(magnitude: Tensor, t: Tensor, c: Tensor) -> Tensor:
    """Return ``magnitude / (t * c)``, 0 where a scale is 0: first times ``1 / c``, then times ``1 / t``."""
    one = torch.ones((), dtype=torch.float32, device=magnitude.device)
    return (magnitude * divide_or_zero(one, c)).mul_(divide_or_zero(one, t))


def count_above(value: Tensor, thresholds: Sequence[float]) -> Tensor:
    """Count, for each element, the thresholds that lie strictly below it: uint8."""
    total = (value > thresholds[0]).to(torch.uint8)
    for threshold in thresholds[1:]:
        total += value > threshold
    return total


def dequantize(levels: Tensor, t: Tensor, c: Tensor) -> Tensor:
    """Return ``(t * c) * levels`` as float32 ``(G, R, C)``: two roundings, in this order."""
    return (t * c).mul(levels.view(t.shape[0], t.shape[1], -1))
