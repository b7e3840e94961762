"""The codec where the host does not wait: frames of all groups at once, in shapes that depend on no value.

Every component takes part in every step, with a depth of 0 where it got no bits. What both ends compute has the bits of
``coding.py`` and ``basis.py``. Decoding and learning read nothing on the host, and encoding with a flag for a residual
that is not finite does not either; without one it reads once, to refuse it. The sender decodes its own payload as the
receiver does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from compactdist.codecs.base import Terms, residual_of
from compactdist.codecs.scalar.quantized import finite_amax
from compactdist.codecs.transform.basis import Basis, Learnt, rows_of
from compactdist.codecs.transform.coding import (
    Layout,
    amplitudes_of,
    finite_units,
    fitted,
    row_scales_of,
    sampled,
    write_scales,
)
from compactdist.codecs.transform.depths import allocate
from compactdist.codecs.transform.ends import MODERATE
from compactdist.codecs.transform.levels import LevelSet, steps_table, unit_levels_of
from compactdist.codecs.transform.products import LARGEST_SUM, LARGEST_WEIGHT, by_blocks
from compactdist.codecs.transform.trellis import stride_of
from compactdist.kernels import device_component_steps_for, reference
from compactdist.kernels.spec import Allotment, ComponentSpec, MatrixView

if TYPE_CHECKING:
    from compactdist.kernels.gpu.component_steps import ComponentSteps

__all__ = ["Received", "encode", "read", "spec_of", "steps_for"]


def steps_for(layout: Layout, view: MatrixView, dtype: torch.dtype, device: torch.device) -> ComponentSteps | None:
    """The kernels of a stream; ``None`` where ``coding.py`` is to be used."""
    return device_component_steps_for(spec_of(layout), steps_table(layout.levels, device), view, dtype, device)


def spec_of(layout: Layout) -> ComponentSpec:
    """What the kernels are told."""
    planes_at, step = sum(layout.sections[:3]), sampled(layout.rows).step
    stride = stride_of(layout.rows) if layout.on_trellis else 0
    sizes = layout.blocks, layout.width, layout.nbytes
    return ComponentSpec(*sizes, planes_at, step, LARGEST_WEIGHT, LARGEST_SUM, stride)


def _allotted(codes: Tensor, layout: Layout) -> Allotment:
    """``codes`` is uint8 ``(G, K)``."""
    depths = allocate(codes, layout.planes, layout.levels)
    order = depths.argsort(dim=-1, descending=True, stable=True)
    in_order = depths.gather(-1, order)
    planes = torch.empty_like(depths).scatter_(-1, order, in_order.cumsum(-1) - in_order)
    return Allotment(depths.int(), planes.int())


class Received(NamedTuple):
    """What the payloads of all groups say.

    Attributes:
        steps: of the stream.
        levels: that components are rounded to.
        payload: uint8 ``(G * layout.nbytes,)``, contiguous.
        allotment: of its planes.
        amplitudes: of all components, float32 ``(G, K)``, relative to the largest.
        rows: scales, float32 ``(G, R)``.
        gains: bfloat16-valued float32 ``(G, M)``.
        top: the largest amplitudes, float32 ``(G, 1)``.
    """

    steps: ComponentSteps
    levels: LevelSet
    payload: Tensor
    allotment: Allotment
    amplitudes: Tensor
    rows: Tensor
    gains: Tensor
    top: Tensor

    def write(self, basis: Basis, terms: Terms, out: Tensor) -> None:
        """Write the sum of ``terms`` plus what was received to ``out``; see ``Session.decode``."""
        units = self.amplitudes * unit_levels_of(self.allotment.depths, self.levels)
        high, low, steps = self.steps.weigh(basis.rows, units)
        weights = high, low, finite_units((steps * self.gains) * self.top)
        self.steps.decode(self.payload, self.allotment, weights, self.rows, terms, out)

    def learnt(self) -> Learnt:
        """What the basis learns from it, which does not need the payload any more."""
        step = self.steps.spec.step
        rows = self.rows[:, ::step]
        largest = rows.amax(1, keepdim=True)
        weights = rows / torch.where(largest > 0, largest, torch.ones_like(largest))
        chosen = self.allotment.depths.view(*self.gains.shape, -1) > 0
        order = chosen.logical_not().byte().argsort(dim=-1, stable=True)
        sums = self.steps.correlate(self.payload, self.allotment, order.int(), weights)
        return Learnt(self.amplitudes.view(chosen.shape), order, chosen.sum(-1), sums)


def read(steps: ComponentSteps, payload: Tensor, layout: Layout, groups: int) -> Received:
    """What a payload says, uint8 ``(G * layout.nbytes,)``, contiguous."""
    scales, energies, row_codes, _ = payload.view(groups, -1).split(list(layout.sections), 1)
    codes = energies[:, : layout.components]
    pairs = torch.stack([row_codes & 15, row_codes >> 4], 2).flatten(1)
    gains = reference.decode_bf16(scales[:, 4 : 4 + 2 * layout.blocks].contiguous())
    return Received(
        steps,
        layout.levels,
        payload,
        _allotted(codes, layout),
        amplitudes_of(codes),
        row_scales_of(pairs[:, : layout.rows].long()),
        gains.view(groups, layout.blocks),
        scales[:, :4].contiguous().view(torch.float32),
    )


def encode(
    steps: ComponentSteps,
    basis: Basis,
    x: Tensor,
    terms: Terms,
    view: MatrixView,
    layout: Layout,
    payload: Tensor,
    flag: Tensor | None = None,
) -> None:
    """Write the payload of ``x`` less the sum of ``terms``; see ``Session.encode``.

    ``flag``: int32 ``[1]``, set to 1 if the residual is not finite, and then the payload is that of zeros.
    """
    matrices, squares, exponents = _residuals(x, terms, view, layout, flag)
    turned = torch.empty(view.groups, layout.components, layout.rows, dtype=torch.float32, device=x.device)
    made = []
    for matrix, of_row, rows, one in zip(matrices, squares, basis.rows, turned, strict=True):
        by_blocks(rows_of(rows), layout.blocks_of(matrix).mT, layout.components_of(one))

        def weigh(codes: Tensor, largest: Tensor, one: Tensor = one) -> Tensor:
            depths = allocate(codes, layout.planes, layout.levels)
            power = (amplitudes_of(codes) * largest).square()
            return torch.where((depths > 0) & (power > 0), 1 / power, 0.0) @ one.square()

        made.append(fitted(one, of_row, layout, weigh))
    row_codes, codes, largest = map(torch.stack, zip(*made, strict=True))
    largest = largest[:, None]
    allotment, amplitudes = _allotted(codes, layout), amplitudes_of(codes)
    of_level = amplitudes * unit_levels_of(allotment.depths, layout.levels) * largest
    unit = of_level if layout.on_trellis else amplitudes * largest
    inverses = torch.where(unit > 0, 1 / unit, 0.0)
    payload.zero_()
    energy, agreement = steps.choose(turned, allotment, inverses, row_scales_of(row_codes), payload)
    exact = of_level.double()
    of_blocks = (view.groups, layout.blocks, -1)
    sums = (agreement * exact).view(of_blocks).sum(2), (energy * exact * exact).view(of_blocks).sum(2)
    top = largest.double() * torch.exp2(exponents[:, None].double())
    for index, one in enumerate(payload.view(view.groups, -1)):
        write_scales(one, layout, (sums[0][index], sums[1][index]), top[index, 0], codes[index], row_codes[index])


def _residuals(
    x: Tensor, terms: Terms, view: MatrixView, layout: Layout, flag: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``ends.residuals``, with the exponents on the device, int32 ``(G,)``."""
    out = view.to_matrix(residual_of(x.contiguous(), terms))
    if flag is None:
        amax = finite_amax(out.abs(), view.numel).view(-1)
    else:
        amax = out.abs().amax(dim=(1, 2))  # carries NaN through
        finite = amax.isfinite().all()
        flag.logical_or_(~finite)
        amax, out = torch.where(finite, amax, 0.0), torch.where(finite, out, 0.0)
    exponents = torch.frexp(amax)[1].int()
    exponents = torch.where(exponents.abs() <= MODERATE, 0, exponents)
    half = (-exponents).div(2, rounding_mode="floor")
    out = layout.padded(out.contiguous())
    for power in (half, -(exponents + half)):  # in two steps, for the power itself may be beyond float32
        out = out * (power + 127 << 23).view(torch.float32)[:, None, None]
    return out, torch.linalg.vector_norm(out, dim=2).square(), exponents
