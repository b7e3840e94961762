"""Cyclic Jacobi sweeps over many small symmetric matrices at once.

Method: C. Jacobi's rotations in the parallel ("tournament") order of R. Brent and F. Luk, "The solution of
singular-value and symmetric eigenvalue problems on multiprocessor arrays", SIAM J. Sci. Stat. Comput. 6 (1985). A round
rotates n / 2 disjoint pairs, places ``i`` and ``i + n / 2``; then all places but the first move on by one, so that
n - 1 rounds bring every pair together once and leave every place as it was.

Nothing but additions, multiplications, divisions and square roots of single elements is used, each rounded by itself:
the result is the same on every machine.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["next_places", "root", "sweep"]


def root(x: Tensor) -> Tensor:
    """The square root of float32, rounded correctly. ``torch.sqrt`` of float32 may be off in its last bit on a CPU."""
    return torch.sqrt(x.double()).float()


def next_places(n: int) -> list[int]:
    """Which place each place takes over from after a round, for an even ``n``."""
    half = n // 2
    if half == 1:
        return [0, 1]
    return [0, half, *range(1, half - 1), *range(half + 1, n), half - 1]


def sweep(matrices: Tensor, basis: Tensor, sizes: Sequence[int], smallest: float) -> tuple[Tensor, Tensor]:
    """Rotate symmetric ``matrices`` towards diagonal ones, each pair of rows and columns once.

    Args:
        matrices: float32 ``(M, n, n)``, finite.
        basis: float32 ``(M, n, k)``, its rows rotated along: row j belongs to row and column j.
        sizes: how many rows and columns of each matrix take part, the first ones, an even number; others stay.
        smallest: a pair stays as it is while the square of its element is at most this part of the product of its
            diagonal ones.

    Returns:
        Matrices and basis, new tensors.
    """
    matrices, basis = matrices.clone(), basis.clone()
    for size in set(sizes):
        which = torch.tensor([size == one for one in sizes], device=matrices.device).nonzero().view(-1)
        some, rows = _swept(matrices[which, :size, :size], basis[which, :size], smallest)
        matrices[which, :size, :size], basis[which, :size] = some, rows
    return matrices, basis


def _swept(matrices: Tensor, basis: Tensor, smallest: float) -> tuple[Tensor, Tensor]:
    n = matrices.shape[1]
    half, places = n // 2, torch.tensor(next_places(n), dtype=torch.int64, device=matrices.device)
    for _ in range(n - 1):
        diagonal = matrices.diagonal(0, 1, 2)
        first, second, between = diagonal[:, :half], diagonal[:, half:], matrices.diagonal(half, 1, 2)
        cosine, sine = _angles(first, second, between, smallest)
        rows = _turned(matrices[:, :half], matrices[:, half:], cosine[:, :, None], sine[:, :, None], 1)
        matrices = _turned(rows[:, :, :half], rows[:, :, half:], cosine[:, None], sine[:, None], 2)
        matrices = matrices.index_select(1, places).index_select(2, places)
        basis = _turned(basis[:, :half], basis[:, half:], cosine[:, :, None], sine[:, :, None], 1)
        basis = basis.index_select(1, places)
    return matrices, basis


def _angles(first: Tensor, second: Tensor, between: Tensor, smallest: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotation that makes ``between`` zero; 1 and 0 where it is small."""
    small = between * between <= smallest * (first * second).abs()
    ratio = (second - first) / torch.where(small, torch.ones_like(between), between + between)
    tangent = 1.0 / (ratio.abs() + root(1.0 + ratio * ratio))
    tangent = torch.where(ratio < 0, -tangent, tangent)
    tangent = torch.where(small, torch.zeros_like(tangent), tangent)
    cosine = 1.0 / root(1.0 + tangent * tangent)
    return cosine, tangent * cosine


def _turned(a: Tensor, b: Tensor, cosine: Tensor, sine: Tensor, dim: int) -> Tensor:
    return torch.cat([cosine * a - sine * b, sine * a + cosine * b], dim)
