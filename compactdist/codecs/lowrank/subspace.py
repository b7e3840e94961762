"""Directions that carry most of a matrix: subspace iteration with spare directions, and a stream's memory of them.

Method: N. Halko, P. G. Martinsson, J. A. Tropp, "Finding structure with randomness", SIAM Review 53 (2011), algorithm
4.4, with spare directions. CompactFusion (arXiv 2507.17511) uses it without any, in float32, from random directions at
every step: six products with the matrix where a stream here needs two.

In a loop with error feedback the residuals of one stream do resemble one another, but hardly in the directions that
were sent: those have just been emptied. The next residual is sure to hold the directions that were found and *not*
sent. A stream remembers these and the strongest of those sent, and adds a few random ones at each call. New directions
enter through the random ones: they are found at one step, and strong enough to be sent at the next.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compactdist.codecs.lowrank.products import MIN_ELEMENTS_FOR_BF16, Products

_SEED = 0x5EED


def strongest(rows: Tensor, noise: float) -> Tensor:
    """An orthonormal basis ``(p, L)`` of what float32 rows ``(p, L)`` span, strongest first.

    By the eigenvectors of the small Gram matrix, which costs a tenth of a QR and keeps exact zeros. Directions so weak
    that they are made of rounding errors come out as zeros: scaled up, they would be copies of the strong ones.

    Args:
        rows: float32 ``(p, L)``.
        noise: Energy that rounding may account for, relative to that of the strongest direction.
    """
    values, vectors = torch.linalg.eigh(rows @ rows.T)
    real = values > values[-1:].clamp(min=1e-30) * noise
    inverse = torch.where(real, values.clamp(min=1e-37).rsqrt(), torch.zeros_like(values))
    basis: Tensor = (vectors * inverse).flip(1).T @ rows
    return basis


def evened(rows: Tensor) -> Tensor:
    """Rows ``(p, C)`` scaled to mean square 1, as random ones have, so that rounding and sorting favour none."""
    lengths = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    even: Tensor = rows * (rows.shape[1] ** 0.5 / lengths.clamp(min=1e-30))
    return even


def left_directions(products: Products, start: Tensor, rounds: int) -> Tensor:
    """An orthonormal basis ``(p, R)`` of the left directions that ``start (p, C)`` leads to, strongest first."""
    for _ in range(rounds):
        # Nearly orthogonal already, for the left ones are sorted.
        start = evened(products.with_columns(strongest(products.with_rows(start), products.noise)))
    return strongest(products.with_rows(start), products.noise)


class Starts:
    """Where the search begins: for one call alone, or for the next one of a stream.

    Args:
        memory: What the stream remembers (``LowRankSession``), or ``None`` for a call that stands alone.
        shape: ``(groups, rows, channels)``.
        rank: Wanted directions.
        device: Of the tensor.
        at_least: Least number of directions to find, wanted or not, if the matrix has as many.

    Attributes:
        rounds: Rounds of iteration that this start needs.
        wide: Whether the stream remembers the directions found beside the wanted ones.
    """

    def __init__(
        self,
        memory: dict[str, Any] | None,
        shape: tuple[int, int, int],
        rank: int,
        device: torch.device,
        at_least: int = 0,
    ) -> None:
        groups, rows, channels = shape
        self.wide = memory is not None
        self._memory = memory
        self._rank = rank
        most = max(2 * rank, rank + 4) if self.wide else rank + max(4, rank // 4)
        self._count = min(max(most, at_least), rows, channels)
        self._kept = max(1, self._count - max(2, rank // 2))
        self._calls = int(memory["calls"]) if memory else 0
        held = memory["directions"] if memory else None
        fits = held is not None and held.shape == (groups, self._kept, channels) and held.device == device
        self._held: Tensor | None = held if fits else None
        self._shares: list[float] = memory["shares"] if memory and fits else [0.0] * groups
        # Small matrices cost calls, not products: they take all rounds even from remembered directions.
        small = rows * channels < MIN_ELEMENTS_FOR_BF16
        self.rounds = 0 if fits and not small else 2
        # New directions at each call: error feedback piles up what one set of them misses, and the next set finds it.
        generator = torch.Generator().manual_seed(_SEED + self._calls)
        count = self._count - (self._kept if fits else 0)
        words = torch.empty(-(-count * channels // 8), dtype=torch.int64, device="cpu").random_(
            -(2**63), None, generator=generator
        )
        bytes_ = words.view(torch.int8)[: count * channels].view(count, channels)
        self._random = bytes_.to(device).float().add_(0.5) * (1 / 74)  # unit variance
        self._next: list[Tensor] = []
        self._next_shares: list[float] = []

    def of_group(self, group: int) -> Tensor:
        """Directions ``(p, channels)`` to begin with."""
        return self._random if self._held is None else torch.cat([self._held[group], self._random.bfloat16()])

    def disappoint(self, group: int, along: Tensor, norm: Tensor) -> bool:
        """Whether the directions found carry less than half the share of energy that those of the last call did.

        If they do not, they are kept for :meth:`remember`.

        Args:
            group: Index of the group.
            along: ``(p, channels)``, the matrix along the directions found, the wanted ones first.
            norm: Norm of the matrix, ``()``.
        """
        if not self.wide:
            return False
        share = float((torch.linalg.vector_norm(along[: self._rank]) / norm.clamp(min=1e-30)).square())
        if self._held is not None and share < 0.5 * self._shares[group] and len(self._next_shares) == group:
            self._next_shares.append(0.0)
            return True
        self._next_shares[group:] = [share]
        others = along[self._rank :][: self._kept]
        self._next.append(evened(torch.cat([others, along[: self._kept - len(others)]])))
        return False

    def remember(self) -> None:
        """Store the directions found, in bfloat16, for the stream's next call. Entries are replaced, not written to."""
        if self._memory is not None:
            self._memory.update(
                calls=self._calls + 1, directions=torch.stack(self._next).bfloat16(), shares=self._next_shares
            )
