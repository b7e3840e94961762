"""Codes of elements: chosen, packed, unpacked, and looked up."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from compactdist.kernels.reference.scales import divide_or_zero
from compactdist.kernels.spec import Float8


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


def float8_codes(value: Tensor, form: Float8) -> Tensor:
    """Round float32 >= 0, in units of the smallest subnormal, to codes (uint8) without sign; saturates.

    Done on float bits: a unit is the value 1 here, so exponent fields differ by a constant, and what lies below the
    smallest normal number is an integer.
    """
    drop = 23 - form.mantissa_bits
    bits = value.contiguous().view(torch.int32)
    rounded = (bits + ((1 << (drop - 1)) - 1) + ((bits >> drop) & 1)) >> drop
    # 2**mantissa_bits units are the smallest normal number, whose exponent field is 1.
    normal = rounded - ((127 + form.mantissa_bits - 1) << form.mantissa_bits)
    subnormal = value.round().to(torch.int32)
    codes = torch.where(value < (1 << form.mantissa_bits), subnormal, normal)
    return codes.clamp(max=form.largest_code).to(torch.uint8)


def float8_levels(form: Float8) -> tuple[float, ...]:
    """The 256 levels of a format by code, in units of the smallest subnormal; codes from 128 on are negative."""
    positive = tuple(form.level(code) for code in range(128))
    return positive + tuple(-level for level in positive)
