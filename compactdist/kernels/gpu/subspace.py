"""The search of the low-rank codecs in Triton: directions that carry most of a matrix, and factors fitted to them.

Only senders run this: products may be the tensor cores', and sums of any order that is the same in every call.
Whether a stream remembers directions stands in memory of the device, so every call has the same launches: those of the
second round end at once where the first was enough.

Arguments that several kernels share:

* ``matrix``, ``HALF``, ``largest``, ``tiles``, ``TILES``: as ``lowrank.take_residual`` writes them and
  ``lowrank.factor_of`` takes them;
* ``rows``, ``channels``: of the matrices; ``count``: directions looked for; ``P``: at least as many, a power of two
  from 16 on; memory of directions is ``(G, P, ...)``;
* ``calls``: frames coded since the search began from nothing, int32 ``(G,)``;
* ``grams``: float32 ``(G, programs, 2, P, P)``, to be added up: products of the sketch, and of directions;
* ``PRECISION``: of products with the matrix.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

from compactdist.kernels.gpu.codes import nearest_of
from compactdist.kernels.gpu.elements import (
    bits_of,
    divide_or_zero,
    from_bits,
    inverse_or_zero,
    power_of_two_near_inverse,
    read,
    rounded_bf16,
    storable_scale,
    to_nearest_bf16,
)
from compactdist.kernels.gpu.lowrank import FOURS, factor_of
from compactdist.kernels.gpu.rotations import sweep_one
from compactdist.kernels.reference.scales import SIGMA_OF_MEAN_MAGNITUDE

_SIGMA_OF_MEAN_MAGNITUDE = tl.constexpr(SIGMA_OF_MEAN_MAGNITUDE)
_SMALLEST_FACTOR = tl.constexpr(2.0**-40)
_SMALLEST_PIVOT = tl.constexpr(1e-5)
_SMALLEST_ANGLE = tl.constexpr(1e-12)


@triton.jit
def _elements(matrix, at, ok, HALF: tl.constexpr):
    if HALF:
        return read(matrix.to(tl.pointer_type(tl.int16)), at, ok)
    else:
        return tl.load(matrix + at, mask=ok, other=0.0)


@triton.jit
def _noise(number, seed):
    """Evenly distributed numbers of variance 1, by their numbers."""
    bits = (number + seed * 40503 * 65537).to(tl.uint32, bitcast=True) * 0x9E3779B1
    bits = (bits ^ (bits >> 16)) * 0x85EBCA6B
    bits = (bits ^ (bits >> 13)) * 0xC2B2AE35
    return ((bits >> 24).to(tl.int32).to(tl.float32) - 127.5) * (1 / 74)


@triton.jit
def _begun(held, calls, group, direction, channel, ok, count, kept, channels):
    """Directions that a search begins with: those held, and random ones."""
    said = tl.load(calls + group + tl.zeros((1, 1), tl.int32))
    known = ok & (said > 0) & (direction < kept)
    before = read(held, (group * kept + direction) * channels + channel, known)
    random = _noise((group * count + direction) * channels + channel, said)
    return tl.where(known, before, tl.where(ok, random, 0.0))


@triton.jit
def sketch_rows(
    matrix, largest, start, held, calls, sketch, grams, rows, channels, count, kept, tiles, programs,
    BEGINS: tl.constexpr, AGAIN: tl.constexpr, LAST: tl.constexpr, HALF: tl.constexpr, PRECISION: tl.constexpr,
    TILES: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Inner products of rows with directions, and of these products; of every ``programs``-th tile of rows.

    Args:
        start: directions, float32 ``(G, P, C)``; if ``BEGINS``, those of ``_begun`` instead.
        held: bits of bfloat16 ``(G, kept, C)``.
        sketch: receives the products, float32 ``(G, P, R)``.
        AGAIN: only where the search began from nothing.
        LAST: inner products of the directions, too, over every ``programs``-th run of channels.
    """
    group, program = tl.program_id(0) // programs, tl.program_id(0) % programs
    wanted = True
    if AGAIN:
        wanted = tl.load(calls + group) == 0
    if wanted:
        factor = factor_of(largest, group, tiles, TILES)
        direction = tl.arange(0, P)[:, None]
        gram = tl.zeros((P, P), tl.float32)
        for tile in range(program, tl.cdiv(rows, ROWS), programs):
            row = tile * ROWS + tl.arange(0, ROWS)[None, :]
            made = tl.zeros((P, ROWS), tl.float32)
            for first in range(0, channels, WIDTH):
                channel = first + tl.arange(0, WIDTH)
                ok = (direction < count) & (channel < channels)[None, :]
                if BEGINS:
                    some = _begun(held, calls, group, direction, channel[None, :], ok, count, kept, channels)
                else:
                    some = tl.load(start + (group * P + direction) * channels + channel[None, :], mask=ok, other=0.0)
                there = (row < rows) & (channel < channels)[:, None]
                part = _elements(matrix, (group * rows + row) * channels + channel[:, None], there, HALF) * factor
                made = tl.dot(some, part, made, input_precision=PRECISION)
            tl.store(sketch + (group * P + direction) * rows + row, made, mask=row < rows)
            gram = tl.dot(made, tl.trans(made), gram, input_precision="ieee")
        at = (tl.program_id(0) * 2 * P + direction) * P + tl.arange(0, P)[None, :]
        tl.store(grams + at, gram)
        if LAST:
            gram = tl.zeros((P, P), tl.float32)
            for run in range(program, tl.cdiv(channels, WIDTH), programs):
                channel = run * WIDTH + tl.arange(0, WIDTH)[None, :]
                ok = (direction < count) & (channel < channels)
                some = tl.load(start + (group * P + direction) * channels + channel, mask=ok, other=0.0)
                gram = tl.dot(some, tl.trans(some), gram, input_precision="ieee")
            tl.store(grams + P * P + at, gram)


@triton.jit
def _gram_of(grams, group, programs, which: tl.constexpr, P: tl.constexpr):
    at = tl.arange(0, P)[:, None] * P + tl.arange(0, P)[None, :]
    total = tl.zeros((P, P), tl.float32)
    for program in range(0, programs):
        total += tl.load(grams + (2 * (group * programs + program) + which) * P * P + at)
    return total


@triton.jit
def _eliminated(gram, count, P: tl.constexpr):
    """Gauss' elimination of a Gram matrix whose rows are first scaled to length 1.

    Returns:
        What makes orthogonal rows of the rows; inverses of their squared lengths, 0 of one that the rows before it
        nearly make up; inverses of the rows' own lengths.
    """
    row, column = tl.arange(0, P)[:, None], tl.arange(0, P)[None, :]
    along = tl.sum(tl.where(row == column, gram, 0.0), axis=1)
    inverse = tl.where(along > 0, tl.div_rn(1.0, tl.sqrt_rn(tl.where(along > 0, along, 1.0))), 0.0)
    across = tl.sum(tl.where(row == column, inverse[:, None], 0.0), axis=0)
    left = gram * inverse[:, None] * across[None, :]
    made = tl.where(row == column, across[None, :], 0.0)
    for k in range(0, count):
        line = tl.sum(tl.where(row == k, left, 0.0), axis=0)[None, :]
        own = tl.sum(tl.where(row == k, made, 0.0), axis=0)[None, :]
        pivot = tl.sum(tl.where(column == k, line, 0.0), axis=1)[:, None]
        used = tl.sum(tl.where(column == k, left, 0.0), axis=1)[:, None]
        share = tl.where((row > k) & (pivot > _SMALLEST_PIVOT), used / tl.where(pivot > 0, pivot, 1.0), 0.0)
        left -= share * line
        made -= share * own
    pivots = tl.sum(tl.where(row == column, left, 0.0), axis=1)
    real = pivots > _SMALLEST_PIVOT
    return made, tl.where(real, tl.div_rn(1.0, tl.where(real, pivots, 1.0)), 0.0), inverse


@triton.jit
def turn_back(
    matrix, largest, grams, sketch, calls, start, rows, channels, count, tiles, programs,
    AGAIN: tl.constexpr, HALF: tl.constexpr, PRECISION: tl.constexpr, TILES: tl.constexpr,
    P: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """``WIDTH`` channels of directions: the matrix along the orthogonal rows that the sketch spans, of like lengths.

    Args:
        sketch: as ``sketch_rows`` writes it.
        start: receives the directions, float32 ``(G, P, C)``.
    """
    parts = tl.cdiv(channels, WIDTH)
    group, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    wanted = True
    if AGAIN:
        wanted = tl.load(calls + group) == 0
    if wanted:
        factor = factor_of(largest, group, tiles, TILES)
        made, weight, inverse = _eliminated(_gram_of(grams, group, programs, 0, P), count, P)
        made = made * (weight * inverse)[:, None]
        direction, channel = tl.arange(0, P)[:, None], part * WIDTH + tl.arange(0, WIDTH)[None, :]
        found = tl.zeros((P, WIDTH), tl.float32)
        for first in range(0, rows, ROWS):
            row = first + tl.arange(0, ROWS)
            some = tl.load(
                sketch + (group * P + direction) * rows + row[None, :], mask=(row < rows)[None, :], other=0.0
            )
            some = tl.dot(made, some, input_precision="ieee")
            there = (row < rows)[:, None] & (channel < channels)
            of = _elements(matrix, (group * rows + row[:, None]) * channels + channel, there, HALF) * factor
            found = tl.dot(some, of, found, input_precision=PRECISION)
        tl.store(start + (group * P + direction) * channels + channel, found, mask=channel < channels)


@triton.jit
def sort_directions(
    grams, matrices, basis, turns, count, n, programs, copies, noise,
    SWEEPS: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Of one group: what makes orthonormal rows of the sketch, the strongest first; 0 for those of rounding errors.

    They are the left singular vectors of the matrix within what its directions span, so the first ``rank`` carry most.

    Args:
        matrices, basis: float32 ``(2, copies, n, n)``, room for Jacobi's rotations.
        turns: receives it, float32 ``(G, P, P)``.
        n: ``count`` or one more, even, at least 4.
        noise: energy that rounding may account for, relative to that of the strongest direction.
    """
    group = tl.program_id(0)
    row, column = tl.arange(0, P)[:, None], tl.arange(0, P)[None, :]
    first, of_first = matrices + group * n * n, basis + group * n * n
    second, of_second = first + copies * n * n, of_first + copies * n * n
    ok, at = (row < n) & (column < n), row * n + column
    made, weight, _ = _eliminated(_gram_of(grams, group, programs, 1, P), count, P)
    made = made * tl.sqrt_rn(weight)[:, None]  # makes orthonormal ones of the directions
    gram = tl.dot(made, _gram_of(grams, group, programs, 0, P), input_precision="ieee")
    gram = tl.dot(gram, tl.trans(made), input_precision="ieee")
    tl.store(first + at, gram, mask=ok)
    tl.store(of_first + at, made, mask=ok)
    tl.debug_barrier()
    for _ in range(0, SWEEPS):
        sweep_one(first, second, of_first, of_second, n, n, n, _SMALLEST_ANGLE, P, ROWS, P)
    energy = tl.load(first + row * (n + 1), mask=row < n, other=-1.0)
    others = tl.load(first + column * (n + 1), mask=column < n, other=-1.0)
    before = (others > energy) | ((others == energy) & (column < row))
    place = tl.sum(tl.where(before & (column < n), 1, 0), axis=1)[:, None]
    most = tl.max(others, axis=1)[:, None]
    real = energy > tl.maximum(most, 1e-30) * noise
    scale = tl.where(real, tl.div_rn(1.0, tl.sqrt_rn(tl.where(real, energy, 1.0))), 0.0)
    turned = tl.load(of_first + at, mask=ok, other=0.0) * scale
    tl.store(turns + (group * P + place) * P + column, turned, mask=row < n)


@triton.jit
def _store_fitted(factor, ok, table, values, codes, scales, row, at, length, FORM: tl.constexpr, REFITS: tl.constexpr):
    """Round a component of a factor ``(1, LENGTH)`` to what will be sent, as ``codecs/lowrank/factors.py`` says.

    Args:
        values, codes: float32, at ``row * length``: what the receiver makes of it, and for ``FOURS`` its codes.
        scales: float32, at ``row``.
    """
    size = tl.where(tl.abs(factor) < _SMALLEST_FACTOR, 0.0, tl.abs(factor))
    if FORM == FOURS:
        near = power_of_two_near_inverse(tl.max(size, axis=1)[:, None])
        size = size * near
        energy, total = tl.sum(size * size, axis=1)[:, None], tl.sum(size, axis=1)[:, None]
        scale = divide_or_zero(energy, total * _SIGMA_OF_MEAN_MAGNITUDE)
        inverse = inverse_or_zero(scale)
        for _ in range(0, REFITS):
            inverse = inverse_or_zero(scale)
            level, _index = nearest_of(size, inverse, table, 4)
            scale = divide_or_zero(tl.sum(size * level, axis=1)[:, None], tl.sum(level * level, axis=1)[:, None])
        level, index = nearest_of(size, inverse, table, 4)
        scale = storable_scale(tl.div_rn(scale, near), False)
        tl.store(scales + row + tl.zeros((1, 1), tl.int32), scale)
        tl.store(codes + row * length + at, (index + tl.where(factor < 0, 8, 0)).to(tl.float32), mask=ok)
        size = level * scale
    else:
        size = from_bits(to_nearest_bf16(bits_of(size)))
    tl.store(values + row * length + at, tl.where(factor < 0, -size, size), mask=ok)


@triton.jit
def fit_left(
    turns, sketch, left, codes, scales, table, rows, count, rank,
    P: tl.constexpr, LENGTH: tl.constexpr, FORM: tl.constexpr, REFITS: tl.constexpr,
):  # fmt: skip
    """One direction of one group: of the first ``rank`` what will be sent, of the others as it is.

    Args:
        left: receives it, float32 ``(G, P, R)``.
        codes, scales, table, FORM: as ``_store_fitted`` takes them.
    """
    group, direction = tl.program_id(0) // count, tl.program_id(0) % count
    at = tl.arange(0, LENGTH)[None, :]
    found = tl.zeros((1, LENGTH), tl.float32)
    own = group * P + direction
    for k in range(0, count):
        found += tl.load(turns + own * P + k) * tl.load(sketch + (group * P + k) * rows + at, mask=at < rows, other=0.0)
    if direction < rank:
        _store_fitted(found, at < rows, table, left, codes, scales, own, at, rows, FORM, REFITS)
    else:
        tl.store(left + own * rows + at, found, mask=at < rows)


@triton.jit
def measure_along(
    matrix, largest, left, along, inverses, rows, channels, count, rank, tiles,
    HALF: tl.constexpr, PRECISION: tl.constexpr, TILES: tl.constexpr,
    P: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """``WIDTH`` channels of the matrix along ``left``; of a group's last program the inverse of U^T U.

    Args:
        along: float32 ``(G, P, C)``.
        inverses: float32 ``(G, R, R)``; 0 for a component that was rounded to nothing.
        R: at least ``rank``, a power of two from 16 on.
    """
    parts = tl.cdiv(channels, WIDTH)
    group, part = tl.program_id(0) // (parts + 1), tl.program_id(0) % (parts + 1)
    if part < parts:
        factor = factor_of(largest, group, tiles, TILES)
        direction, channel = tl.arange(0, P)[:, None], part * WIDTH + tl.arange(0, WIDTH)[None, :]
        found = tl.zeros((P, WIDTH), tl.float32)
        for first in range(0, rows, ROWS):
            row = first + tl.arange(0, ROWS)
            ok = (direction < count) & (row < rows)[None, :]
            some = tl.load(left + (group * P + direction) * rows + row[None, :], mask=ok, other=0.0)
            there = (row < rows)[:, None] & (channel < channels)
            of = _elements(matrix, (group * rows + row[:, None]) * channels + channel, there, HALF) * factor
            found = tl.dot(some, of, found, input_precision=PRECISION)
        tl.store(along + (group * P + direction) * channels + channel, found, mask=channel < channels)
    else:
        component, other = tl.arange(0, R)[:, None], tl.arange(0, R)[None, :]
        gram = tl.zeros((R, R), tl.float32)
        for first in range(0, rows, ROWS):
            row = first + tl.arange(0, ROWS)[None, :]
            ok = (component < rank) & (row < rows)
            some = tl.load(left + (group * P + component) * rows + row, mask=ok, other=0.0)
            gram = tl.dot(some, tl.trans(some), gram, input_precision="ieee")
        made, weight, _ = _eliminated(gram, rank, R)
        inverse = tl.dot(tl.trans(made), made * weight[:, None], input_precision="ieee")
        tl.store(inverses + (group * R + component) * R + other, inverse)


@triton.jit
def fit_right(
    inverses, along, right, codes, scales, table, largest, calls, next_held, next_calls,
    channels, count, rank, kept, tiles,
    P: tl.constexpr, R: tl.constexpr, LENGTH: tl.constexpr, TILES: tl.constexpr, FORM: tl.constexpr,
    REFITS: tl.constexpr,
):  # fmt: skip
    """One direction of one group: its row of V, if it is among the first ``rank``; and what the stream remembers of it.

    Args:
        right: float32 ``(G, P, C)``, receives V as the receiver has it.
        codes, scales, table, FORM: as ``_store_fitted`` takes them.
        next_held: bits of bfloat16 ``(G, kept, C)``: the directions that were not sent, then the strongest that were,
            each of mean square 1.
        next_calls: int32 ``(G,)``; 0, for a start from nothing, after a matrix that is zero or not finite.
    """
    group, direction = tl.program_id(0) // count, tl.program_id(0) % count
    at, own = tl.arange(0, LENGTH)[None, :], group * P + direction
    ok = at < channels
    if direction < rank:
        found = tl.zeros((1, LENGTH), tl.float32)
        for k in range(0, rank):
            weight = tl.load(inverses + (group * R + direction) * R + k)
            found += weight * tl.load(along + (group * P + k) * channels + at, mask=ok, other=0.0)
        _store_fitted(found, ok, table, right, codes, scales, own, at, channels, FORM, REFITS)
    row = tl.load(along + own * channels + at, mask=ok, other=0.0)
    length = tl.sqrt_rn(tl.sum(row * row, axis=1)[:, None])
    size = tl.sqrt_rn(tl.zeros((1, 1), tl.float32) + channels)
    row = row * tl.div_rn(size, tl.maximum(length, 1e-30))
    place = direction - rank + tl.where(direction < rank, count, 0)
    tl.store(next_held + (group * kept + place) * channels + at, rounded_bf16(row), mask=ok & (place + 0 * at < kept))
    said = tl.load(calls + group + tl.zeros((1, 1), tl.int32))
    usable = factor_of(largest, group, tiles, TILES) > 0
    tl.store(
        next_calls + group + tl.zeros((1, 1), tl.int32), tl.where(usable, said + 1, 0), mask=direction + 0 * said == 0
    )
