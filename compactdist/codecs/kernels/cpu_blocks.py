"""One pass over the elements where each block has a scale: everything about a block happens while it is in the cache.

Blocks are the rows of a *place* (``cpu_loops.py``), all of them in one group. The arithmetic is that of ``scales.py``
for layouts of one row; one value for a block is computed here, since nothing may leave the loop.

After a change in the files this one imports, touch it: Numba's cache on disk looks at this file's date only.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from compactdist.codecs.kernels.cpu_codes import code_views, level_of, nearest, pack
from compactdist.codecs.kernels.cpu_elements import (
    LANES,
    Array,
    finish,
    inlined,
    jit,
    lane_sum,
    largest_of,
    predict,
    subtract,
)

_u32, _f32, _at = np.uint32, np.float32, np.uintp
_SMALLEST_SCALE = np.float32(2.0**-87)
_SIGMA_OF_MEAN_MAGNITUDE = np.float32(1.2533141373155003)
_LOWEST, _HIGHEST = np.float32(2.0**-50), np.float32(2.0**50)
_ROUNDING = np.float32(12582912.0)  # 1.5 * 2**23: adding it rounds to an integer, half to even


@inlined
def _storable(c: Any, up: Any) -> Any:
    bits = _f32(c).view(_u32)
    more = _u32(0xFFFF) if up else _u32(_u32(0x7FFF) + _u32(_u32(bits >> _u32(16)) & _u32(1)))
    rounded = _u32(_u32(bits + more) & _u32(0xFFFF0000)).view(_f32)
    return _f32(0) if rounded < _SMALLEST_SCALE else rounded


@inlined
def _over(above: Any, below: Any) -> Any:
    return above / below if below > _f32(0) else _f32(0)


@inlined
def _load(source: Any, place: Any, block: int, expected: Array, values: Array) -> None:
    x, base, velocity = source
    at, numel, n = place[0][block], place[6], place[5]
    predict(base, velocity, at, numel, expected, n)
    subtract(x, at, numel, expected, values, n)


@inlined
def _safe(stat: Any) -> Any:
    """Whether sums and squares stay inside float32; false for what is not finite."""
    return (stat >= _LOWEST and stat <= _HIGHEST) or stat == _f32(0)


@jit
def block_signs(
    source: Any, place: Any, limit: Any, lo: int, hi: int, packed: Array, scales: Array, bad: Array, out: Array
) -> None:
    """Blocks ``lo`` to ``hi``: sign codes, scales, and what the receiver makes of them; ``bad[0]`` for unsafe ones."""
    n = place[5]
    values, expected, lanes = np.empty(n, np.float32), np.empty(n, np.float32), np.empty(LANES, np.float32)
    views = code_views(n)
    code = views[0]
    for block in range(lo, hi):
        _load(source, place, block, expected, values)
        stat = lane_sum(values, n, lanes)
        if not _safe(stat):
            bad[0] = 1
        c = _storable(stat / _f32(n), False)
        scales[block] = c
        for j in range(n):
            positive = values[_at(j)] >= _f32(0)
            code[_at(j)] = np.uint8(positive)
            values[_at(j)] = c if positive else -c
        pack(views, 1, n, packed, block * n)
        if out.size:
            finish(expected, values, limit, out, place[0][block], place[6], n)


@jit
def block_nearest(
    source: Any,
    place: Any,
    bits: int,
    borders: Any,
    magnitudes: Any,
    widening: int,
    bound: Any,
    limit: Any,
    lo: int,
    hi: int,
    packed: Array,
    scales: Array,
    bad: Array,
    out: Array,
) -> None:
    """The same for sign and magnitude; ``bound`` is what ``gaussian_scale`` holds c below, in mean magnitudes."""
    n = place[5]
    values, expected, lanes = np.empty(n, np.float32), np.empty(n, np.float32), np.empty(LANES, np.float32)
    levels, products = np.empty(n, np.float32), np.empty(n, np.float32)
    views, length = code_views(n), _f32(n)
    code = views[0]
    for block in range(lo, hi):
        _load(source, place, block, expected, values)
        mean = lane_sum(values, n, lanes)
        if not _safe(mean):
            bad[0] = 1
        for j in range(n):
            products[_at(j)] = values[_at(j)] * values[_at(j)]
        energy = lane_sum(products, n, lanes)
        sigma = _over(energy, mean * _SIGMA_OF_MEAN_MAGNITUDE)
        overstated = _over(sigma * sigma * length, energy)
        for _ in range(widening):
            overstated = np.sqrt(overstated)
        c = _storable(min(sigma * overstated, _over(mean, length) * bound), False)
        inverse = _over(_f32(1), c)
        for j in range(n):
            value = values[_at(j)]
            index = nearest(abs(value) * inverse, borders)
            level = level_of(index, magnitudes)
            code[_at(j)] = np.uint8(_u32(index | _u32(len(magnitudes))) if value < _f32(0) else index)
            levels[_at(j)] = level
            products[_at(j)] = value * level
        pack(views, bits, n, packed, block * n)
        top = lane_sum(products, n, lanes)
        for j in range(n):
            products[_at(j)] = levels[_at(j)] * levels[_at(j)]
        c = _storable(_over(top, lane_sum(products, n, lanes)), False) if c > _f32(0) else c
        scales[block] = c
        for j in range(n):
            change = c * levels[_at(j)]
            values[_at(j)] = -change if values[_at(j)] < _f32(0) else change
        if out.size:
            finish(expected, values, limit, out, place[0][block], place[6], n)


@jit
def block_linear(
    source: Any,
    place: Any,
    largest: Any,
    limit: Any,
    lo: int,
    hi: int,
    packed: Array,
    scales: Array,
    bad: Array,
    out: Array,
) -> None:
    """The same for integers up to ``largest``."""
    n = place[5]
    values, expected = np.empty(n, np.float32), np.empty(n, np.float32)
    pattern, cell = values.view(np.uint32), np.empty(1, np.float32)
    cell_bits = cell.view(np.uint32)
    for block in range(lo, hi):
        _load(source, place, block, expected, values)
        reach = largest_of(pattern, n, cell, cell_bits)
        if not _safe(reach):
            bad[0] = 1
        c = _storable(reach / largest, True)
        scales[block] = c
        inverse = _over(_f32(1), c)
        p = _at(block * n)
        for j in range(n):
            value = values[_at(j)]
            steps = abs(value) * inverse
            steps = largest if steps > largest else steps
            steps = (steps + _ROUNDING) - _ROUNDING
            steps = -steps if value < _f32(0) else steps
            packed[p + _at(j)] = np.uint8(np.int32(steps))
            values[_at(j)] = c * (steps + _f32(0))
        if out.size:
            finish(expected, values, limit, out, place[0][block], place[6], n)
