"""Order "auto": the last value and a share of the last change, chosen by the sender for every frame.

The share is the one that leaves the smallest residual, or a fixed part of that one where the codec asks for less. So it
follows the codec's noise by itself: the errors of the last two reconstructions are part of the change between them, and
the more of it they are, the smaller the share is.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from compactdist import kernels
from compactdist.kernels.spec import MovingTerm
from compactdist.state.history import LastTwo

__all__ = ["GRID", "LARGEST", "AdaptiveVelocity", "samples_of"]

GRID = 16
"""Coefficients are multiples of ``1 / GRID``; finer ones gain nothing that can be measured."""

LARGEST = 1.0
"""Coefficients lie in ``[-LARGEST, LARGEST]``. Negative ones average two reconstructions, which lessens their noise."""

_SAMPLES, _RUN = 1 << 16, 256


def samples_of(numel: int) -> tuple[int, int, int]:
    """How many runs stand for a tensor, how far apart they begin, and how many elements they have."""
    runs = _SAMPLES // _RUN
    gap = numel // runs
    return (-(-numel // _RUN), _RUN, _RUN) if gap <= _RUN else (runs, gap, _RUN)


def _sample(flat: Tensor) -> Tensor:
    """At most 65,791 elements: all of a small tensor, else runs of 256 that lie evenly spaced; a view."""
    runs, gap, _ = samples_of(flat.numel())
    return flat if gap == _RUN else flat[: runs * gap].view(runs, gap)[:, :_RUN]


def _nearest(along: float, energy: float, share: float) -> float:
    """The coefficient that a frame says, by two sums: ``share`` of their ratio; 0 where it is none."""
    if not (energy > 0 and math.isfinite(energy) and math.isfinite(along)):
        return 0.0
    return round(max(-LARGEST, min(along / energy, LARGEST)) * (share * GRID)) / GRID


class AdaptiveVelocity(LastTwo):
    """Predicts the last reconstruction plus ``coefficient * (last - the one before)``.

    Without one before it, and with a coefficient of zero, this is order 1, and costs no more.
    """

    number = 3
    adapts = True
    __slots__ = ()

    def kept_terms(self, coefficient: float | Tensor = 0.0, *, rounded: bool = False) -> tuple[MovingTerm, ...]:
        return self.with_velocity(coefficient if isinstance(coefficient, Tensor) or coefficient else None, rounded)

    def choose(self, x: Tensor, share: float, out: Tensor | None = None, queue: int | None = None) -> Tensor:
        """``share`` of the coefficient of least squares over samples of ``x``: a multiple of 1/16 in [-1, 1].

        0 where nothing changed, and for values that are not finite or too large to be squared.
        """
        numel, dtype, device = x.numel(), x.dtype, x.device
        on_device = kernels.device_velocities_for(numel, dtype, device)
        on_cpu = None if on_device is not None else kernels.cpu_velocities_for(numel, dtype, device)
        rounded = not (on_device is None and on_cpu is None)
        base, previous = self._base.kept(rounded), self._previous.kept(rounded)
        if base is None or previous is None or not numel:
            return super().choose(x, share, out)
        if on_device is not None and dtype == base.dtype:
            chosen = torch.empty((), dtype=torch.float32, device=device) if out is None else out
            rule = on_device.Rule(share, GRID, LARGEST)
            on_device.choose(x.contiguous(), (base, previous), samples_of(numel), rule, chosen, queue)
            return chosen
        if on_cpu is not None and dtype == base.dtype:
            along, energy = on_cpu.weigh(x.contiguous(), base, previous, samples_of(numel))
            chosen = torch.tensor(_nearest(along, energy, share), dtype=torch.float32, device=device)
            return chosen if out is None else out.copy_(chosen)
        base, previous = kernels.restored(base), kernels.restored(previous)
        last = _sample(base).float()
        change = last - _sample(previous).float()
        products = (
            torch.stack([(_sample(x).float() - last) * change, change.square()]).flatten(1).sum(1, dtype=torch.float64)
        )
        along, energy = products
        best = (along / energy).clamp_(-LARGEST, LARGEST)
        chosen = best.mul_(share * GRID).round_().div_(GRID)
        usable = products.isfinite().all() & (energy > 0)
        chosen = torch.where(usable, chosen, 0.0).float() + 0.0  # -0 is 0
        return chosen if out is None else out.copy_(chosen)

    def accepted(self, coefficient: Tensor) -> Tensor:
        if not self._previous.held:
            return torch.zeros_like(coefficient)
        there = (coefficient.abs() <= LARGEST) & (coefficient * GRID == (coefficient * GRID).round())
        return torch.where(there, coefficient, 0.0)

    def accept(self, frame: Tensor, at: int, out: Tensor, queue: int | None = None) -> Tensor:
        on_device = kernels.device_velocities_for(1, torch.float32, frame.device)
        if on_device is None:
            return super().accept(frame, at, out, queue)
        rule = on_device.Rule(1.0, GRID, LARGEST) if self._previous.held else None
        on_device.expect(frame, at, rule, out, queue)
        return out
