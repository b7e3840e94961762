"""Scales of rows and channels between the two passes, and read again by the decoder; compiled by Numba.

The arithmetic is that of ``reference/scales.py``, value for value.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from compactdist.kernels.cpu import call
from compactdist.kernels.cpu.call import LINEAR, NEAREST, SIGN
from compactdist.kernels.cpu.elements import bound_of, table_of
from compactdist.kernels.cpu.simd.elements import Pointer, fold, round_3_bits
from compactdist.kernels.cpu.simd.jit import inlined
from compactdist.kernels.cpu.simd.memory import load_first, shifted, store_first
from compactdist.kernels.cpu.simd.sixteen import as_bf16, both, choose, either, root
from compactdist.kernels.cpu.simd.slots import bytes_at, halves_from, next_part, room_at
from compactdist.kernels.cpu.simd.vectors import folded, magnitude, where, zeros
from compactdist.kernels.reference import BF16_MAX_BITS, LANES, UE5M3_BIAS, UE5M3_FIRST_NONZERO_BITS
from compactdist.kernels.reference import TILE_ROWS as TILE
from compactdist.kernels.reference.scales import (
    LEVEL_OF_TRITS,
    SAFE_STATISTIC,
    SIGMA_OF_MEAN_MAGNITUDE,
    SMALLEST_SCALE,
)

_u32, _f32, _at = np.uint32, np.float32, np.uintp
_SMALLEST_SCALE = np.float32(SMALLEST_SCALE)
_SIGMA_OF_MEAN_MAGNITUDE = np.float32(SIGMA_OF_MEAN_MAGNITUDE)
_LOWEST, _HIGHEST = map(np.float32, SAFE_STATISTIC)
_LEVEL_OF_TRITS = np.float32(LEVEL_OF_TRITS)
_BF16_MAX_BITS = np.uint32(BF16_MAX_BITS)
_LARGEST_SCALE = np.float32(2.0**90)
"""With channel scales up to this, and t below 2, no product of the decoder leaves float32."""

_PAYLOAD = call.PAYLOAD
_GROUPS = call.GROUPS
_ROWS = call.ROWS
_CHANNELS = call.CHANNELS
_TILES = call.TILES
_KIND = call.KIND
_WEIGHTED = call.WEIGHTED
_SHARED = call.SHARED
_WIDENING = call.WIDENING
_ROW_COUNT = call.ROW_COUNT
_ROW_SCALES_AT = call.ROW_SCALES_AT
_CHANNEL_SCALES_AT = call.CHANNEL_SCALES_AT
_SCALE_COUNT = call.SCALE_COUNT
_STAT_ROOM = call.STAT_ROOM
_T_ROOM = call.T_ROOM
_INVERSE_T_ROOM = call.INVERSE_T_ROOM
_NORMS_ROOM = call.NORMS_ROOM
_WEIGHTS_ROOM = call.WEIGHTS_ROOM
_FIRST_ROOM = call.FIRST_ROOM
_SECOND_ROOM = call.SECOND_ROOM
_C_ROOM = call.C_ROOM
_INVERSE_C_ROOM = call.INVERSE_C_ROOM
_FOLD = call.FOLD
_ROW_SCALE_COUNT = call.ROW_SCALE_COUNT


@inlined
def storable(c: Any, up: Any) -> Any:
    """As ``scales.storable_scale``; one or sixteen of them, as what follows."""
    rounded = as_bf16(c, up)
    return choose(rounded < _SMALLEST_SCALE, _f32(0), rounded)


@inlined
def over(above: Any, below: Any) -> Any:
    """The quotient; 0 where there is nothing to divide by."""
    return choose(below > _f32(0), above / below, _f32(0))


@inlined
def is_safe(stat: Any) -> Any:
    """Whether sums and squares stay inside float32; false for what is not finite."""
    return either(both(stat >= _LOWEST, stat <= _HIGHEST), stat == _f32(0))


@inlined
def gaussian(energy: Any, mean: Any, weight: Any, bound: Any, widening: int) -> Any:
    """As ``scales.gaussian_scale``; ``bound`` is what holds c, in mean magnitudes; without widening zero is a level."""
    sigma = over(energy, mean * _SIGMA_OF_MEAN_MAGNITUDE)
    if widening == 0:
        return storable(sigma, False)
    overstated = root(over(sigma * sigma * weight, energy))
    overstated = root(overstated) if widening == 2 else overstated
    fitting, limit = sigma * overstated, over(mean, weight) * bound
    return storable(choose(fitting < limit, fitting, limit), False)


@inlined
def bf16_bits(c: Any) -> Any:
    """What is stored of a scale that ``storable`` gave."""
    return np.uint16(min(_u32(_f32(c).view(_u32) >> _u32(16)), _BF16_MAX_BITS))


@inlined
def _row_scale(code: int) -> Any:
    return _u32((code + UE5M3_BIAS) << 20).view(_f32) if code else _f32(0)


@inlined
def stored_scales(args: Any) -> Pointer:
    """Where the channel scales are in the payload: uint16 bits of bfloat16."""
    return halves_from(bytes_at(args, _PAYLOAD), args[_CHANNEL_SCALES_AT])


@inlined
def settle_rows(args: Any, grain: Any) -> bool:
    """Row scales as the decoder will see them, their bytes, and the power of two for each group.

    Inverses are multiplied with ``grain``, a power of two.

    Returns:
        Whether all statistics are safe; if not, nothing else means anything.
    """
    stat, t, inverse_t = room_at(args, _STAT_ROOM), room_at(args, _T_ROOM), room_at(args, _INVERSE_T_ROOM)
    norms, rows, weighted = room_at(args, _NORMS_ROOM), args[_ROWS], args[_WEIGHTED]
    codes, codes_at = bytes_at(args, _PAYLOAD), args[_ROW_SCALES_AT]
    for group in range(args[_GROUPS]):
        largest = _f32(0)
        for row in range(group * rows, (group + 1) * rows):
            if not stat[row] <= _HIGHEST:  # NaN as well
                return False
            largest = max(largest, stat[row])
        if not is_safe(largest):
            return False
        norms[group] = _f32(1)
        if weighted == 0:
            for row in range(group * rows, (group + 1) * rows):
                t[row] = _f32(1)
                inverse_t[row] = grain
            continue
        exponent = np.int64(_f32(round_3_bits(largest)).view(_u32) >> _u32(23))
        norm = _f32(0.5) * _u32(min(max(254 - exponent, 1), 254) << 23).view(_f32)
        norms[group] = norm
        for row in range(group * rows, (group + 1) * rows):
            bits = np.int64(_f32(round_3_bits(stat[row]) * norm).view(_u32))
            code = ((bits + (1 << 19)) >> 20) - UE5M3_BIAS
            code = min(max(code, 1 if bits >= UE5M3_FIRST_NONZERO_BITS else 0), 255)
            codes[codes_at + row] = np.uint8(code)
            value = _row_scale(code)
            t[row] = value
            inverse_t[row] = over(_f32(1), value) * grain
    return True


@inlined
def _weight_of(stat: Pointer, weighted: int, rows: int, group: int, sums: Pointer) -> Any:
    tiles = (rows + TILE - 1) // TILE
    for tile in range(tiles):
        total = _f32(0)
        for row in range(group * rows + tile * TILE, group * rows + min((tile + 1) * TILE, rows)):
            weight = round_3_bits(stat[row]) if weighted != 0 else _f32(1)
            total += weight * weight
        sums[tile] = total
    fold(sums, tiles, 1)
    return sums[0]


@inlined
def sum_of(values: Pointer, n: int) -> Any:
    """Sum of the magnitudes of ``n`` values, in the order of ``reference.row_sums``."""
    lanes = zeros()
    for j in range(0, n, LANES):
        lanes = lanes + magnitude(load_first(values, j, n - j))
    return folded(lanes)


@inlined
def _largest(values: Pointer, n: int) -> Any:
    top = _f32(0)
    for j in range(n):
        top = max(top, values[_at(j)])
    return top


@inlined
def fold_run(sums: Pointer, at: int, tiles: int, channels: int, count: int, largest: bool) -> None:
    """Fold the first ``count`` of 64 channels from ``at`` on upon the first tile."""
    length = tiles
    while length > 1:
        half = 1
        while half * 2 < length:
            half *= 2
        for tile in range(length - half):
            lower, upper = at + tile * channels, at + (half + tile) * channels
            x, y = load_first(sums, lower, count), load_first(sums, upper, count)
            store_first(where(y > x, y, x) if largest else x + y, sums, lower, count)
        length = half


def fold_tiles() -> Any:
    """A work over runs of 64 channels, those of all groups one after another: fold what the first pass found for tiles
    upon the first tile of each group, upper half onto lower until one is left; the larger of two, or their sum.
    """

    def body(args: Any) -> int:
        channels, tiles, kind = args[_CHANNELS], args[_TILES], args[_KIND]
        one, two, runs = room_at(args, _FIRST_ROOM), room_at(args, _SECOND_ROOM), (channels + LANES - 1) // LANES
        squares = kind != SIGN and kind < LINEAR
        lo, hi = next_part(args, _FOLD)
        while lo < hi:
            for run in range(lo, hi):
                j = run % runs * LANES
                at = run // runs * tiles * channels + j
                fold_run(one, at, tiles, channels, channels - j, kind >= LINEAR)
                if squares:
                    fold_run(two, at, tiles, channels, channels - j, False)
            lo, hi = next_part(args, _FOLD)
        return 0

    return body


@inlined
def settle_channels(args: Any) -> None:
    """Channel scales from the folded sums of the first pass, and the bits that are stored of them.

    The first sums are of ``m * weight``, or the largest ``m / weight``; the second, for tables of magnitudes, of
    ``m * m``. Scales that a group's channels share are repeated.
    """
    kind, channels, tiles, shared = args[_KIND], args[_CHANNELS], args[_TILES], args[_SHARED] != 0
    stat, norms, weights = room_at(args, _STAT_ROOM), room_at(args, _NORMS_ROOM), room_at(args, _WEIGHTS_ROOM)
    c, inverse_c, stored = room_at(args, _C_ROOM), room_at(args, _INVERSE_C_ROOM), stored_scales(args)
    bound, widening = bound_of(table_of(args)), args[_WIDENING]
    squares = kind != SIGN and kind < LINEAR
    for group in range(args[_GROUPS]):
        one = shifted(room_at(args, _FIRST_ROOM), group * tiles * channels)
        two = shifted(room_at(args, _SECOND_ROOM), group * tiles * channels)
        norm, weight = norms[group], _f32(0)
        if kind < LINEAR:
            weight = _weight_of(stat, args[_WEIGHTED], args[_ROWS], group, weights) * norm * norm
        count = channels
        if shared:
            count = 1
            one[0] = _largest(one, channels) if kind >= LINEAR else sum_of(one, channels)
            weight = weight * _f32(channels)
            if squares:
                two[0] = sum_of(two, channels)
        for j in range(count):
            if kind >= LINEAR:
                scale = storable(one[j] / norm / bound, True)
            elif kind == SIGN:
                scale = storable(over(one[j] * norm, weight), False)
            elif kind == NEAREST:
                scale = gaussian(two[j], one[j] * norm, weight, bound, widening)
            else:
                sigma = storable(over(two[j], (one[j] * norm) * _SIGMA_OF_MEAN_MAGNITUDE), False)
                scale = storable(sigma * _LEVEL_OF_TRITS, False)
            stored[group * count + j] = bf16_bits(scale)
            for k in range(j, channels if shared else j + 1):
                c[group * channels + k] = scale
                inverse_c[group * channels + k] = over(_f32(1), scale)


@inlined
def read_channel_scales(args: Any, scales: Pointer, repeat: int) -> bool:
    """Scales from the bits that are stored of them, each ``repeat`` times; whether all lie where products are safe."""
    stored, count = stored_scales(args), args[_SCALE_COUNT]
    bad = 0
    for j in range(count):
        scale = _u32(_u32(stored[_at(j)]) << _u32(16)).view(_f32)
        bad += 0 if scale >= _f32(0) and scale <= _LARGEST_SCALE else 1
        scales[_at(j * repeat)] = scale
    if repeat > 1:
        for j in range(count * repeat):
            scales[j] = scales[j // repeat * repeat]
    return bad == 0


@inlined
def read_row_scales(args: Any) -> None:
    """Row scales from their bytes, as ``reference.decode_ue5m3``; 1 where there are none."""
    codes, codes_at, t = bytes_at(args, _PAYLOAD), args[_ROW_SCALES_AT], room_at(args, _T_ROOM)
    if args[_ROW_SCALE_COUNT] == 0:
        for row in range(args[_ROW_COUNT]):
            t[row] = _f32(1)
    for row in range(args[_ROW_SCALE_COUNT]):
        t[row] = _row_scale(np.int64(codes[codes_at + row]))
