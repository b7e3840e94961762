"""The transform codec in Triton: weights from a basis, planes of bits to levels to tensors, correlations of levels, and
planes from components. What both ends compute has the bits of ``reference/components.py`` and of the codec.

No shape depends on a value: every component takes part, and one without bits has the depth 0, whose level is 0.
Products are of 8-bit integers, added up in 32 bits. A weight of 14 bits is two of them, ``128 * high + low``; sums stay
below ``2**24``, so they are the same whole numbers in float32.

Arguments that several kernels share:

* ``rows``, ``channels``, ``numel``: of the tensor's matrices and of its memory;
* ``width``, ``blocks``: channels of a block, and blocks of a group;
* ``depths``, ``planes``: of each component, its bits and its first plane, int32 ``(G, K)``;
* ``levels``: int8 ``(9, 256)``, by depth and code; of depth 0 zeros;
* ``BEHIND``: bytes of a plane from a row to the next one of its course along the trellis (``trellis.py``); 0 without
  one. Codes have a bit more there;
* ``payload``, ``nbytes``, ``planes_at``, ``plane_nbytes``: of all groups, bytes of a group, where in these its planes
  begin, and bytes of a plane.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

from compactdist.kernels.gpu.elements import F32_MAX, add_change, clamped, decode_bf16, places_of, round_half_even
from compactdist.kernels.reference.components import LARGEST_UNIT, STRIDE

_STRIDE = tl.constexpr(STRIDE)
_LARGEST_UNIT = tl.constexpr(LARGEST_UNIT)


@triton.jit
def _scaled(basis, units, block, start, width, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Components ``start`` to ``start + ROWS`` of a block times their units, ``(ROWS, WIDTH)``; where each lies."""
    component, channel = start + tl.arange(0, ROWS)[:, None], tl.arange(0, WIDTH)[None, :]
    ok = (component < width) & (channel < width)
    at = (block * width + component) * width + channel
    row = tl.load(basis + at, mask=ok, other=0).to(tl.float32) * 0.000030517578125  # 2**-15
    unit = tl.load(units + block * width + component, mask=component < width, other=0)
    return row * unit, at, ok


@triton.jit
def weigh_basis(
    basis, units, high, low, steps, width, largest_weight, largest_sum, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    """One block: its components times their units, in whole numbers of two limbs.

    Args:
        basis: int16 ``(G, M, n, n)``, 32767 for 1.
        units: what a level of 1 is of each component, float32 ``(G, K)``.
        high, low: int8 ``(G, M, n, n)``, receive the limbs.
        steps: float32 ``(G, M)``, receives what a weight of 1 is.
        largest_weight, largest_sum: as ``ComponentSpec`` says.
    """
    block = tl.program_id(0)
    most = tl.zeros((ROWS, WIDTH), tl.float32)
    for start in range(0, width, ROWS):
        value, _, _ = _scaled(basis, units, block, start, width, ROWS, WIDTH)
        most = tl.maximum(most, tl.abs(value))
    largest = tl.max(tl.max(most, axis=1, keep_dims=True), axis=0, keep_dims=True)
    step = tl.div_rn(largest, tl.full((1, 1), 1.0, tl.float32) * largest_weight)
    divisor = tl.where(step > 0, step, 1.0)
    sums = tl.zeros((ROWS, WIDTH), tl.float32)
    for start in range(0, width, ROWS):
        value, _, _ = _scaled(basis, units, block, start, width, ROWS, WIDTH)
        sums += tl.abs(round_half_even(tl.div_rn(value, tl.broadcast_to(divisor, (ROWS, WIDTH)))))
    total = tl.max(tl.sum(sums, axis=0, keep_dims=True), axis=1, keep_dims=True)  # whole numbers: in any order
    excess = tl.div_rn(total, tl.full((1, 1), 1.0, tl.float32) * largest_sum)
    step = step * tl.maximum(excess, 1.0)
    divisor = tl.where(step > 0, step, 1.0)
    for start in range(0, width, ROWS):
        value, at, ok = _scaled(basis, units, block, start, width, ROWS, WIDTH)
        whole = round_half_even(tl.div_rn(value, tl.broadcast_to(divisor, (ROWS, WIDTH))))
        upper = round_half_even(whole * 0.0078125)
        tl.store(high + at, upper.to(tl.int8), mask=ok)
        tl.store(low + at, (whole - upper * 128.0).to(tl.int8), mask=ok)
    tl.store(steps + block + tl.zeros((1, 1), tl.int32), step)


@triton.jit
def _level(code, depth, levels):
    return tl.load(levels + depth * _STRIDE + code)


@triton.jit
def _bytes_of(payload, bit: tl.constexpr, plane, depth, at, ok, plane_nbytes, BEHIND: tl.constexpr):
    """Bytes with one bit of codes, int32.

    Args:
        plane, depth: of components.
        at: which bytes of their planes.
        ok: where there are any; broadcast with them.
    """
    if BEHIND == 0 or bit > 1:
        number: tl.constexpr = bit if BEHIND == 0 else bit - 1
        some = tl.load(payload + ((plane + number) * plane_nbytes + at), mask=(number < depth) & ok, other=0)
    else:  # a course is a ring; bits that are not there are 0
        ring = tl.cdiv(plane_nbytes, BEHIND) * BEHIND
        once = tl.where(at < BEHIND, at + ring, at) - BEHIND
        first, ok = plane * plane_nbytes, (depth > 0) & ok
        if bit == 0:
            some = tl.load(payload + (first + once), mask=ok & (once < plane_nbytes), other=0)
        else:
            twice = tl.where(once < BEHIND, once + ring, once) - BEHIND
            some = tl.load(payload + (first + at), mask=ok, other=0)
            some ^= tl.load(payload + (first + twice), mask=ok & (twice < plane_nbytes), other=0)
    return some.to(tl.int32)


@triton.jit
def _levels_of_bytes(
    payload,
    depth,
    plane,
    levels,
    first,
    plane_nbytes,
    BYTES: tl.constexpr,
    COMPONENTS: tl.constexpr,
    BEHIND: tl.constexpr,
):
    """Levels of ``8 * BYTES`` rows, int8 ``(8 * BYTES, COMPONENTS)``; anything where there is no row.

    Args:
        payload: the first plane of the group.
        depth, plane: int32 ``(COMPONENTS,)``.
        first: byte of each plane that the rows begin with.
    """
    at, lane = first + tl.arange(0, BYTES), tl.arange(0, 8)
    codes = tl.zeros((BYTES, 8, COMPONENTS), tl.int32)
    there = (at < plane_nbytes)[:, None]
    for bit in tl.static_range(8):
        some = _bytes_of(payload, bit, plane[None, :], depth[None, :], at[:, None], there, plane_nbytes, BEHIND)
        codes |= ((some[:, None, :] >> lane[None, :, None]) & 1) << bit
    level = _level(codes, depth[None, None, :], levels)
    return tl.reshape(level, (8 * BYTES, COMPONENTS))


@triton.jit
def decode_components(
    base,
    second,
    base_scales,
    second_scales,
    coefficient,
    out,
    accepted,
    copy,
    payload,
    high,
    low,
    steps,
    depths,
    planes,
    levels,
    row_scales,
    row_at,
    column_at,
    rows,
    channels,
    numel,
    width,
    blocks,
    nbytes,
    planes_at,
    plane_nbytes,
    TERMS: tl.constexpr,
    PLACE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    BEHIND: tl.constexpr,
    CHECKED: tl.constexpr,
    COPIES: tl.constexpr,
):
    """``ROWS`` rows of ``WIDTH`` channels of a block: levels from planes, times weights, scaled, plus what is expected.

    Args:
        base, second, base_scales, second_scales, coefficient, TERMS: as ``elements.expected`` takes them; ``out`` may
            be the memory of ``base`` or ``second``.
        accepted, copy, CHECKED, COPIES: as ``elements.add_change`` takes them.
        high, low: limbs of weights, as ``weigh_basis`` writes them.
        steps: what a weight of 1 is, float32 ``(G, M)``, to be multiplied by gain and largest amplitude.
        row_scales: float32 ``(G, R)``.
        row_at, column_at, PLACE: where rows and channels lie, as ``elements.in_rows`` takes them; not ``EIGHTS``.
        PARTS: how many times ``WIDTH`` covers a block.
    """
    terms = (base, second, base_scales, second_scales, coefficient)
    tiles = tl.cdiv(rows, ROWS)
    part, block = tl.program_id(0) % PARTS, tl.program_id(0) // PARTS % blocks
    tile, group = tl.program_id(0) // PARTS // blocks % tiles, tl.program_id(0) // PARTS // blocks // tiles
    of_block = group * blocks + block
    column = part * WIDTH + tl.arange(0, WIDTH)[None, :]
    upper, lower = tl.zeros((ROWS, WIDTH), tl.int32), tl.zeros((ROWS, WIDTH), tl.int32)
    first_plane = payload + group * nbytes + planes_at
    for start in range(0, width, 32):
        component = start + tl.arange(0, 32)
        inside = component < width
        depth = tl.load(depths + of_block * width + component, mask=inside, other=0)
        plane = tl.load(planes + of_block * width + component, mask=inside, other=0)
        byte = tile * (ROWS // 8)
        level = _levels_of_bytes(first_plane, depth, plane, levels, byte, plane_nbytes, ROWS // 8, 32, BEHIND)
        at = (of_block * width + component)[:, None] * width + column
        ok = inside[:, None] & (column < width)
        upper = tl.dot(level, tl.load(high + at, mask=ok, other=0), upper, out_dtype=tl.int32)
        lower = tl.dot(level, tl.load(low + at, mask=ok, other=0), lower, out_dtype=tl.int32)
    row = tile * ROWS + tl.arange(0, ROWS)[:, None]
    source = payload + group * nbytes
    gain = decode_bf16(tl.load((source + 4 + 2 * block).to(tl.pointer_type(tl.int16))).to(tl.int32))
    step = (tl.load(steps + of_block) * gain) * tl.load(source.to(tl.pointer_type(tl.float32)))
    step = clamped(tl.where(step == step, step, 0.0), F32_MAX)  # whatever the payload says
    scale = tl.load(row_scales + group * rows + row, mask=row < rows, other=0)
    value = (upper * 128 + lower).to(tl.float32) * step
    if tl.abs(step) > _LARGEST_UNIT:
        tl.debug_barrier()  # else it is no branch: all is computed, and one of two values taken
        value = clamped(value, F32_MAX)
    value = value * scale
    if tl.abs(step) > _LARGEST_UNIT:
        tl.debug_barrier()
        value = clamped(value, F32_MAX)
    at, ok = places_of(group, row, block * width + column, row_at, column_at, rows, channels, numel, PLACE)
    ok = ok & (column < width)
    add_change(terms, out, accepted, copy, at, ok, value, TERMS, CHECKED, COPIES)


@triton.jit
def _evidence(
    payload,
    order,
    depths,
    planes,
    levels,
    weight,
    row,
    first,
    width,
    plane_nbytes,
    COMPONENTS: tl.constexpr,
    BEHIND: tl.constexpr,
):
    """Levels of some rows times their weights, in whole numbers, int8 ``(COMPONENTS, rows)``.

    Args:
        order, depths, planes: of the block.
        weight: of the rows, float32 ``(rows,)``, 0 to 1; 0 where there is none.
        row: int32 ``(rows,)``.
        first: place in ``order`` of the first component.
    """
    place = first + tl.arange(0, COMPONENTS)
    component = tl.load(order + place, mask=place < width, other=0)
    depth = tl.load(depths + component, mask=place < width, other=0)
    plane = tl.load(planes + component, mask=place < width, other=0)
    codes = tl.zeros((COMPONENTS, row.shape[0]), tl.int32)
    byte, counts = (row // 8)[None, :], (weight > 0)[None, :]
    for bit in tl.static_range(8):
        some = _bytes_of(payload, bit, plane[:, None], depth[:, None], byte, counts, plane_nbytes, BEHIND)
        codes |= ((some >> (row % 8)[None, :]) & 1) << bit
    level = _level(codes, depth[:, None], levels)
    return round_half_even(level.to(tl.float32) * weight[None, :]).to(tl.int8)


@triton.jit
def correlate(
    payload,
    order,
    depths,
    planes,
    levels,
    weights,
    sums,
    width,
    sampled,
    step,
    nbytes,
    planes_at,
    plane_nbytes,
    blocks,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    BEHIND: tl.constexpr,
):
    """Sums over rows of products of levels that are weighted by their row, of ``WIDTH`` and ``WIDTH`` components.

    Args:
        order: which component of the block comes at each place, int32 ``(G, M, n)``.
        weights: of each row that counts, float32 ``(G, sampled)``.
        sums: float32 ``(G, M, n, n)``, in that order; below ``2**24``.
        step: from one row that counts to the next.
        PARTS: how many times ``WIDTH`` covers a block.
    """
    second, first = tl.program_id(0) % PARTS * WIDTH, tl.program_id(0) // PARTS % PARTS * WIDTH
    of_block = tl.program_id(0) // PARTS // PARTS
    group = of_block // blocks
    source = payload + group * nbytes + planes_at
    order, depths, planes = order + of_block * width, depths + of_block * width, planes + of_block * width
    total = tl.zeros((WIDTH, WIDTH), tl.int32)
    for start in range(0, sampled, 32):
        index = start + tl.arange(0, 32)
        row = index * step
        weight = tl.load(weights + group * sampled + index, mask=index < sampled, other=0)
        some = _evidence(source, order, depths, planes, levels, weight, row, first, width, plane_nbytes, WIDTH, BEHIND)
        if PARTS == 1:
            others = some
        else:
            others = _evidence(
                source, order, depths, planes, levels, weight, row, second, width, plane_nbytes, WIDTH, BEHIND
            )
        total = tl.dot(some, tl.trans(others), total, out_dtype=tl.int32)
    row, column = first + tl.arange(0, WIDTH)[:, None], second + tl.arange(0, WIDTH)[None, :]
    at = (of_block * width + row) * width + column
    tl.store(sums + at, total.to(tl.float32), mask=(row < width) & (column < width))


@triton.jit
def choose_components(
    turned,
    inverses,
    row_scales,
    row_inverses,
    payload,
    depths,
    planes,
    borders,
    levels,
    energies,
    agreements,
    rows,
    components,
    nbytes,
    planes_at,
    plane_nbytes,
    COMPONENTS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """``ROWS`` rows of ``COMPONENTS`` components: their planes, and what ``reference.components.choose`` sums up.

    Args:
        turned: float32 ``(G, K, R)``.
        inverses: what makes standard deviations of a component of a row of scale 1, float32 ``(G, K)``.
        row_scales, row_inverses: float32 ``(G, R)``.
        borders: float32 ``(9, 2, STRIDE)``, as ``Chosen.steps``.
        energies, agreements: float32 ``(G, tiles of rows, K)``, receive the sums over a tile.
    """
    parts, tiles = tl.cdiv(components, COMPONENTS), tl.cdiv(rows, ROWS)
    part, tile = tl.program_id(0) % parts, tl.program_id(0) // parts % tiles
    group = tl.program_id(0) // parts // tiles
    component = part * COMPONENTS + tl.arange(0, COMPONENTS)
    row = tile * ROWS + tl.arange(0, ROWS)
    inside, known = component < components, row < rows
    of = group * components + component
    depth = tl.load(depths + of, mask=inside, other=0)[:, None]
    plane = tl.load(planes + of, mask=inside, other=0)
    ok = (depth > 0) & known[None, :]
    value = tl.load(turned + of[:, None] * rows + row[None, :], mask=ok, other=0)
    scale = tl.load(row_scales + group * rows + row, mask=known, other=0)[None, :]
    inverse = tl.load(row_inverses + group * rows + row, mask=known, other=0)[None, :]
    deviation = (value * tl.load(inverses + of, mask=inside, other=0)[:, None]) * inverse
    code = tl.zeros((COMPONENTS, ROWS), tl.int32)
    for step in tl.static_range(8):
        bit = 7 - step  # how many borders are at most the deviation, found by halves
        more = code + (1 << bit)
        deep = (bit < depth) & (depth > 1)
        border = tl.load(borders + depth * (2 * _STRIDE) + more - 1, mask=deep & ok, other=0)
        code = tl.where(deep & (deviation >= border), more, code)
    code = tl.where(depth == 1, tl.where(value >= 0, 1, 0), code)  # of a sign no scale matters
    code = tl.where(ok, code, 0)
    level = tl.where(ok, _level(code, depth, levels).to(tl.float32), 0.0) * scale
    at = (group * tiles + tile) * components + component
    tl.store(energies + at, tl.sum(level * level, axis=1), mask=inside)
    tl.store(agreements + at, tl.sum(level * value, axis=1), mask=inside)
    byte = tile * (ROWS // 8) + tl.arange(0, ROWS // 8)
    eights = tl.reshape(code, (COMPONENTS, ROWS // 8, 8))
    for bit in tl.static_range(8):
        packed = tl.sum(((eights >> bit) & 1) << tl.arange(0, 8)[None, None, :], axis=2)
        to = payload + group * nbytes + planes_at + (plane + bit)[:, None] * plane_nbytes + byte[None, :]
        tl.store(to, packed.to(tl.uint8), mask=(bit < depth) & (byte < plane_nbytes)[None, :])
