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
    return (_form_of(terms) if terms else 0) or len(terms)


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
    number = _form_of(terms)
    if not number:
        return source_of(tuple(map(restored, terms)), instead)
    before, coefficient = terms[-1], instead
    if isinstance(before, Velocity):
        coefficient, before = _in_memory(before.coefficient, before.device), before.previous
    base, base_scales = _parts_of(first, instead)
    second, second_scales = _parts_of(before, instead)
    return number, (base, second, base_scales, second_scales, coefficient)


def _parts_of(term: MovingTerm, instead: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of a term in eight bits; a tensor, and another in place of scales."""
    if isinstance(term, Rounded):
        return term.codes, term.scales
    assert isinstance(term, Tensor)
    return term, instead


def _form_of(terms: tuple[MovingTerm, ...]) -> int:
    """What kernels take for these terms, if they are more than a number; else 0."""
    first, second = terms[0], terms[-1]
    in_eight_bits, dtype = isinstance(first, Rounded), DTYPES[first.dtype]
    if len(terms) == 1:
        return ROUNDED + dtype if in_eight_bits else 0
    if isinstance(second, Rounded):
        return TWO_ROUNDED + dtype if in_eight_bits else 0
    if not isinstance(second, Velocity) or isinstance(second.previous, Rounded) != in_eight_bits:
        return 0
    if not isinstance(second.coefficient, Tensor) and second.coefficient == 0:  # it may leave 0 where kernels leave -0
        return 0
    return (MOVING_ROUNDED if in_eight_bits else MOVING) + dtype


@lru_cache(maxsize=64)
def _constant(value: float, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.full((), value, dtype=torch.float32, device=device)


def _in_memory(coefficient: float | Tensor, device: torch.device) -> Tensor:
    return coefficient if isinstance(coefficient, Tensor) else _constant(coefficient, device)
