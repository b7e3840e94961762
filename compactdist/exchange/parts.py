"""Large tensors in parts: where a tensor is cut, and the inner works of its parts.

Each part is a stream of its own and travels in an inner call of its own. All frames of a call are made before the first
is posted; then they are posted one after the other, and each part is decoded while those after it are still on their
way. Where a tensor is cut follows from its shape, from the layout hint and from ``Options.parts``, never from values.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compactdist import _torch
from compactdist.config import Parts
from compactdist.kernels.spec import MatrixView

__all__ = ["MOST_PARTS", "PART_NBYTES", "Cut", "InTurn", "cut", "number_of_parts", "slices"]

PART_NBYTES = 8 << 20
"""With ``parts="auto"`` a tensor travels in one part for every such number of bytes, in ``MOST_PARTS`` at most."""

MOST_PARTS = 4
_UNIT = 64  # elements: parts begin at multiples of it, as kernels work on so many at a time
_LEAST_WAIT = timedelta(milliseconds=1)  # a timeout of 0 means none


class Cut(NamedTuple):
    """One part of a tensor: the elements that follow those of the part before.

    Attributes:
        numel: elements.
        hint: matrix view of the layout hint, as far as it concerns the part; ``None`` without a hint.
    """

    numel: int
    hint: MatrixView | None


def number_of_parts(parts: Parts, numel: int, dtype: torch.dtype, least: int) -> int:
    """In how many parts a tensor should travel.

    Args:
        parts: as in ``Options``.
        numel: elements of the tensor.
        dtype: of the tensor.
        least: elements that each part must have.
    """
    wanted = min(numel * dtype.itemsize // PART_NBYTES, MOST_PARTS) if parts == "auto" else parts
    return max(1, min(wanted, numel // max(least, _UNIT)))


def cut(shape: Sequence[int], parts: int, hint: MatrixView | None) -> list[Cut]:
    """Cut a tensor along the first of its dimensions, as evenly as possible.

    Dimensions are those of the hint's buffer, if there is one, else those of the tensor. A dimension that is shorter
    than the number of parts is cut into single entries, and each of them along the next dimension, where that comes out
    even; else there are fewer parts than asked for. Parts begin at multiples of 64 elements.

    Args:
        shape: of the tensor; equal on all ranks, as agreements make sure.
        parts: parts asked for.
        hint: matrix view of the layout hint.
    """
    axes = tuple(shape)
    if hint is not None:
        axes = hint.axes or hint.shape
    boxes = _boxes(axes, parts)
    return [Cut(math.prod(box), None if hint is None else _of_box(hint, axes, box)) for box in boxes]


def _boxes(axes: tuple[int, ...], parts: int) -> list[tuple[int, ...]]:
    """The shapes of the parts, one behind the other in memory."""
    first = next((at for at, size in enumerate(axes) if size > 1), None)
    if first is None or parts < 2:
        return [axes]
    size, inner = axes[first], math.prod(axes[first + 1 :])
    if size < parts and parts % size == 0 and inner % _UNIT == 0:
        each = _boxes(axes[first + 1 :], parts // size)
        return [(*axes[:first], 1, *box) for _ in range(size) for box in each]
    step = _UNIT // math.gcd(inner, _UNIT)  # entries between places where a part may begin
    steps = -(-size // step)
    parts = min(parts, steps)
    ends = [min(size, step * (steps * (number + 1) // parts)) for number in range(parts)]
    return [(*axes[:first], end - start, *axes[first + 1 :]) for start, end in zip([0, *ends], ends, strict=False)]


def _of_box(hint: MatrixView, axes: tuple[int, ...], box: tuple[int, ...]) -> MatrixView:
    """The matrix view of a part: that of the whole, with the axes that were cut as long as they are in the part."""
    order = hint.order or tuple(range(len(axes)))
    bounds = hint.groups, hint.groups * hint.rows
    terms, before = list(hint.shape), 1
    for axis in order:
        before *= axes[axis]
        if axes[axis] != box[axis]:  # it is longer than 1, so it lies in the term that it completes or comes before
            term = 0 if before <= bounds[0] else 1 if before <= bounds[1] else 2
            terms[term] = terms[term] // axes[axis] * box[axis]
    groups, rows, channels = terms
    return MatrixView(math.prod(box), groups, rows, channels, None if hint.axes is None else box, hint.order, hint.hint)


def slices(x: Tensor, numels: Sequence[int]) -> Sequence[Tensor]:
    """The parts of a contiguous tensor, each flat."""
    found: tuple[Tensor, ...] = torch.split(x.detach().view(-1), list(numels))
    return found


class InTurn(_torch.Work):
    """The inner works of a tensor's parts. Waiting for it waits for the first part; the engine waits for the others.

    Args:
        works: in the order of the parts, which is that of the calls.
    """

    def __init__(self, works: Sequence[Any]) -> None:
        super().__init__()
        self._works: list[Any] = list(works)
        self._until: float | None = None

    def wait(self, timeout: timedelta = _torch.NO_TIMEOUT) -> bool:
        """Wait for the first part; ``timeout`` is for all parts together."""
        self._until = time.monotonic() + timeout.total_seconds() if timeout else None
        return self.arrived(0)

    def arrived(self, number: int) -> bool:
        """Wait for a part, once.

        Raises:
            Whatever the inner group's work raises.
        """
        work, self._works[number] = self._works[number], None
        if work is None:
            return True
        if self._until is None:
            return bool(work.wait())
        return bool(work.wait(max(timedelta(seconds=self._until - time.monotonic()), _LEAST_WAIT)))

    def is_completed(self) -> bool:
        """Whether waiting for all parts would not block."""
        return all(work is None or bool(work.is_completed()) for work in self._works)
