"""A history kept in eight bits for each element: half the memory of bfloat16, a quarter of float32.

The user gets the reconstruction as it is; both ends then keep the same rounded copy of it, and the next frame is
predicted from that copy. What the rounding lost is part of the next residual and is sent again, so it does not add up.
(CompactFusion's "quantized cache", arXiv 2507.17511 and its public code, is the same idea with one affine scale for
each channel.)

Every step is elementwise float32 arithmetic, integer arithmetic or a maximum, so two ends that start equal stay equal
to the bit, whatever devices they run on.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from compactdist import kernels
from compactdist.kernels.spec import ROUNDED, ROUNDED_BLOCK, EightBits, Rounded, Term, Velocity
from compactdist.state.history import (
    DampedVelocity,
    ExactCell,
    ExactDampedVelocity,
    ExactLastValue,
    LastValue,
    Order,
    Predictor,
    predictor_class,
)

__all__ = [
    "STATE_FORMS",
    "QuantizedCell",
    "StateForm",
    "make_predictor",
    "quantize",
    "state_copy_nbytes",
]

StateForm = Literal["exact", "int8", "fp8"]
STATE_FORMS: tuple[StateForm, ...] = ("exact", "int8", "fp8")


def quantize(
    values: Tensor | Velocity,
    form: EightBits,
    dtype: torch.dtype,
    into: Rounded | None = None,
    accepted: Tensor | None = None,
) -> Rounded:
    """Round a flat, finite tensor to eight bits for each element, as ``kernels/reference/rounding.py`` says.

    Args:
        values: flat ``[numel]``, any compressible dtype; or a velocity.
        form: ``"int8"``: 127 equal steps to each side; ``"fp8"``: E4M3, a constant relative error over six decades.
        dtype: of the tensor that it stands for.
        into: of the same form, whose memory is written to if size, dtype and device are the same.
        accepted: uint8 ``[2]`` on the device: that memory stays as it is where the first of it is 0.
    """
    numel, device, codes = values.numel(), values.device, ROUNDED[form].codes
    if into is None or into.numel() != numel or into.dtype != dtype or into.device != device:
        made = torch.empty(numel, dtype=codes, device=device)
        scales = torch.empty(-(-numel // ROUNDED_BLOCK), dtype=torch.bfloat16, device=device)
        into, accepted = Rounded(made, scales, dtype), None
    kernels.round_off(values, into.codes, into.scales, accepted)
    return into


def state_copy_nbytes(form: StateForm, numel: int, dtype: torch.dtype) -> int:
    """Bytes of one remembered tensor of this size."""
    return numel * dtype.itemsize if form == "exact" else numel + 2 * -(-numel // ROUNDED_BLOCK)


class QuantizedCell:
    """Remembers a tensor in eight bits for each element, in the same memory from frame to frame.

    ``read`` gives a new tensor each time; kernels that know how read what is ``kept``.

    Args:
        form: ``"int8"`` or ``"fp8"``.
    """

    __slots__ = ("_form", "_kept")

    def __init__(self, form: EightBits) -> None:
        self._form: EightBits = form
        self._kept: Rounded | None = None

    def kept(self, rounded: bool) -> Term | None:
        """What is kept, which changes with the next frame; without ``rounded`` as :meth:`read`."""
        return self._kept if rounded else self.read()

    def read(self) -> Tensor | None:
        """The rounded tensor, in new memory."""
        return None if self._kept is None else kernels.restored(self._kept)

    def put(self, value: Tensor | Velocity, last: Term | None, accepted: Tensor | None = None) -> Tensor | None:
        """Remember a rounded copy of ``value``, unless it was not ``accepted``.

        Returns:
            ``last``, a copy that ``read`` made and nobody needs now; ``value``, where ``last`` is what is kept.
        """
        self._kept = quantize(value, self._form, value.dtype, self._kept, accepted)
        if isinstance(last, Rounded):
            return value if isinstance(value, Tensor) else None
        return last

    def made_of(self, value: Tensor | Velocity) -> tuple[Tensor, ...]:
        """Its codes and scales."""
        made = quantize(value, self._form, value.dtype)
        return made.codes, made.scales

    def stay(self) -> None:
        """What is kept stays where it is in any case, while size and dtype are the same."""

    def clear(self) -> None:
        """Forget."""
        self._kept = None

    def move(self, to: Callable[[Tensor], Tensor]) -> None:
        """Keep copies of codes and scales that lie elsewhere."""
        if self._kept is not None:
            self._kept = Rounded(to(self._kept.codes), to(self._kept.scales), self._kept.dtype)

    @property
    def held(self) -> tuple[Tensor, ...]:
        """Codes and scales."""
        return () if self._kept is None else (self._kept.codes, self._kept.scales)


def make_predictor(order: Order, damping: float, form: StateForm) -> Predictor:
    """An empty predictor of this order that keeps tensors in this form."""
    kind = predictor_class(order)
    if form != "exact":
        return kind(damping, functools.partial(QuantizedCell, form))
    if kind is LastValue:
        return ExactLastValue(damping, ExactCell)
    return (ExactDampedVelocity if kind is DampedVelocity else kind)(damping, ExactCell)
