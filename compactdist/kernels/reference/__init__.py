"""The definition of every primitive, in elementwise torch operations.

Faster kernels have to reproduce these results bit for bit, so nothing here leaves an order or a rounding open: sums are
folds in a stated order, conversions are integer arithmetic on float bits (``.to(bfloat16)`` truncates in some
interpreters), and there are no matrix products and no fused multiply-add.

Shapes: G groups, R rows, C channels; ``t`` is ``(G, R, 1)`` and ``c`` is ``(G, 1, C)`` or ``(G, 1, 1)``.
"""

from __future__ import annotations

from compactdist.kernels.reference.codes import (
    count_above,
    dequantize,
    float8_codes,
    float8_levels,
    normalised,
    pack_codes,
    pack_trits,
    unpack_codes,
    unpack_levels,
    unpack_trit_levels,
)
from compactdist.kernels.reference.rows import LANES, TILE_ROWS, channel_sums, fold_sum, row_sums
from compactdist.kernels.reference.scales import (
    BF16_MAX_BITS,
    UE5M3_BIAS,
    UE5M3_FIRST_NONZERO_BITS,
    decode_bf16,
    decode_ue5m3,
    divide_or_zero,
    encode_bf16,
    encode_signed_bf16,
    encode_ue5m3,
    power_of_two_near_inverse,
    round_3_bits,
    round_bf16,
    round_signed_bf16,
    storable_scale,
)

__all__ = [
    "BF16_MAX_BITS",
    "LANES",
    "TILE_ROWS",
    "UE5M3_BIAS",
    "UE5M3_FIRST_NONZERO_BITS",
    "channel_sums",
    "count_above",
    "decode_bf16",
    "decode_ue5m3",
    "dequantize",
    "divide_or_zero",
    "encode_bf16",
    "encode_signed_bf16",
    "encode_ue5m3",
    "float8_codes",
    "float8_levels",
    "fold_sum",
    "normalised",
    "pack_codes",
    "pack_trits",
    "power_of_two_near_inverse",
    "round_3_bits",
    "round_bf16",
    "round_signed_bf16",
    "row_sums",
    "storable_scale",
    "unpack_codes",
    "unpack_levels",
    "unpack_trit_levels",
]
