"""What both ends of the transform codec make of a payload's energies and rows, in Triton: who has how many bits, where
planes begin, scales, and the order in which a basis learns. To the bit what ``codecs/transform`` does in torch.

One program goes through all components of a group, a chunk at a time. Arguments are as in ``components.py``.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

from compactdist.kernels.gpu.elements import round_half_even

RECEIVED = tl.constexpr(0)
"""Codes are there."""
FITTED = tl.constexpr(1)
"""Codes are those of powers; weights for fitting rows are wanted."""
CODED = tl.constexpr(2)
"""Codes are those of powers; what components are multiplied by is wanted."""

_NO_CODE = tl.constexpr(-(1 << 20))
_LARGEST_CODE = tl.constexpr(255)


@triton.jit
def _codes(source, start, components, CHUNK: tl.constexpr):
    component = start + tl.arange(0, CHUNK)
    code = tl.load(source + component, mask=component < components, other=0).to(tl.int32)
    return component, tl.where(component < components, code, _NO_CODE)


@triton.jit
def _claims(code, worth, level, DEEPEST: tl.constexpr):
    """How many of each component's claims are at least ``level``."""
    claims = tl.zeros(code.shape, tl.int32)
    for bit in tl.static_range(DEEPEST):
        claims += tl.where(code + tl.load(worth + bit) >= level, 1, 0)
    return claims


@triton.jit
def _all_claims(source, worth, level, components, DEEPEST: tl.constexpr, CHUNK: tl.constexpr):
    total = 0
    for start in range(0, components, CHUNK):
        _, code = _codes(source, start, components, CHUNK)
        total += tl.sum(_claims(code, worth, level, DEEPEST), axis=0)
    return total


@triton.jit
def _fit_codes(source, powers, largest, components, per_octave, CHUNK: tl.constexpr):
    """Write the codes of powers, and the largest amplitude; returns that."""
    most = tl.zeros((CHUNK,), tl.float32)
    for start in range(0, components, CHUNK):
        component = start + tl.arange(0, CHUNK)
        most = tl.maximum(most, tl.load(powers + component, mask=component < components, other=0))
    power_of_most = tl.max(most, axis=0)
    divisor = tl.maximum(power_of_most, 1e-30) + tl.zeros((CHUNK,), tl.float32)
    for start in range(0, components, CHUNK):
        component = start + tl.arange(0, CHUNK)
        ok = component < components
        power = tl.load(powers + component, mask=ok, other=0)
        relative = tl.log2(tl.maximum(tl.div_rn(power, divisor), 1e-30)) * 0.5
        code = round_half_even(relative * per_octave + _LARGEST_CODE)
        tl.store(source + component, tl.minimum(tl.maximum(code, 0.0), 255.0).to(tl.uint8), mask=ok)
    amplitude = tl.sqrt_rn(power_of_most)
    tl.store(largest, amplitude)
    tl.debug_barrier()
    return amplitude


@triton.jit
def allot(
    payload,
    worth,
    amplitude_of,
    unit_level_of,
    depths,
    planes,
    amplitudes,
    units,
    powers,
    largest,
    factors,
    components,
    bits,
    nbytes,
    energies_at,
    per_octave,
    DEEPEST: tl.constexpr,
    STEPS: tl.constexpr,
    CHUNK: tl.constexpr,
    END: tl.constexpr,
    ON_TRELLIS: tl.constexpr,
):
    """The bits of each component of a group, see ``codecs/transform/depths.py``, and what follows from them.

    Args:
        worth: of the next bit of a component with 0, 1, ... bits, over the least, int32 ``(DEEPEST,)``.
        amplitude_of: of each code, float32 ``(256,)``.
        unit_level_of: what a level of 1 is of each depth, float32 ``(DEEPEST + 1,)``.
        depths, planes, amplitudes, units: receive, of each component, its bits, its first plane, its amplitude, and
            what a level of 1 is of it; int32 and float32 ``(G, K)``.
        powers: float32 ``(G, K)``, unless ``RECEIVED``.
        largest: float32 ``(G,)``, receives the root of the largest power, unless ``RECEIVED``.
        factors: float32 ``(G, K)``; if ``FITTED`` receives the inverse of an amplitude's square where there are bits;
            if ``CODED`` the inverse of what a level of 1 is (``ON_TRELLIS``), or of the amplitude.
        bits: all that are given away.
        energies_at: where codes begin in a group's payload.
        per_octave: codes to a factor of two.
        STEPS: ``2**STEPS`` is more than a claim can be.
    """
    group = tl.program_id(0)
    source, first = payload + group * nbytes + energies_at, group * components
    amplitude_of_all = 0.0
    if END != RECEIVED:
        amplitude_of_all = _fit_codes(source, powers + first, largest + group, components, per_octave, CHUNK)

    # the highest level that more claims reach than there are bits: those above it are served, of those at it the first
    border = -1
    for step in tl.static_range(STEPS):
        level = border + (1 << (STEPS - 1 - step))
        border = tl.where(_all_claims(source, worth, level, components, DEEPEST, CHUNK) > bits, level, border)
    left = bits - _all_claims(source, worth, border + 1, components, DEEPEST, CHUNK)
    taken = 0
    for start in range(0, components, CHUNK):
        component, code = _codes(source, start, components, CHUNK)
        above = _claims(code, worth, border + 1, DEEPEST)
        at = _claims(code, worth, border, DEEPEST) - above
        before = taken + tl.cumsum(at, axis=0) - at
        depth = above + tl.minimum(tl.maximum(left - before, 0), at)
        taken += tl.sum(at, axis=0)
        ok = component < components
        tl.store(depths + first + component, depth, mask=ok)
        amplitude = tl.load(amplitude_of + tl.maximum(code, 0))
        unit = amplitude * tl.load(unit_level_of + depth)
        tl.store(amplitudes + first + component, amplitude, mask=ok)
        tl.store(units + first + component, unit, mask=ok)
        if END != RECEIVED:
            factor = amplitude * amplitude_of_all
            if END == FITTED:
                factor = factor * factor
                known = (factor > 0) & (depth > 0)
            else:
                if ON_TRELLIS:
                    factor = unit * amplitude_of_all
                known = factor > 0
            inverse = tl.div_rn(tl.full((CHUNK,), 1.0, tl.float32), tl.where(known, factor, 1.0))
            tl.store(factors + first + component, tl.where(known, inverse, 0.0), mask=ok)
    tl.debug_barrier()

    plane = 0
    for deeper in tl.static_range(DEEPEST):
        for start in range(0, components, CHUNK):
            component = start + tl.arange(0, CHUNK)
            depth = tl.load(depths + first + component, mask=component < components, other=0)
            here = tl.where(depth == DEEPEST - deeper, 1, 0)
            number = tl.cumsum(here, axis=0) - here
            tl.store(planes + first + component, plane + number * (DEEPEST - deeper), mask=here == 1)
            plane += tl.sum(here, axis=0) * (DEEPEST - deeper)


@triton.jit
def _row_code(source, row, ok):
    """The half byte of a row."""
    byte = tl.load(source + row // 2, mask=ok, other=0).to(tl.int32)
    return (byte >> (row % 2 * 4)) & 15


@triton.jit
def read_rows(
    payload, scale_of, scales, weights, rows, sampled, step, nbytes, rows_at, ROWS: tl.constexpr, SAMPLES: tl.constexpr
):
    """The scales of ``ROWS`` rows.

    Args:
        scale_of: of each code, float32 ``(16,)``, ascending.
        scales: receives them, float32 ``(G, R)``.
        weights: receives those of rows that count, over the largest of these, float32 ``(G, sampled)``.
        step: from one row that counts to the next.
        rows_at: where their codes begin in a group's payload.
    """
    tiles = tl.cdiv(rows, ROWS)
    tile, group = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    source = payload + group * nbytes + rows_at
    index = tl.arange(0, SAMPLES)
    largest = tl.load(scale_of + tl.max(_row_code(source, index * step, index < sampled), axis=0))
    row = tile * ROWS + tl.arange(0, ROWS)
    ok = row < rows
    scale = tl.load(scale_of + _row_code(source, row, ok))
    tl.store(scales + group * rows + row, scale, mask=ok)
    weight = tl.div_rn(scale, tl.where(largest > 0, largest, 1.0) + tl.zeros((ROWS,), tl.float32))
    tl.store(weights + group * sampled + row // step, weight, mask=ok & (row % step == 0))


@triton.jit
def order_components(depths, accepted, order, counts, width, CHECKED: tl.constexpr, WIDTH: tl.constexpr):
    """Of one block: the components that have bits, then the others, both ascending; and how many have.

    Args:
        order: int32 ``(G, M, n)``.
        counts: int32 ``(G, M)``; -1 if ``CHECKED`` and the first of ``accepted`` is 0.
    """
    block, component = tl.program_id(0), tl.arange(0, WIDTH)
    ok = component < width
    chosen = tl.where(tl.load(depths + block * width + component, mask=ok, other=0) > 0, 1, 0)
    count, number = tl.sum(chosen, axis=0), tl.cumsum(chosen, axis=0) - chosen
    place = tl.where(chosen == 1, number, count + component - number)
    tl.store(order + block * width + place, component, mask=ok)
    if CHECKED:
        count = tl.where(tl.load(accepted) == 0, -1, count)
    tl.store(counts + block, count)
