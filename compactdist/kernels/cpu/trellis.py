"""The loop of the transform codec that chooses levels along a trellis: sixty-four courses side by side, by Numba.

The courses of a component are 64 rows apart, so that a turn of all of them is one run of rows. What each subset would
lose in each turn is kept; then four rounds find the state to begin and end in, a fifth keeps its decisions, and the way
back writes planes and levels.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from compactdist.kernels.cpu import call
from compactdist.kernels.cpu.simd.ints import nearest_ints
from compactdist.kernels.cpu.simd.jit import inlined
from compactdist.kernels.cpu.simd.memory import load, load_first, shifted, store
from compactdist.kernels.cpu.simd.packing import mask_at, store_codes, store_mask
from compactdist.kernels.cpu.simd.slots import (
    ELEMENTS_AT,
    bytes_at,
    floats_at,
    longs_at,
    next_part,
    own_room,
    shifted_floats,
)
from compactdist.kernels.cpu.simd.vectors import folded, where, zeros
from compactdist.kernels.reference import LANES
from compactdist.kernels.reference.components import FAR, FARTHEST, STRIDE

_f32 = np.float32
_FIRST_PASS, _OUT, _CODES, _ROWS = call.FIRST_PASS, call.OUT, call.CODES, call.ROWS
_DECISIONS, _THERE = call.DECISIONS, call.THERE
_PLACES, _DEPTHS, _PLANES = call.PLACES, call.DEPTHS, call.PLANES
_STEPS, _TURNED, _ROW_SCALES, _ROW_INVERSES = call.STEPS, call.TURNED, call.ROW_SCALES, call.ROW_INVERSES
_INVERSES, _ENERGIES, _AGREEMENTS = call.INVERSES, call.ENERGIES, call.AGREEMENTS
_FARTHEST, _FAR = _f32(FARTHEST), _f32(FAR)


@inlined
def _held(value: Any) -> Any:
    """Within ``FARTHEST``; NaN, too."""
    value = where(value >= -_FARTHEST, value, zeros() - _FARTHEST)
    return where(value >= _FARTHEST, zeros() + _FARTHEST, value)


@inlined
def _cost(value: Any, table: Any, count: int, subset: int, there: Any) -> Any:
    """What the nearest of the ``count`` levels of a subset loses; nothing of rows that are not there."""
    at, borders = STRIDE + subset * count, subset * (count - 1)
    level = zeros() + table[at]
    for i in range(count - 1):
        level = level + where(value >= table[borders + i], table[at + i + 1] - table[at + i], zeros())
    return (value - level) * (value - level) * there


@inlined
def _least(one: Any, other: Any) -> Any:
    return where(one >= other, other, one)


@inlined
def _started(state: int, of: int) -> Any:
    """What a course has lost at its beginning in one state, that of another."""
    return zeros() + (_f32(0) if state == of else _FAR)


@inlined
def _round(costs: Any, turns: int, state: int) -> Any:
    """What the best course from a state back to it loses."""
    m0, m1, m2, m3 = _started(state, 0), _started(state, 1), _started(state, 2), _started(state, 3)
    for t in range(turns):
        at = t * 4 * LANES
        d0, d1, d2, d3 = (
            load(costs, at),
            load(costs, at + LANES),
            load(costs, at + 2 * LANES),
            load(costs, at + 3 * LANES),
        )
        n0, n1 = _least(m0 + d0, m2 + d2), _least(m0 + d2, m2 + d0)
        n2, n3 = _least(m1 + d1, m3 + d3), _least(m1 + d3, m3 + d1)
        m0, m1, m2, m3 = n0, n1, n2, n3
    if state == 0:
        m1 = m0
    elif state == 2:
        m1 = m2
    elif state == 3:
        m1 = m3
    return m1


@inlined
def _better(one: Any, other: Any, decisions: Any, at: int) -> Any:
    """The lesser metric; keeps which one it is."""
    second = one >= other
    store_mask(second, decisions, at, LANES)
    return where(second, other, one)


@inlined
def _of_state(last: Any, now: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    """By two bits of each lane, as floats: a for 00, b where ``now`` is 1, c where ``last`` is, d for both."""
    half = _f32(0.5)
    return where(last >= half, where(now >= half, d, c), where(now >= half, b, a))


@inlined
def _level_of(value: Any, table: Any, count: int, high: Any, low: Any) -> Any:
    """Number and level of the nearest level of each lane's subset, ``2 * high + low``."""
    number, at = zeros(), STRIDE
    a, b, c, d = table[at], table[at + count], table[at + 2 * count], table[at + 3 * count]
    level = _of_state(high, low, zeros() + a, zeros() + b, zeros() + c, zeros() + d)
    for i in range(count - 1):
        k = count - 1
        border = _of_state(
            high,
            low,
            zeros() + table[i],
            zeros() + table[k + i],
            zeros() + table[2 * k + i],
            zeros() + table[3 * k + i],
        )
        at = STRIDE + i + 1
        a, b, c, d = table[at], table[at + count], table[at + 2 * count], table[at + 3 * count]
        next_level = _of_state(high, low, zeros() + a, zeros() + b, zeros() + c, zeros() + d)
        beyond = value >= border
        number, level = number + where(beyond, _f32(1), zeros()), where(beyond, next_level, level)
    return number, level


def choose(kept: str) -> Any:
    """As ``components.choose``, with levels along a trellis."""
    kept_at = ELEMENTS_AT[kept]

    def body(args: Any) -> int:
        rows, planes, out = args[_ROWS], bytes_at(args, _CODES), bytes_at(args, _OUT)
        scales, row_inverses = floats_at(args, _ROW_SCALES), floats_at(args, _ROW_INVERSES)
        places, depths, first_planes = longs_at(args, _PLACES), longs_at(args, _DEPTHS), longs_at(args, _PLANES)
        ones, decisions = floats_at(args, _STEPS), bytes_at(args, _DECISIONS)
        costs, every, last_rows = own_room(args, _FIRST_PASS), load(ones, 0), load(floats_at(args, _THERE), 0)
        stride, turns = (rows + 7) // 8 * 8, (rows + LANES - 1) // LANES
        lo, hi = next_part(args, _FIRST_PASS)
        while lo < hi:
            for k in range(lo, hi):
                depth, plane, inverse = depths[k], first_planes[k], floats_at(args, _INVERSES)[k]
                given = shifted(kept_at(args, _TURNED), places[k] * rows)
                table, count = shifted_floats(ones, depth * 2 * STRIDE), 1 << (depth - 1)
                for t in range(turns):
                    r, at = t * LANES, t * 4 * LANES
                    left = rows - r
                    value = _held((load_first(given, r, left) * inverse) * load_first(row_inverses, r, left))
                    there = every
                    if t == turns - 1:
                        there = last_rows
                    store(_cost(value, table, count, 0, there), costs, at)
                    store(_cost(value, table, count, 1, there), costs, at + LANES)
                    store(_cost(value, table, count, 2, there), costs, at + 2 * LANES)
                    store(_cost(value, table, count, 3, there), costs, at + 3 * LANES)
                one = _f32(1)
                absent = where(last_rows >= _f32(0.5), zeros(), _FAR)
                least, state = _round(costs, turns, 0), zeros()
                for s in range(1, 4):
                    metric = _round(costs, turns, s)
                    if s != 2:  # the bit of a row that is not there is 0
                        metric = metric + absent
                    less = least >= metric
                    least, state = where(less, metric, least), where(less, _f32(s), state)
                last = where(state >= _f32(1.5), one, zeros())
                now = state - (last + last)
                m0 = _of_state(last, now, zeros(), zeros() + _FAR, zeros() + _FAR, zeros() + _FAR)
                m1 = _of_state(last, now, zeros() + _FAR, zeros(), zeros() + _FAR, zeros() + _FAR)
                m2 = _of_state(last, now, zeros() + _FAR, zeros() + _FAR, zeros(), zeros() + _FAR)
                m3 = _of_state(last, now, zeros() + _FAR, zeros() + _FAR, zeros() + _FAR, zeros())
                for t in range(turns):
                    at, to = t * 4 * LANES, (k * turns + t) * 4 * LANES
                    d0, d1 = load(costs, at), load(costs, at + LANES)
                    d2, d3 = load(costs, at + 2 * LANES), load(costs, at + 3 * LANES)
                    n0 = _better(m0 + d0, m2 + d2, decisions, to)
                    n1 = _better(m0 + d2, m2 + d0, decisions, to + LANES)
                    n2 = _better(m1 + d1, m3 + d3, decisions, to + 2 * LANES)
                    n3 = _better(m1 + d3, m3 + d1, decisions, to + 3 * LANES)
                    m0, m1, m2, m3 = n0, n1, n2, n3
                energy, agreement = zeros(), zeros()
                for t in range(turns - 1, -1, -1):
                    r = t * LANES
                    left, at = rows - r, (k * turns + t) * 4 * LANES
                    before = _of_state(
                        last,
                        now,
                        where(mask_at(decisions, at, LANES), one, zeros()),
                        where(mask_at(decisions, at + LANES, LANES), one, zeros()),
                        where(mask_at(decisions, at + 2 * LANES, LANES), one, zeros()),
                        where(mask_at(decisions, at + 3 * LANES, LANES), one, zeros()),
                    )
                    value, scale, there = load_first(given, r, left), load_first(scales, r, left), every
                    if t == turns - 1:
                        there = last_rows
                    deviation = _held((value * inverse) * load_first(row_inverses, r, left))
                    number, level = _level_of(deviation, table, count, (now - before) * (now - before), last)
                    size, half = (min(left, LANES) + 7) // 8 * 8, _f32(0.5)
                    store_mask(now * there >= half, planes, plane * stride + r, size)
                    number = number * there
                    for bit in range(depth - 2, -1, -1):
                        weight = _f32(1 << bit)
                        mask = number >= weight
                        store_mask(mask, planes, (plane + 1 + bit) * stride + r, size)
                        number = where(mask, number - weight, number)
                    store_codes(nearest_ints(level), -8, out, k * rows + r, left)
                    level = level * scale
                    energy, agreement = energy + level * level, agreement + level * value
                    now, last = last, before
                floats_at(args, _ENERGIES)[k] = folded(energy)
                floats_at(args, _AGREEMENTS)[k] = folded(agreement)
            lo, hi = next_part(args, _FIRST_PASS)
        return 0

    return body
