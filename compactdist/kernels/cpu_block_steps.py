"""What happens to sixty-four elements of a block that has a scale, step by step; compiled by Numba.

Every step gets what is given, the position, that of what is kept of the block, how many elements belong to the block
from there on, how many of them are there, and what the steps before made of the block, to which it adds.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from compactdist.kernels.cpu_elements import inlined
from compactdist.kernels.cpu_ints import bits_of_magnitude, larger
from compactdist.kernels.cpu_memory import load, store
from compactdist.kernels.cpu_packing import mask_at, store_codes, store_mask
from compactdist.kernels.cpu_settle import LINEAR
from compactdist.kernels.cpu_steps import ask_for, expected_at, nearest_codes, put, reaching, residual_at
from compactdist.kernels.cpu_vectors import chosen, lane_mask, magnitude, negative, where, zeros
from compactdist.kernels.reference import LANES

LITTLE, MUCH = 1024, 2048
"""Elements of a batch of blocks, unless one block is more, where there is little and much to compute. What is kept of
the batches under way should fit the first cache. The next batch is asked for while this one is read.
"""

_f32 = np.float32


@inlined
def for_block(step: Any, given: Any, at: int, kept: int, n: int, numel: int, sums: Any) -> Any:
    """A step for every 64 of the ``n`` elements from ``at`` on, and what they made of the block."""
    have = min(n, numel - at)
    whole = max(have, 0) // LANES * LANES
    for j in range(0, whole, LANES):
        sums = step(given, at + j, kept + j, LANES, LANES, sums)
    for j in range(whole, n, LANES):
        sums = step(given, at + j, kept + j, n - j, have - j, sums)
    return sums


@inlined
def find_signs(given: Any, at: int, kept: int, count: int, have: int, lanes: Any) -> Any:
    """Sign codes, and by lanes the sums of magnitudes."""
    source, bytes_ = given
    ask_for(source, at + LITTLE)
    value = residual_at(source, at, have)
    store_mask(value >= _f32(0), bytes_, at, count)
    return lanes + magnitude(value)


@inlined
def restore_signs(given: Any, at: int, kept: int, count: int, have: int, scale: Any) -> Any:
    """What the receiver makes of sign codes."""
    source, target, bytes_ = given
    change = where(mask_at(bytes_, at, count), scale, negative(scale))
    put(expected_at(source, at, have), change, target, at, have)
    return scale


@inlined
def find_moments(given: Any, at: int, kept: int, count: int, have: int, sums: Any) -> Any:
    """Residuals to keep, and by lanes the sums of their magnitudes and squares."""
    source, values = given
    ask_for(source, at + MUCH)
    value = residual_at(source, at, have)
    store(value, values, kept)
    return sums[0] + magnitude(value), sums[1] + value * value


@inlined
def code_nearest(given: Any, at: int, kept: int, count: int, have: int, sums: Any) -> Any:
    """Codes, levels in the place of residuals, and by lanes the sums for the fit of the scale to them."""
    values, to, bits, search, levels, inverse = given
    value = load(values, kept)
    codes = nearest_codes(value, magnitude(value) * inverse, search, False)
    store_codes(codes, bits, to, at, count)
    level = chosen(levels, codes)
    if count < LANES:
        level = where(lane_mask(count), level, zeros())
    store(level, values, kept)
    return sums[0] + value * level, sums[1] + level * level


@inlined
def restore_levels(given: Any, at: int, kept: int, count: int, have: int, scale: Any) -> Any:
    """What the receiver makes of levels that were kept."""
    source, target, values = given
    put(expected_at(source, at, have), scale * load(values, kept), target, at, have)
    return scale


@inlined
def find_reach(given: Any, at: int, kept: int, count: int, have: int, bits: Any) -> Any:
    """Residuals to keep, and by lanes the bits of the largest magnitude."""
    source, values = given
    ask_for(source, at + LITTLE)
    value = residual_at(source, at, have)
    store(value, values, kept)
    return larger(bits, bits_of_magnitude(value))


@inlined
def code_reaching(given: Any, at: int, kept: int, count: int, have: int, c: Any) -> Any:
    """Codes of integers or float8, and what the receiver makes of them."""
    source, target, stores, to, values, inverse, kind = given
    value = load(values, kept)
    codes, change = reaching(kind, value * inverse, value < _f32(0), c)
    store_codes(codes, -8 if kind == LINEAR else 8, to, at, count)
    if stores:
        put(expected_at(source, at, have), change, target, at, have)
    return c
