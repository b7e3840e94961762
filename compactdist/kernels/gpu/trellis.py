"""Levels along a trellis in Triton: what ``reference.components.choose_on_trellis`` does.

A thread has a course of a component and goes round it twice. On the way there it has 16 metrics, of courses from each
state to each; what each course would have come from is kept, and back it follows the one that lost least. Levels are
whole numbers, so how many lie below a value stands in a table of whole numbers; the next four on either side are those
of all subsets. Arguments that other kernels take, too, are as in ``components.py``.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

from compactdist.kernels.reference.components import FAR, FARTHEST, STRIDE

BEYOND = 4
"""Levels that a row of the table has on either side, which no value is near."""

_FAR, _FARTHEST, _STRIDE = tl.constexpr(FAR), tl.constexpr(FARTHEST), tl.constexpr(STRIDE)
_BEYOND = tl.constexpr(BEYOND)


@triton.jit
def _held(value):
    """Within ``FARTHEST``; NaN, too."""
    value = tl.where(value >= -_FARTHEST, value, -_FARTHEST)
    return tl.where(value >= _FARTHEST, _FARTHEST, value)


@triton.jit
def _cost(value, near, number: tl.constexpr):
    """What the nearest level of a subset loses, whose levels are the ``number``-th and the fourth after it."""
    away = tl.minimum(value - tl.load(near + number), tl.load(near + number + 4) - value)
    return away * away


@triton.jit
def _turned(d0, d1, d2, d3, by):
    """Four values, each moved on by 0 to 3 places."""
    odd, two = by % 2 == 1, by >= 2
    e0, e1, e2, e3 = tl.where(odd, d3, d0), tl.where(odd, d0, d1), tl.where(odd, d1, d2), tl.where(odd, d2, d3)
    return tl.where(two, e2, e0), tl.where(two, e3, e1), tl.where(two, e0, e2), tl.where(two, e1, e3)


@triton.jit
def _passed(m0, m1, m2, m3, d0, d1, d2, d3):
    """Metrics after one more turn, and four bits: which of them came from the other of two states."""
    a0, a1, a2, a3 = m0 + d0, m0 + d2, m1 + d1, m1 + d3
    b0, b1, b2, b3 = m2 + d2, m2 + d0, m3 + d3, m3 + d1
    came = tl.where(a0 >= b0, 1, 0) | tl.where(a1 >= b1, 2, 0) | tl.where(a2 >= b2, 4, 0) | tl.where(a3 >= b3, 8, 0)
    return tl.minimum(a0, b0), tl.minimum(a1, b1), tl.minimum(a2, b2), tl.minimum(a3, b3), came


@triton.jit
def _write(planes, code, depth, first, plane_nbytes, COMPONENTS: tl.constexpr, LANES: tl.constexpr):
    """Bits of codes ``(COMPONENTS, LANES)`` to as many planes as each has, at most seven.

    Args:
        planes: the first plane of each component, ``(COMPONENTS, 1)``.
        depth: likewise.
        first: byte of each plane.
    """
    lane, byte = tl.arange(0, 8)[None, None, :], first + tl.arange(0, LANES // 8)[None, :]
    for half in tl.static_range(2):
        # each of four bits to a byte of its own; then all eight lanes of a byte
        apart = (((code >> (4 * half)) & 15) * 0x204081) & 0x1010101
        packed = tl.sum(tl.reshape(apart, (COMPONENTS, LANES // 8, 8)) << lane, axis=2)
        for bit in tl.static_range(4 - half):
            to = planes + (4 * half + bit) * plane_nbytes + byte
            ok = (4 * half + bit < depth) & (byte < plane_nbytes)
            tl.store(to, ((packed >> (8 * bit)) & 255).to(tl.uint8), mask=ok)


@triton.jit
def choose_on_trellis(
    turned,
    inverses,
    row_scales,
    row_inverses,
    payload,
    depths,
    planes,
    levels,
    below,
    courses,
    energies,
    agreements,
    rows,
    components,
    turns,
    nbytes,
    planes_at,
    plane_nbytes,
    COMPONENTS: tl.constexpr,
    LANES: tl.constexpr,
):
    """All rows of ``COMPONENTS`` components: their planes, and what ``reference.components.choose`` sums up.

    Args:
        turned: float32 ``(G, K, R)``.
        inverses: what makes levels of a component of a row of scale 1, float32 ``(G, K)``.
        row_scales, row_inverses: float32 ``(G, R)``.
        levels: by depth, ascending, ``BEYOND`` on either side; of depth 0 zeros; float32 ``(9, STRIDE + 2 * BEYOND)``.
        below: by depth and whole number from -128 on, how many levels are at most that; one less than there are, at
            most; uint8 ``(9, 256)``.
        courses: int32 ``(G, K, turns, LANES)``, keeps what a course came from, and how many levels lie below a value.
        energies, agreements: float32 ``(G, K)``, receive the sums.
        turns: of ``LANES`` rows, one row of each course.
    """
    parts = tl.cdiv(components, COMPONENTS)
    part, group = tl.program_id(0) % parts, tl.program_id(0) // parts
    place = part * COMPONENTS + tl.arange(0, COMPONENTS)[:, None]
    inside = place < components
    component = group * components + place
    depth = tl.load(depths + component, mask=inside, other=0)
    lane = tl.arange(0, LANES)[None, :]
    inverse = tl.load(inverses + component, mask=inside, other=0)
    given = turned + tl.where(inside, component, 0) * rows
    of_depth = levels + (depth * (_STRIDE + 2 * _BEYOND) + _BEYOND)
    kept = courses + component * (turns * LANES) + lane
    deepest = 0
    for one in tl.static_range(COMPONENTS):
        first = part * COMPONENTS + one
        deepest = tl.maximum(deepest, tl.load(depths + group * components + first, mask=first < components, other=0))
    energy, agreement = tl.zeros((COMPONENTS, LANES), tl.float32), tl.zeros((COMPONENTS, LANES), tl.float32)
    if deepest > 0:
        none = tl.zeros((COMPONENTS, LANES), tl.float32)
        far = none + _FAR
        a0, a1, a2, a3 = none, far, far, far
        b0, b1, b2, b3 = far, none, far, far
        c0, c1, c2, c3 = far, far, none, far
        d0, d1, d2, d3 = far, far, far, none
        for turn in range(turns):
            row = turn * LANES + lane
            there = row < rows
            value = tl.load(given + row, mask=inside & there, other=0)
            of_row = tl.load(row_inverses + group * rows + row, mask=there, other=0)
            value = _held((value * inverse) * of_row)
            # what is rounded up to a level here is at no distance from it
            whole = tl.minimum(tl.maximum((value + 128.0).to(tl.int32), 0), 255)
            number = tl.load(below + (depth * 256 + whole)).to(tl.int32)
            near = of_depth + number - 4
            e0, e1, e2, e3 = _cost(value, near, 0), _cost(value, near, 1), _cost(value, near, 2), _cost(value, near, 3)
            e0, e1, e2, e3 = _turned(e0, e1, e2, e3, number % 4)
            e0, e1 = tl.where(there, e0, 0.0), tl.where(there, e1, 0.0)
            e2, e3 = tl.where(there, e2, 0.0), tl.where(there, e3, 0.0)
            a0, a1, a2, a3, of_a = _passed(a0, a1, a2, a3, e0, e1, e2, e3)
            b0, b1, b2, b3, of_b = _passed(b0, b1, b2, b3, e0, e1, e2, e3)
            c0, c1, c2, c3, of_c = _passed(c0, c1, c2, c3, e0, e1, e2, e3)
            d0, d1, d2, d3, of_d = _passed(d0, d1, d2, d3, e0, e1, e2, e3)
            came = of_a | of_b << 4 | of_c << 8 | of_d << 12
            tl.store(kept + turn * LANES, came | number << 16, mask=inside)
        tl.debug_barrier()
        absent = tl.where((turns - 1) * LANES + lane < rows, 0.0, _FAR)  # the bit of a row that is not there is 0
        least, state = a0, tl.zeros((COMPONENTS, LANES), tl.int32)
        state, least = tl.where(b1 + absent < least, 1, state), tl.minimum(b1 + absent, least)
        state, least = tl.where(c2 < least, 2, state), tl.minimum(c2, least)
        state = tl.where(d3 + absent < least, 3, state)
        begun = 4 * state
        to = payload + group * nbytes + planes_at + tl.load(planes + component, mask=inside, other=0) * plane_nbytes
        for back in range(turns):
            turn = turns - 1 - back
            row = turn * LANES + lane
            there = row < rows
            value = tl.load(given + row, mask=inside & there, other=0)
            of_row = tl.load(row_inverses + group * rows + row, mask=there, other=0)
            scale = tl.load(row_scales + group * rows + row, mask=there, other=0)
            came = tl.load(kept + turn * LANES, mask=inside, other=0)
            before, number = (came >> (begun + state)) & 1, came >> 16
            now, last = state & 1, state >> 1
            nearest = number + ((2 * (now ^ before) + last - number) & 3)
            low, high = tl.load(of_depth + nearest - 4), tl.load(of_depth + nearest)
            upper = _held((value * inverse) * of_row) >= (low + high) * 0.5
            level = tl.where(there, tl.where(upper, high, low), 0.0) * scale
            code = tl.where(there, now | ((nearest >> 2) - tl.where(upper, 0, 1)) << 1, 0)
            _write(to, code, depth, turn * (LANES // 8), plane_nbytes, COMPONENTS, LANES)
            energy += level * level
            agreement += level * value
            state = last + 2 * before
    at = group * components + part * COMPONENTS + tl.arange(0, COMPONENTS)
    ok = part * COMPONENTS + tl.arange(0, COMPONENTS) < components
    tl.store(energies + at, tl.sum(energy, axis=1), mask=ok)
    tl.store(agreements + at, tl.sum(agreement, axis=1), mask=ok)
