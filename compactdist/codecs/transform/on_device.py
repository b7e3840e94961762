"""The codec where the host does not wait: frames of all groups at once, in shapes that depend on no value.

Every component takes part in every step, with a depth of 0 where it got no bits. What both ends compute has the bits of
``coding.py`` and ``basis.py``. Decoding and learning read nothing on the host, and encoding with a flag for a residual
that is not finite does not either; without one it reads once, to refuse it. The sender decodes its own payload as the
receiver does.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from compactdist.codecs.base import Terms, residual_of
from compactdist.codecs.scalar.quantized import finite_amax
from compactdist.codecs.transform.basis import ANGLE, SHARE, SMALLEST_SWEEP, Basis, rows_of
from compactdist.codecs.transform.coding import (
    ROW_SLOPE,
    SMALLEST_AMPLITUDE,
    Layout,
    amplitude_table,
    row_table,
    sampled,
)
from compactdist.codecs.transform.depths import PER_OCTAVE, most_of, worth_of
from compactdist.codecs.transform.ends import MODERATE
from compactdist.codecs.transform.levels import LevelSet, outermost_table, steps_table
from compactdist.codecs.transform.products import LARGEST_SUM, LARGEST_WEIGHT, by_blocks
from compactdist.codecs.transform.trellis import stride_of
from compactdist.kernels import device_component_steps_for
from compactdist.kernels.spec import ComponentSpec, ComponentTables, MatrixView

if TYPE_CHECKING:
    from compactdist.kernels.gpu.component_launches import Parts
    from compactdist.kernels.gpu.component_steps import ComponentSteps

__all__ = ["Received", "encode", "read", "spec_of", "steps_for", "tables_of"]

_ALIGNED = 16
"""Kernels take payloads whose address is a multiple of it."""


def steps_for(layout: Layout, view: MatrixView, dtype: torch.dtype, device: torch.device) -> ComponentSteps | None:
    """The kernels of a stream; ``None`` where ``coding.py`` is to be used."""
    return device_component_steps_for(spec_of(layout), tables_of(layout.levels, device), view, dtype, device)


def spec_of(layout: Layout) -> ComponentSpec:
    """What the kernels are told."""
    scales, energies, rows, _ = layout.sections
    sections = scales, scales + energies, scales + energies + rows
    stride = stride_of(layout.rows) if layout.on_trellis else 0
    sizes = layout.blocks, layout.width, layout.planes, layout.nbytes
    return ComponentSpec(*sizes, *sections, sampled(layout.rows).step, LARGEST_WEIGHT, LARGEST_SUM, stride)


@cache
def tables_of(levels: LevelSet, device: torch.device) -> ComponentTables:
    """The numbers that they take."""
    return ComponentTables(
        steps_table(levels, device),
        amplitude_table(device),
        outermost_table(levels, device),
        worth_of(levels, device).int(),
        row_table(device),
        most_of(levels),
        ROW_SLOPE,
        PER_OCTAVE,
        MODERATE,
        SMALLEST_AMPLITUDE,
        SHARE,
        SMALLEST_SWEEP,
        ANGLE,
    )


class Received(NamedTuple):
    """What the payloads of all groups say.

    Attributes:
        steps: of the stream.
        payload: uint8 ``(G * layout.nbytes,)``, contiguous.
        parts: all of it but the planes.
    """

    steps: ComponentSteps
    payload: Tensor
    parts: Parts

    def write(self, basis: Basis, terms: Terms, out: Tensor, copy: Tensor | None, accepted: Tensor | None) -> None:
        """Write the sum of ``terms`` plus what was received to ``out``; see ``kernels.DeviceSteps.decode``."""
        weights, parts = self.steps.weigh(basis.rows, self.parts.units), self.parts
        self.steps.decode(self.payload, parts.allotment, weights, parts.rows, terms, out, copy, accepted)

    def following(self, basis: Basis, accepted: Tensor | None) -> Callable[[], Basis]:
        """What works out the basis after it, and does not need the payload any more."""
        learnt = self.steps.learnt(self.payload, self.parts, accepted)
        return lambda: Basis(*self.steps.followed(*basis, learnt))


def read(steps: ComponentSteps, payload: Tensor) -> Received:
    """What a payload says, uint8 ``(G * layout.nbytes,)``, contiguous."""
    if payload.data_ptr() % _ALIGNED:
        payload = payload.clone()
    return Received(steps, payload, steps.read(payload))


def encode(
    steps: ComponentSteps,
    basis: Basis,
    x: Tensor,
    terms: Terms,
    layout: Layout,
    payload: Tensor,
    flag: Tensor | None = None,
) -> Received:
    """Write the payload of ``x`` less the sum of ``terms``, and read it; see ``Session.encode``.

    ``flag``: int32 ``[1]``, set to 1 if the residual is not finite, and then the payload is that of zeros.
    """
    x, view = x.contiguous(), steps.view
    if flag is None:
        finite_amax(view.to_matrix(residual_of(x, terms)).abs(), view.numel)
        flag = torch.zeros(1, dtype=torch.int32, device=x.device)
    if payload.data_ptr() % _ALIGNED:
        received = encode(steps, basis, x, terms, layout, torch.empty_like(payload), flag)
        payload.copy_(received.payload)
        return received
    matrices, squares, exponents = steps.sender.take_in(x, terms, flag)
    turned = torch.empty(view.groups, layout.components, layout.rows, dtype=torch.float32, device=x.device)
    for matrix, rows, one in zip(matrices, rows_of(basis.rows), turned, strict=True):
        by_blocks(rows, layout.blocks_of(matrix).mT, layout.components_of(one))
    return Received(steps, payload, steps.sender.encode(turned, squares, exponents, payload))
