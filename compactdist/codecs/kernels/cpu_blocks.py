"""One pass over the elements where each block has a scale: everything about a block happens while it is in the cache.

Blocks are the rows of a *place* (``cpu_loops.py``), consecutive in memory. They are coded in batches, so that what is
one value for a block, a chain of slow operations, is computed for several at a time. The arithmetic is that of
``scales.py`` for layouts of one row.

After a change in the files this one imports, touch it: Numba's cache on disk looks at this file's date only.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from compactdist.codecs.kernels.cpu_elements import ROUNDING, Array, Pointer, inlined, jit
from compactdist.codecs.kernels.cpu_memory import (
    data_of,
    load_first,
    pointers_of,
    settle_streams,
    stack_floats,
    table_at,
)
from compactdist.codecs.kernels.cpu_packing import store_codes, store_mask
from compactdist.codecs.kernels.cpu_settle import NEAREST, SIGN, bf16_bits, gaussian, is_safe, over, storable
from compactdist.codecs.kernels.cpu_steps import (
    change_of,
    expected_at,
    nearest_codes,
    nearest_steps,
    put,
    residual_at,
)
from compactdist.codecs.kernels.cpu_vectors import (
    as_floats,
    bits_of,
    bits_of_magnitude,
    chosen,
    folded,
    lane_mask,
    larger,
    largest,
    magnitude,
    no_bits,
    table_of,
    where,
    zeros,
)
from compactdist.codecs.kernels.reference import LANES

_BATCH = 16

_f32 = np.float32


@inlined
def _unsafe(stats: Pointer, count: int) -> Any:
    """Whether sums and squares of some block leave float32, or are not finite."""
    unsafe = 0
    for b in range(count):
        unsafe += 0 if is_safe(stats[b]) else 1
    return unsafe


@inlined
def _restore(
    kind: int,
    packed: Pointer,
    bits: int,
    table: Any,
    c: Any,
    source: Any,
    n: int,
    at: int,
    numel: int,
    target: Any,
) -> None:
    """What the receiver makes of the block of ``n`` elements that begins at ``at``."""
    for j in range(0, n, LANES):
        have = min(n, numel - at) - j
        change = change_of(kind, as_floats(c), packed, bits, table, at + j, n - j)
        expected = expected_at(source, at + j, have)
        put(expected, change, target, at + j, have)


@jit
def block_signs(
    lo: int,
    hi: int,
    source: Any,
    place: Any,
    packed: Array,
    stored: Array,
    bad: Array,
    out: Array,
    streams: bool,
) -> None:
    """Blocks ``lo`` to ``hi``: sign codes, scales, and what the receiver makes of them; ``bad[0]`` for unsafe ones."""
    given = pointers_of(source[:3], source[3])
    n, numel, stats, cs, table = place[5], place[6], stack_floats(), stack_floats(), table_of((_f32(0),))
    bytes_, target = data_of(packed), (data_of(out), streams)
    unsafe = 0  # not in ``bad`` until the end: all threads share its cache line
    for first in range(lo, hi, _BATCH):
        blocks = min(_BATCH, hi - first)
        for b in range(blocks):
            at, lanes = (first + b) * n, zeros()
            for j in range(0, n, LANES):
                value = residual_at(given, at + j, min(n, numel - at) - j)
                lanes = lanes + magnitude(value)
                store_mask(value >= _f32(0), bytes_, at + j, n - j)
            stats[b] = folded(lanes)
        unsafe += _unsafe(stats, blocks)
        for b in range(blocks):
            cs[b] = storable(stats[b] / _f32(n), False)
            stored[first + b] = bf16_bits(cs[b])
        if out.size:
            for b in range(blocks):
                _restore(SIGN, bytes_, 1, table, cs[b], given, n, (first + b) * n, numel, target)
    settle_streams()
    if unsafe:
        bad[0] = 1


@jit
def block_nearest(
    lo: int,
    hi: int,
    source: Any,
    place: Any,
    packed: Array,
    stored: Array,
    bad: Array,
    out: Array,
    streams: bool,
    bits: int,
    borders: Any,
    table: Array,
    widening: int,
    bound: Any,
) -> None:
    """The same for sign and magnitude; ``bound`` is what ``gaussian_scale`` holds c below, in mean magnitudes."""
    given = pointers_of(source[:3], source[3])
    n, numel, means, others, levels = place[5], place[6], stack_floats(), stack_floats(), table_at(data_of(table), 0)
    bytes_, target = data_of(packed), (data_of(out), streams)
    cs, unsafe = stack_floats(), 0
    for first in range(lo, hi, _BATCH):
        blocks = min(_BATCH, hi - first)
        for b in range(blocks):
            at, lanes, squares = (first + b) * n, zeros(), zeros()
            for j in range(0, n, LANES):
                value = residual_at(given, at + j, min(n, numel - at) - j)
                lanes, squares = lanes + magnitude(value), squares + value * value
            means[b], others[b] = folded(lanes), folded(squares)
        unsafe += _unsafe(means, blocks)
        for b in range(blocks):
            cs[b] = gaussian(others[b], means[b], _f32(n), bound, widening)
        for b in range(blocks):
            at, inverse, lanes, squares = (first + b) * n, over(_f32(1), cs[b]), zeros(), zeros()
            for j in range(0, n, LANES):
                value = residual_at(given, at + j, min(n, numel - at) - j)
                codes = nearest_codes(magnitude(value) * inverse, value < _f32(0), borders, False)
                store_codes(codes, bits, bytes_, at + j, n - j)
                level = chosen(levels, codes)
                if n - j < LANES:
                    level = where(lane_mask(n - j), level, zeros())
                lanes, squares = lanes + value * level, squares + level * level
            means[b], others[b] = folded(lanes), folded(squares)
        for b in range(blocks):
            fitted = storable(over(means[b], others[b]), False)
            cs[b] = fitted if cs[b] > _f32(0) else cs[b]
            stored[first + b] = bf16_bits(cs[b])
        if out.size:
            for b in range(blocks):
                _restore(NEAREST, bytes_, bits, levels, cs[b], given, n, (first + b) * n, numel, target)
    settle_streams()
    if unsafe:
        bad[0] = 1


@jit
def block_linear(
    lo: int,
    hi: int,
    source: Any,
    place: Any,
    packed: Array,
    stored: Array,
    bad: Array,
    out: Array,
    streams: bool,
    steps: Any,
) -> None:
    """The same for integers up to ``steps``."""
    given = pointers_of(source[:3], source[3])
    n, numel, stats, cs = place[5], place[6], stack_floats(), stack_floats()
    bytes_, target = data_of(packed), (data_of(out), streams)
    unsafe = 0
    for first in range(lo, hi, _BATCH):
        blocks = min(_BATCH, hi - first)
        for b in range(blocks):
            at, bits = (first + b) * n, no_bits()
            for j in range(0, n, LANES):
                value = residual_at(given, at + j, min(n, numel - at) - j)
                bits = larger(bits, bits_of_magnitude(value))
            stats[b] = largest(bits)
        unsafe += _unsafe(stats, blocks)
        for b in range(blocks):
            cs[b] = storable(stats[b] / steps, True)
            stored[first + b] = bf16_bits(cs[b])
        for b in range(blocks):
            at, c = (first + b) * n, cs[b]
            inverse = over(_f32(1), c)
            for j in range(0, n, LANES):
                have = min(n, numel - at) - j
                expected = expected_at(given, at + j, have)
                value = load_first(given[0], at + j, have) - expected
                whole = nearest_steps(value * inverse, steps)
                store_codes(bits_of(whole), 8, bytes_, at + j, n - j)
                if out.size:
                    put(expected, (whole - ROUNDING) * c, target, at + j, have)
    settle_streams()
    if unsafe:
        bad[0] = 1
