"""A basis before and after the sweep that turns it towards a frame, in Triton: to the bit what the codec's ``basis.py``
does. A block's components are taken in the order of ``allotment.order_components``.

Arguments that both kernels share, of blocks of ``n`` components; ``size`` is ``n``, or as many as the sweep takes:

* ``order``, ``counts``: as ``order_components`` writes them; a count of -1 leaves all as it is;
* ``rows``, ``energies``: of the basis, int16 ``(B, n, n)`` and float32 ``(B, n)``;
* ``matrices``, ``turned``: for the sweep, float32 ``(B, size, size)`` and ``(B, size, n)``;
* ``kept``: what energies are where nothing turns them, in that order, float32 ``(B, n)``.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

from compactdist.kernels.gpu.elements import round_half_even

_ONE = tl.constexpr(32767.0)


@triton.jit
def _scaled(amplitudes, sums, order, block, place, count, n):
    """Amplitudes over roots of sums, of places below ``count``; 0 of others."""
    inside = place < count
    component = tl.load(order + block * n + place, mask=inside, other=0)
    amplitude = tl.load(amplitudes + block * n + component, mask=inside, other=0)
    norm = tl.sqrt_rn(tl.load(sums + (block * n + place) * n + place, mask=inside, other=0))
    return tl.div_rn(amplitude, tl.where(norm > 0, norm, 1.0))


@triton.jit
def gather_basis(
    rows,
    energies,
    amplitudes,
    sums,
    order,
    counts,
    matrices,
    turned,
    sizes,
    kept,
    n,
    size,
    share,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """``ROWS`` rows of a block's covariance, and of its components that have bits.

    Args:
        amplitudes: of the frame's components, float32 ``(B, n)``.
        sums: of products of its levels, in that order, float32 ``(B, n, n)``.
        sizes: receives how many rows take part in the sweep, int32 ``(B,)``.
        share: of the frame in the covariance.
    """
    tiles = tl.cdiv(size, ROWS)
    tile, block = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    count = tl.load(counts + block)
    place, other = tile * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    known, inside = place < n, place < count
    component = tl.load(order + block * n + place, mask=known, other=0)
    amplitude = tl.load(amplitudes + block * n + component, mask=known, other=0)
    before = tl.load(energies + block * n + component, mask=known, other=0)
    energy = tl.where(count < 0, before, before * (1.0 - share) + (amplitude * amplitude) * share)
    tl.store(kept + block * n + place, energy, mask=known)

    mine = _scaled(amplitudes, sums, order, block, place, count, n)
    others = _scaled(amplitudes, sums, order, block, other, count, n)
    both = inside[:, None] & (other < count)[None, :]
    between = tl.load(sums + (block * n + place)[:, None] * n + other[None, :], mask=both, other=0)
    between = ((between * mine[:, None]) * others[None, :]) * share
    between = tl.where(place[:, None] == other[None, :], tl.where(inside, energy, 0.0)[:, None], between)
    ok = (place < size)[:, None] & (other < size)[None, :]
    tl.store(matrices + (block * size + place)[:, None] * size + other[None, :], between, mask=ok)

    of_component = (block * n + component)[:, None] * n + other[None, :]
    held = tl.load(rows + of_component, mask=inside[:, None] & (other < n)[None, :], other=0).to(tl.float32)
    ok = (place < size)[:, None] & (other < n)[None, :]
    tl.store(turned + (block * size + place)[:, None] * n + other[None, :], held, mask=ok)
    if tile == 0:
        tl.store(sizes + block, tl.maximum(count + (count & 1), 4))


@triton.jit
def scatter_basis(
    rows,
    matrices,
    turned,
    kept,
    order,
    counts,
    new_rows,
    new_energies,
    n,
    size,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """``ROWS`` rows of the new basis, which are others' memory: those that had bits as the sweep left them."""
    tiles = tl.cdiv(n, ROWS)
    tile, block = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    place, channel = tile * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    known, inside = place < n, place < tl.load(counts + block)
    component = tl.load(order + block * n + place, mask=known, other=0)
    swept = tl.load(matrices + (block * size + place) * size + place, mask=inside, other=0)
    energy = tl.where(inside, swept, tl.load(kept + block * n + place, mask=known, other=0))
    tl.store(new_energies + block * n + component, energy, mask=known)

    to = (block * n + component)[:, None] * n + channel[None, :]
    ok = known[:, None] & (channel < n)[None, :]
    value = tl.load(turned + (block * size + place)[:, None] * n + channel[None, :], mask=ok & inside[:, None], other=0)
    value = tl.minimum(tl.maximum(round_half_even(value), -_ONE), _ONE).to(tl.int16)
    held = tl.load(rows + to, mask=ok & (inside == 0)[:, None], other=0)
    tl.store(new_rows + to, tl.where(inside[:, None], value, held), mask=ok)
