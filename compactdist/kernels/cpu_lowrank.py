"""What the low-rank codecs do for every element, compiled by Numba: take in a residual, fit levels to a factor, and put
out the product of two thin matrices. The latter two give the bits of the torch reference.

Numba contracts nothing to a fused multiply-add unless asked to, and is not asked here. ``places.py`` says what a
*place* is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from compactdist.kernels.cpu_common import DTYPES, bits_of, expectation
from compactdist.kernels.cpu_elements import Array, fold, jit, next_part
from compactdist.kernels.cpu_memory import data_of, load_first, pointers_of, rounded_for, store_first
from compactdist.kernels.cpu_steps import expected_at, put, residual_at
from compactdist.kernels.cpu_vectors import folded, magnitude, where, zeros
from compactdist.kernels.places import WIDTH, Place, place_of
from compactdist.kernels.reference import LANES
from compactdist.kernels.threads import spread

if TYPE_CHECKING:
    from compactdist.kernels.spec import MatrixView

__all__ = ["add_product", "fit_levels", "multiply", "supports", "take_in"]

_u32, _f32, _at = np.uint32, np.float32, np.uintp
_LARGEST = np.float32(3.4028234663852886e38)


def supports(*tensors: Tensor | None) -> bool:
    """Whether ``take_in`` and ``add_product`` apply: CPU tensors of one known dtype."""
    given = [tensor for tensor in tensors if tensor is not None]
    return all(tensor.device.type == "cpu" and tensor.dtype == given[0].dtype in DTYPES for tensor in given)


def take_in(x: Tensor, terms: tuple[Tensor, ...], view: MatrixView, out: Tensor) -> Tensor:
    """Write ``x`` less the sum of ``terms`` as matrices to ``out``, bfloat16 ``(G, R, C)``, rounded once.

    Returns:
        Frobenius norms before rounding, float32 ``(G,)``.
    """
    groups, rows, _ = view.shape
    squares, place = np.empty(groups * rows, np.float32), tuple(place_of(view))
    source = (bits_of(x, x.dtype), *expectation(terms, x.dtype))
    target = bits_of(out.view(-1), torch.bfloat16)
    spread(lambda parts: _take_in(source, place, parts, squares, target), groups * rows, view.numel)
    norms = np.sqrt(squares.reshape(groups, rows).sum(1, dtype=np.float64))
    return torch.from_numpy(norms.astype(np.float32))


def multiply(u: Tensor, v: Tensor, smallest: float, gain: Tensor) -> Tensor:
    """``(G, r, R)`` and ``(G, r, C)`` to ``(G, R, C)``: sums over r, below ``smallest`` zero, times a gain by group."""
    groups, _, rows = u.shape
    channels = v.shape[2]
    at = np.arange(0, channels, WIDTH, dtype=np.int64)
    place = Place(
        np.arange(groups * rows, dtype=np.int64) * channels,
        at,
        at,
        np.diff(np.append(at, channels)),
        rows,
        channels,
        groups * rows * channels,
    )
    out = torch.empty(groups, rows, channels)
    _apply_all(u, v, smallest, gain, None, place, out.view(-1))
    return out


def add_product(
    u: Tensor,
    v: Tensor,
    smallest: float,
    gain: Tensor,
    terms: tuple[Tensor, ...],
    view: MatrixView,
    out: Tensor,
) -> None:
    """Write the sum of ``terms`` plus what ``multiply`` gives to ``out``, kept finite and rounded once.

    ``out`` may be the first of the terms.
    """
    _apply_all(u, v, smallest, gain, expectation(terms, out.dtype), place_of(view), out)


def _apply_all(u: Tensor, v: Tensor, smallest: float, gain: Tensor, expected: Any, place: Place, out: Tensor) -> None:
    rank, rows, at = u.shape[1], u.shape[2], tuple(place)
    gains, least = gain.reshape(-1).numpy(), np.float32(smallest)
    nothing, target = np.empty(0, np.float32), bits_of(out, out.dtype)
    before = (nothing, nothing, -1) if expected is None else expected
    for group in range(u.shape[0]):
        factors = u[group].contiguous().numpy(), v[group].contiguous().numpy()

        def work(parts: Any, group: int = group, factors: Any = factors) -> None:
            _apply(*factors, least, gains[group], *before, at, group * rows, parts, target)

        spread(work, rows, rows * v.shape[2] * rank)


def fit_levels(
    factor: Tensor, smallest: float, borders: Sequence[float], magnitudes: Sequence[float], sigma: float, refits: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As ``factors._fit``, with elements below ``smallest`` as zeros."""
    count, length = factor.shape
    codes, level = torch.empty(count, length, dtype=torch.uint8), torch.empty(count, length)
    scale, near = torch.empty(count, 1), torch.empty(count, 1)
    limits, levels = tuple(map(np.float32, borders)), tuple(map(np.float32, magnitudes))
    if not limits:  # Numba cannot index an empty tuple: a border that nothing exceeds
        limits, levels = (np.float32(np.inf),), levels * 2
    tables = np.float32(smallest), limits, levels, np.float32(sigma), np.uint32(len(magnitudes))
    source = factor.contiguous().numpy()
    out = codes.numpy(), level.numpy(), scale.view(-1).numpy(), near.view(-1).numpy()
    spread(lambda parts: _fit(source, *tables, refits, parts, *out), count, factor.numel() * refits)
    return codes, level, scale, near


@jit
def _take_in(source: Any, place: Any, parts: Array, squares: Array, out: Array) -> None:
    """Parts of the rows of all groups: the residual, rounded, and the sum of its squares."""
    row_at, chunk_at, chunk_from, chunk_len, _, channels, numel = place
    given, outs = pointers_of(source, False), data_of(out)
    lo, hi = next_part(parts)
    while lo < hi:
        for row in range(lo, hi):
            lanes = zeros()
            for k in range(chunk_at.size):
                n, o, at = chunk_len[k], row * channels + chunk_at[k], row_at[row] + chunk_from[k]
                for j in range(0, n, LANES):
                    value = residual_at(given, at + j, min(n, numel - at) - j)
                    lanes = lanes + value * value
                    store_first(rounded_for(outs, value), outs, o + j, n - j)
            squares[row] = folded(lanes)
        lo, hi = next_part(parts)


@jit
def _apply(
    u: Array,
    v: Array,
    smallest: Any,
    gain: Any,
    base: Array,
    velocity: Array,
    terms: int,
    place: Any,
    first: int,
    parts: Array,
    out: Array,
) -> None:
    """Parts of the rows of the group that begins with row ``first``: ``out = base + velocity + gain * (u.T @ v)``.

    Of ``base`` and ``velocity``, the first ``terms`` are there; with -1 the product alone is written, float32.
    Components in ascending order, four at a time so that a partial sum is loaded and stored once for all four.
    """
    row_at, chunk_at, chunk_from, chunk_len, _, _, numel = place
    rank = v.shape[0]
    sums, given, outs = (
        np.empty(WIDTH, np.float32),
        (data_of(base), data_of(base), data_of(velocity), terms),
        data_of(out),
    )
    summed = data_of(sums)
    lo, hi = next_part(parts)
    while lo < hi:
        for chunk in range(chunk_at.size):
            left, width = _at(chunk_at[chunk]), chunk_len[chunk]
            for row in range(lo, hi):
                a = u[0, row]
                for j in range(width):
                    sums[_at(j)] = a * v[_at(0), left + _at(j)]
                k = 1
                while k + 4 <= rank:
                    a, b, c, d = u[k, row], u[k + 1, row], u[k + 2, row], u[k + 3, row]
                    for j in range(width):
                        at = left + _at(j)
                        s = sums[_at(j)] + a * v[_at(k), at]
                        s = s + b * v[_at(k) + _at(1), at]
                        s = s + c * v[_at(k) + _at(2), at]
                        sums[_at(j)] = s + d * v[_at(k) + _at(3), at]
                    k += 4
                while k < rank:
                    a = u[k, row]
                    for j in range(width):
                        sums[_at(j)] += a * v[_at(k), left + _at(j)]
                    k += 1
                start = row_at[first + row] + chunk_from[chunk]
                for j in range(0, width, LANES):
                    s, have = load_first(summed, j, width - j), min(width, numel - start) - j
                    s = where(magnitude(s) >= smallest, s, zeros()) * gain
                    s = where(s > _LARGEST, _LARGEST, s)
                    s = where(s < -_LARGEST, -_LARGEST, s)
                    if terms < 0:
                        store_first(rounded_for(outs, s), outs, start + j, have)
                    else:
                        put(expected_at(given, start + j, have), s, (outs, False), start + j, have)
        lo, hi = next_part(parts)


@jit
def _fit(
    factor: Array,
    smallest: Any,
    borders: Any,
    magnitudes: Any,
    sigma: Any,
    negative: Any,
    refits: int,
    parts: Array,
    codes: Array,
    levels: Array,
    scale: Array,
    near: Array,
) -> None:
    """Parts of the rows: nearest magnitudes and their least-squares scale, in turn, as ``factors._fit`` says.

    Borders and magnitudes are tuples, so that the search among them is unrolled.
    """
    length = factor.shape[1]
    size, products = np.empty(length, np.float32), np.empty(length, np.float32)
    squares, bits = np.empty(length, np.float32), size.view(np.uint32)
    lo, hi = next_part(parts)
    while lo < hi:
        for row in range(lo, hi):
            for j in range(length):
                s = abs(factor[_at(row), _at(j)])
                size[_at(j)] = s if s >= smallest else _f32(0)
            largest = _u32(0)
            for j in range(length):
                largest = max(largest, bits[_at(j)])
            exponent = min(max(254 - np.int64(largest >> _u32(23)), 1), 254)
            power = _u32(exponent << 23).view(_f32)
            near[row] = power
            for j in range(length):
                s = size[_at(j)] * power
                size[_at(j)] = s
                squares[_at(j)] = s * s
                products[_at(j)] = s
            fold(squares, length, 1)
            fold(products, length, 1)
            below = _f32(products[0] * sigma)
            c = squares[0] / below if below > _f32(0) else _f32(0)
            inverse = _f32(0)
            for _ in range(refits):
                inverse = _f32(1) / c if c > _f32(0) else _f32(0)
                for j in range(length):
                    s = size[_at(j)]
                    t = s * inverse
                    level = magnitudes[0]
                    for b in range(len(borders)):
                        level = magnitudes[b + 1] if t > borders[b] else level
                    products[_at(j)] = s * level
                    squares[_at(j)] = level * level
                fold(squares, length, 1)
                fold(products, length, 1)
                c = products[0] / squares[0] if squares[0] > _f32(0) else _f32(0)
            for j in range(length):
                t = size[_at(j)] * inverse
                below_zero = factor[_at(row), _at(j)] < _f32(0)
                found = negative if below_zero else _u32(0)
                level = magnitudes[0]
                for b in range(len(borders)):
                    found = _u32(found + _u32(1)) if t > borders[b] else found
                    level = magnitudes[b + 1] if t > borders[b] else level
                codes[_at(row), _at(j)] = np.uint8(found)
                levels[_at(row), _at(j)] = -level if below_zero else level
            scale[row] = c
        lo, hi = next_part(parts)
