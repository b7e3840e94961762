"""The terms of a prediction as kernels are given them: what ``elements.expected`` reads."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from compactdist.kernels.gpu.elements import DTYPES, MOVING, MOVING_ROUNDED, ROUNDED, TWO_ROUNDED
from compactdist.kernels.reference.terms import restored
from compactdist.kernels.spec import MovingTerm, Rounded, Velocity

__all__ = ["TERMS", "number_of", "source_of"]

TERMS = 5
"""How many tensors stand for the terms."""

Source = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def number_of(terms: tuple[MovingTerm, ...]) -> int:
    """What kernels take for the number of terms, see ``elements.ROUNDED``."""
    form = _form_of(terms) if terms else 0
    return form + DTYPES[terms[0].dtype] if form else len(terms)


def source_of(terms: tuple[MovingTerm, ...], instead: Tensor) -> tuple[int, Source]:
    """What :func:`number_of` says, and the tensors that stand for the terms, contiguous.

    Terms of a form that kernels do not know are made tensors first.

    Args:
        terms: of a prediction, none, one or two.
        instead: a tensor in place of one that there is not.
    """
    if not terms:
        return 0, (instead, instead, instead, instead, instead)
    first = terms[0]
    if isinstance(first, Tensor):
        first = first if first.is_contiguous() else first.detach().contiguous()
        if len(terms) == 1:
            return 1, (first, instead, instead, instead, instead)
        second: MovingTerm = terms[1]
        if isinstance(second, Tensor):
            return 2, (first, second if second.is_contiguous() else second.detach().contiguous(), *3 * (instead,))
    form = _form_of(terms)
    if not form:
        return source_of(tuple(map(restored, terms)), instead)
    number, base, before = form + DTYPES[first.dtype], first, terms[-1]
    coefficient = instead
    if isinstance(before, Velocity):
        coefficient, before = _in_memory(before.coefficient, before.device), before.previous
    base, base_scales = (base.codes, base.scales) if isinstance(base, Rounded) else (base, instead)
    second, second_scales = (before.codes, before.scales) if isinstance(before, Rounded) else (before, instead)
    assert isinstance(base, Tensor)
    assert isinstance(second, Tensor)
    return number, (base, second, base_scales, second_scales, coefficient)


def _form_of(terms: tuple[MovingTerm, ...]) -> int:
    """Which form of terms this is, of those that are more than a number; 0: none of them."""
    first, second = terms[0], terms[-1]
    in_eight_bits = isinstance(first, Rounded)
    if len(terms) == 1:
        return ROUNDED if in_eight_bits else 0
    if isinstance(second, Rounded):
        return TWO_ROUNDED if in_eight_bits else 0
    if not isinstance(second, Velocity):
        return 0
    if not isinstance(second.coefficient, Tensor) and second.coefficient == 0:  # it may leave 0 where kernels leave -0
        return 0
    if in_eight_bits:
        return MOVING_ROUNDED if isinstance(second.previous, Rounded) else 0
    return MOVING if isinstance(second.previous, Tensor) else 0


@lru_cache(maxsize=64)
def _constant(value: float, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.full((), value, dtype=torch.float32, device=device)


def _in_memory(coefficient: float | Tensor, device: torch.device) -> Tensor:
    return coefficient if isinstance(coefficient, Tensor) else _constant(coefficient, device)
