"""Order "auto": the last value and a share of the last change, chosen by the sender for every frame.

The share is the one that leaves the smallest residual, or a fixed part of that one where the codec asks for less. So it
follows the codec's noise by itself: the errors of the last two reconstructions are part of the change between them, and
the more of it they are, the smaller the share is.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from compactdist.codecs.base import Terms
from compactdist.state.history import Cell, ExactCell, Predictor

__all__ = ["GRID", "LARGEST", "AdaptiveVelocity"]

GRID = 16
"""Coefficients are multiples of ``1 / GRID``; finer ones gain nothing that can be measured."""

LARGEST = 1.0
"""Coefficients lie in ``[-LARGEST, LARGEST]``. Negative ones average two reconstructions, which lessens their noise."""

_SAMPLES, _RUN = 1 << 16, 256
_CPU_PART = 1 << 17


def _sample(flat: Tensor) -> Tensor:
    """At most 65,536 elements: all of a small tensor, else runs of 256 that lie evenly spaced; a view."""
    runs = _SAMPLES // _RUN
    gap = flat.numel() // runs
    return flat if gap <= _RUN else flat[: runs * gap].view(runs, gap)[:, :_RUN]


def _share(base: Tensor, previous: Tensor, coefficient: float | Tensor) -> Tensor:
    """``coefficient * (base - previous)`` in float32, rounded once to their dtype and kept finite; new memory.

    -0 everywhere for a coefficient of zero on the device: nothing but that leaves -0 as it is when it is added.
    """
    out, limit = torch.empty_like(base), torch.finfo(base.dtype).max
    step = _CPU_PART if base.is_cpu else max(1, base.numel())  # what the caches hold between the steps
    for start in range(0, base.numel(), step):
        part = slice(start, start + step)
        change = base[part].float() - previous[part].float()  # two roundings on every device: nothing is contracted
        out[part] = change.mul_(coefficient).clamp_(-limit, limit)
    return torch.where(coefficient == 0, -0.0, out) if isinstance(coefficient, Tensor) else out


class AdaptiveVelocity(Predictor):
    """Predicts the last reconstruction plus ``coefficient * (last - the one before)``.

    Without one before it, and with a coefficient of zero, this is order 1, and costs no more.
    """

    number = 3
    copies = 2
    adapts = True
    __slots__ = ("_base", "_previous")

    def __init__(self, damping: float, new_cell: Callable[[], Cell]) -> None:
        self._base, self._previous = new_cell(), new_cell()

    def terms(self, coefficient: float | Tensor = 0.0) -> Terms:
        base = self._base.read()
        if base is None:
            return ()
        previous = self._previous.read() if isinstance(coefficient, Tensor) or coefficient else None
        return (base,) if previous is None else (base, _share(base, previous, coefficient))

    def choose(self, x: Tensor, share: float) -> Tensor:
        """``share`` of the coefficient of least squares over samples of ``x``: a multiple of 1/16 in [-1, 1].

        0 where nothing changed, and for values that are not finite or too large to be squared.
        """
        base, previous = self._base.read(), self._previous.read()
        if base is None or previous is None or not x.numel():
            return torch.zeros((), dtype=torch.float32, device=x.device)
        last = _sample(base).float()
        change = last - _sample(previous).float()
        products = (
            torch.stack([(_sample(x).float() - last) * change, change.square()]).flatten(1).sum(1, dtype=torch.float64)
        )
        along, energy = products
        best = (along / energy).clamp_(-LARGEST, LARGEST)
        chosen = best.mul_(share * GRID).round_().div_(GRID)
        usable = products.isfinite().all() & (energy > 0)
        return torch.where(usable, chosen, 0.0).float() + 0.0  # -0 is 0

    def accepted(self, coefficient: Tensor) -> Tensor:
        if not self._previous.held:
            return torch.zeros_like(coefficient)
        there = (coefficient.abs() <= LARGEST) & (coefficient * GRID == (coefficient * GRID).round())
        return torch.where(there, coefficient, 0.0)

    def advance(self, value: Tensor, terms: Terms) -> Tensor | None:
        base = terms[0] if terms else self._base.read()
        if base is None:
            self._previous.put(value.clone(), None)  # no change yet
            return self._base.put(value, None)
        if isinstance(self._base, ExactCell) and self._base.stays:
            self._previous.put(base, None)
        else:
            self._base, self._previous = self._previous, self._base
        return self._base.put(value, base)

    def following(self, value: Tensor, terms: Terms) -> tuple[Tensor, ...]:
        return value, terms[0].clone()  # which is written to first

    def stay(self) -> None:
        self._base.stay()
        self._previous.stay()

    def clear(self) -> None:
        self._base.clear()
        self._previous.clear()

    def move(self, to: Callable[[Tensor], Tensor]) -> None:
        self._base.move(to)
        self._previous.move(to)

    @property
    def held(self) -> tuple[Tensor, ...]:
        return self._base.held + self._previous.held
