"""Whether a residual is far larger than its tensor, judged by samples of both, whose sums have a stated order.

Sixteen runs of a tensor stand for it, at even distances. A run is 256 elements, zeros where the tensor ends before. The
magnitudes of the runs are added up element by element, from the first run to the last, and the sums are folded.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from compactdist.kernels.reference.rows import fold_sum
from compactdist.kernels.reference.terms import restored
from compactdist.kernels.spec import MovingTerm

__all__ = ["NEAR", "RUN", "RUNS", "is_far_larger"]

RUNS, RUN = 16, 256

NEAR = 0.25
"""A residual of which so much outweighs its tensor is not worth coding."""


def is_far_larger(x: Tensor, terms: tuple[MovingTerm, ...]) -> bool:
    """Whether ``x`` less the sum of ``terms`` is more than four times as large as ``x``.

    Args:
        x: flat, float32, float16 or bfloat16.
        terms: one or two, flat, as large.
    """
    samples = [_samples(restored(one).detach()) for one in (x, *terms)]
    residual = samples[0] - (samples[1] if len(terms) == 1 else samples[1] + samples[2])
    magnitudes = torch.stack([residual.abs(), samples[0].abs()])
    sums = magnitudes[:, 0].clone()
    for run in range(1, RUNS):
        sums += magnitudes[:, run]
    larger, whole = fold_sum(sums, 1).view(2)
    return bool(larger * NEAR > whole)


def _samples(flat: Tensor) -> Tensor:
    """The runs as float32 ``(RUNS, RUN)``."""
    numel = flat.numel()
    if numel < RUNS * RUN:
        return pad(flat.float(), (0, RUNS * RUN - numel)).view(RUNS, RUN)
    run = numel // RUNS
    return flat[: RUNS * run].view(RUNS, run)[:, :RUN].float()
