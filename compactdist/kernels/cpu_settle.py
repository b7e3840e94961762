"""Between the two passes: scales of rows and channels from their sums, compiled because the calls would take longer.

The arithmetic is that of ``scales.py``, value for value. After a change in the files this one imports, touch it:
Numba's cache on disk looks at this file's date only.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from compactdist.codecs.scalar.scales import LEVEL_OF_TRITS, SAFE_STATISTIC, SIGMA_OF_MEAN_MAGNITUDE, SMALLEST_SCALE
from compactdist.kernels.cpu_elements import Array, Pointer, fold, inlined, jit, next_part, round_3_bits
from compactdist.kernels.cpu_memory import data_of, load_first, store_first
from compactdist.kernels.cpu_sixteen import as_bf16, both, choose, either, root
from compactdist.kernels.cpu_vectors import folded, magnitude, where, zeros
from compactdist.kernels.reference import BF16_MAX_BITS, LANES, UE5M3_BIAS, UE5M3_FIRST_NONZERO_BITS
from compactdist.kernels.reference import TILE_ROWS as TILE

SIGN, NEAREST, TRITS, LINEAR, E4M3, E5M2 = range(6)
"""Kinds of codes. From ``LINEAR`` on, scales are such that the largest value takes the largest code."""

_u32, _f32, _at = np.uint32, np.float32, np.uintp
_SMALLEST_SCALE = np.float32(SMALLEST_SCALE)
_SIGMA_OF_MEAN_MAGNITUDE = np.float32(SIGMA_OF_MEAN_MAGNITUDE)
_LOWEST, _HIGHEST = map(np.float32, SAFE_STATISTIC)
_LEVEL_OF_TRITS = np.float32(LEVEL_OF_TRITS)
_BF16_MAX_BITS = np.uint32(BF16_MAX_BITS)


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
    """As ``scales.gaussian_scale``; ``bound`` is what holds c, in mean magnitudes."""
    sigma = over(energy, mean * _SIGMA_OF_MEAN_MAGNITUDE)
    overstated = root(over(sigma * sigma * weight, energy))
    overstated = root(overstated) if widening == 2 else overstated
    fitting, limit = sigma * overstated, over(mean, weight) * bound
    return storable(choose(fitting < limit, fitting, limit), False)


@inlined
def _bf16_bits(c: Any) -> Any:
    """What is stored of a scale that ``storable`` gave."""
    return np.uint16(min(_u32(_f32(c).view(_u32) >> _u32(16)), _BF16_MAX_BITS))


@inlined
def _row_scale(code: int) -> Any:
    return _u32((code + UE5M3_BIAS) << 20).view(_f32) if code else _f32(0)


@jit
def settle_rows(stat: Array, weighted: bool, rows: int, codes: Array, t: Array, inverse_t: Array, norms: Array) -> bool:
    """Row scales as the decoder will see them, their bytes, and the power of two for each group.

    Returns:
        Whether all statistics are safe; if not, nothing else means anything.
    """
    for group in range(norms.size):
        largest = _f32(0)
        for row in range(group * rows, (group + 1) * rows):
            if not stat[row] <= _HIGHEST:  # NaN as well
                return False
            largest = max(largest, stat[row])
        if not is_safe(largest):
            return False
        norms[group] = _f32(1)
        if not weighted:
            continue
        exponent = np.int64(_f32(round_3_bits(largest)).view(_u32) >> _u32(23))
        norm = _f32(0.5) * _u32(min(max(254 - exponent, 1), 254) << 23).view(_f32)
        norms[group] = norm
        for row in range(group * rows, (group + 1) * rows):
            bits = np.int64(_f32(round_3_bits(stat[row]) * norm).view(_u32))
            code = ((bits + (1 << 19)) >> 20) - UE5M3_BIAS
            code = min(max(code, 1 if bits >= UE5M3_FIRST_NONZERO_BITS else 0), 255)
            codes[row] = np.uint8(code)
            value = _row_scale(code)
            t[row] = value
            inverse_t[row] = over(_f32(1), value)
    return True


@inlined
def _weight_of(stat: Array, weighted: bool, rows: int, group: int, sums: Array) -> Any:
    tiles = (rows + TILE - 1) // TILE
    for tile in range(tiles):
        total = _f32(0)
        for row in range(group * rows + tile * TILE, group * rows + min((tile + 1) * TILE, rows)):
            weight = round_3_bits(stat[row]) if weighted else _f32(1)
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
def _fold_run(sums: Pointer, at: int, tiles: int, channels: int, count: int, largest: bool) -> None:
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


@jit
def fold_tiles(parts: Array, first: Array, second: Array, tiles: int, channels: int, largest: bool) -> None:
    """Fold what a survey found for tiles upon the first tile of each group, upper half onto lower until one is left.

    Args:
        parts: of the runs of 64 channels, those of all groups one after another.
        first: by group, tile and channel.
        second: the same, or empty.
        tiles: of a group.
        channels: of a group.
        largest: keep the larger of two, instead of their sum.
    """
    one, two, runs = data_of(first), data_of(second), (channels + LANES - 1) // LANES
    lo, hi = next_part(parts)
    while lo < hi:
        for run in range(lo, hi):
            j = run % runs * LANES
            at = run // runs * tiles * channels + j
            _fold_run(one, at, tiles, channels, channels - j, largest)
            if second.size:
                _fold_run(two, at, tiles, channels, channels - j, False)
        lo, hi = next_part(parts)


@jit
def settle_channels(
    kind: int,
    stat: Array,
    weighted: bool,
    rows: int,
    channels: int,
    norms: Array,
    first: Array,
    second: Array,
    bound: Any,
    widening: int,
    shared: bool,
    c: Array,
    inverse_c: Array,
    stored: Array,
) -> None:
    """Channel scales from the sums of a survey, and the bits that are stored of them.

    Args:
        kind: what the sums are of.
        stat: row statistics.
        weighted: rows have scales.
        rows: of a group.
        channels: of a group.
        norms: from ``settle_rows``.
        first: sums of ``m * weight`` by tile and channel, or the largest ``m / weight``, folded; overwritten.
        second: sums of ``m * m``, for tables of magnitudes, folded; overwritten.
        bound: see ``gaussian``; from ``LINEAR`` on, the level of the largest code.
        widening: see ``gaussian``.
        shared: a group has one scale for all its channels.
        c: scales by channel, shared ones repeated.
        inverse_c: 1 / c, or 0.
        stored: uint16 bits of bfloat16, one for each scale.
    """
    tiles = (rows + TILE - 1) // TILE
    weights = np.empty(tiles, np.float32)
    for group in range(norms.size):
        one = first[group * tiles * channels : (group + 1) * tiles * channels]
        two = second[group * tiles * channels : (group + 1) * tiles * channels] if second.size else second
        norm, weight = norms[group], _f32(0)
        if kind < LINEAR:
            weight = _weight_of(stat, weighted, rows, group, weights) * norm * norm
        count = channels
        if shared:
            count, pointer = 1, data_of(one)
            one[0] = _largest(pointer, channels) if kind >= LINEAR else sum_of(pointer, channels)
            weight = weight * _f32(channels)
            if two.size:
                two[0] = sum_of(data_of(two), channels)
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
            stored[group * count + j] = _bf16_bits(scale)
            for k in range(j, channels if shared else j + 1):
                c[group * channels + k] = scale
                inverse_c[group * channels + k] = over(_f32(1), scale)


@jit
def read_scales(stored: Array, repeat: int, largest: Any, c: Array) -> bool:
    """Scales from bits of bfloat16, uint16, each ``repeat`` times; whether all lie between 0 and ``largest``."""
    bad = 0
    for j in range(stored.size):
        scale = _u32(_u32(stored[j]) << _u32(16)).view(_f32)
        bad += 0 if scale >= _f32(0) and scale <= largest else 1
        c[_at(j * repeat)] = scale
    if repeat > 1:
        for j in range(stored.size * repeat):
            c[j] = c[j // repeat * repeat]
    return bad == 0


@jit
def read_row_scales(codes: Array, t: Array) -> None:
    """Row scales from their bytes, as ``reference.decode_ue5m3``."""
    for row in range(codes.size):
        t[row] = _row_scale(np.int64(codes[row]))
