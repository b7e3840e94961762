"""The two ends of the codec's work: tensors to residuals as matrices, and scaled products to tensors.

Both are compiled loops where there are any for the tensors at hand, and torch operations elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from compactdist import kernels
from compactdist.codecs.base import Terms, add_up, residual_of
from compactdist.codecs.room import room
from compactdist.codecs.scalar.quantized import finite_amax
from compactdist.codecs.transform.coding import Layout
from compactdist.codecs.transform.products import Products, forward_dtype
from compactdist.kernels.reference.components import LARGEST_UNIT
from compactdist.kernels.spec import MatrixView

__all__ = ["MODERATE", "put_out", "residuals"]

_LARGEST = torch.finfo(torch.float32).max

MODERATE = 30
"""Magnitudes within powers of two of this size can be squared and added up as they are."""


def residuals(x: Tensor, terms: Terms, view: MatrixView, layout: Layout) -> tuple[Tensor, Tensor, list[int]]:
    """``x`` less the sum of ``terms``.

    Returns:
        Matrices, ``(G, R, K)`` in what ``forward_dtype`` says, zeros beyond the channels, to be multiplied by two to
        the power of an exponent for each group; never ``x`` itself, perhaps this thread's ``room("matrix")``. The sums
        of squares of their rows, ``(G, R)``. The exponents.

    Raises:
        NonFiniteError: There is an infinity or NaN among them.
    """
    shape = view.groups, layout.rows, layout.components
    dtype = forward_dtype(shape, layout.planes / layout.channels, x.device)
    x = x.contiguous()
    steps = _compiled(x, *terms)
    if steps is not None:
        out = room("matrix", shape, x.device, dtype)
        squares = steps.take_in(x, terms, view, out)
        norms: list[float] = squares.sum(1, dtype=torch.float64).sqrt_().tolist()
        if all(2.0**-MODERATE <= norm <= 2.0**MODERATE for norm in norms):
            return out, squares, [0] * view.groups
    out = view.to_matrix(residual_of(x, terms))
    amax = finite_amax(out.abs(), view.numel).view(-1)
    out, exponents = layout.padded(out), []
    if out.data_ptr() == x.data_ptr():  # the caller writes over it
        out = out.clone()
    for group, largest in enumerate(amax):
        exponent = int(torch.frexp(largest)[1])
        moderate = abs(exponent) <= MODERATE
        exponents.append(0 if moderate else exponent)
        if not moderate:  # in two steps, for the power itself may be beyond float32
            out[group] *= 2.0 ** (-exponent // 2)
            out[group] *= 2.0 ** -(exponent + -exponent // 2)
    return out.to(dtype), torch.linalg.vector_norm(out, dim=2).square(), exponents


def put_out(
    products: Sequence[Products], units: Tensor, rows: Tensor, terms: Terms, view: MatrixView, out: Tensor
) -> None:
    """Write the sum of ``terms`` plus scaled products, kept finite after each step and rounded once, to ``out``.

    Args:
        products: of each group.
        units: what they are multiplied by first, finite, float32 ``(G, K)``.
        rows: what they are multiplied by then, float32 ``(G, R)``.
        terms: as for ``Session.decode``.
        view: of ``out`` and the terms.
        out: may be the first of the terms.
    """
    steps = _compiled(out, *terms)
    if steps is not None and float(units.abs().amax()) > LARGEST_UNIT:
        steps = None
    if steps is not None and steps.multiplies_bytes():
        for group, (one, unit, scales) in enumerate(zip(products, units, rows, strict=True)):
            steps.put_out_bytes(*one, unit, scales, terms, view, group, out)
        return
    matrix = room("matrix", (len(products), rows.shape[1], units.shape[1]), out.device)
    for one, to in zip(products, matrix, strict=True):
        one.write(to)
    if steps is not None:
        steps.put_out(matrix, units, rows, terms, view, out)
        return
    matrix += 0.0  # some products of one component only are -0, where whole numbers are 0
    matrix.mul_(units[:, None]).clamp_(-_LARGEST, _LARGEST).mul_(rows[:, :, None])
    add_up(terms, view.to_flat(matrix[..., : view.channels]), out)


def _compiled(*tensors: Tensor) -> ModuleType | None:
    """The compiled loops, where they take these flat tensors."""
    if not tensors[0].is_cpu or not kernels.cpu_runs(tensors[0].numel()):
        return None
    from compactdist.kernels.cpu import component_steps

    return component_steps if component_steps.supports(*tensors) else None
