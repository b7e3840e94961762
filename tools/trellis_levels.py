"""Train the levels of ``compactdist/codecs/transform/trellis.py`` and print them with what they lose.

    python -m tools.trellis_levels

Levels of 1 to 4 bits begin as Lloyd-Max levels of one bit more. In each round samples of a unit Gaussian take their
course through the trellis, and each level becomes the mean of its samples and, by symmetry, of those of the mirrored
level. Of more bits the levels are as they are.
"""

from __future__ import annotations

import torch

from compactdist.codecs.scalar.gaussian_levels import MAGNITUDES
from compactdist.codecs.transform.trellis import TRELLIS
from compactdist.kernels.reference.components import course

ROUNDS = 25
COURSES, TURNS = 200, 500


def chosen(samples: torch.Tensor, ascending: torch.Tensor) -> torch.Tensor:
    """The number of each sample's level."""
    subsets = torch.stack([ascending[first::4] for first in range(4)])
    moves, numbers, _ = course(samples, subsets, 1)
    before = [moves.roll(turns, 1).long() for turns in range(3)]
    return 4 * numbers.long() + 2 * (before[0] ^ before[2]) + before[1]


def trained(samples: torch.Tensor, bits: int) -> torch.Tensor:
    """The levels of so many bits, ascending, float32 ``(2**(bits + 1),)``."""
    positive = torch.tensor(MAGNITUDES[bits + 1])
    ascending = torch.cat([-positive.flip(0), positive])
    for _ in range(ROUNDS):
        which = chosen(samples, ascending).flatten()
        sums = torch.zeros_like(ascending).index_add_(0, which, samples.flatten())
        counts = torch.zeros_like(ascending).index_add_(0, which, torch.ones_like(samples).flatten())
        means = torch.where(counts > 0, sums / counts.clamp(min=1), ascending)
        ascending = ((means - means.flip(0)) / 2).sort().values
    return ascending


def loss_of(samples: torch.Tensor, ascending: torch.Tensor) -> float:
    """The mean square error that samples are left with."""
    return float((samples - ascending[chosen(samples, ascending)]).square().mean())


def main() -> None:
    """Print a line for each depth."""
    samples = torch.randn(COURSES, TURNS, generator=torch.Generator().manual_seed(0))
    for bits in range(1, TRELLIS.deepest + 1):
        if bits <= 4:
            ascending = trained(samples, bits)
            shown = ", ".join(f"{one:.6f}" for one in ascending[len(ascending) // 2 :].tolist())
        else:
            ascending = torch.tensor(TRELLIS.whole(bits)) * TRELLIS.outermost(bits) / 127
            shown = "as they are"
        print(f"{bits} bits: loses {loss_of(samples, ascending):.5f}; levels {shown}")


if __name__ == "__main__":
    main()
