"""What the transform codec calls on a GPU to make payloads: tensors to launches of the kernels of ``fitting.py``,
``allotment.py``, and of those that choose levels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from compactdist.kernels.gpu import allotment, components, fitting, trellis
from compactdist.kernels.gpu.component_launches import ROWS, ComponentLaunches, Parts
from compactdist.kernels.gpu.plan import INTERPRETED
from compactdist.kernels.gpu.terms import source_of
from compactdist.kernels.spec import Allotment, ComponentSpec, ComponentTables, MatrixView, MovingTerm

__all__ = ["ComponentSender"]

_COMPONENTS = 32
_COURSES = 4096 if INTERPRETED else 128
"""Courses that one program follows."""

_NOWHERE = 1e4
"""A level that no value is near, for values are held to ``FARTHEST``."""

_PAIRS = 1024
"""Pairs of rows that a program goes through at a time."""

_MOST_PARTS = 8
"""Programs among which the components of the same rows are divided."""


class _Fit(NamedTuple):
    """Of all components: mean squares, the root of the largest of these, and what follows (``allotment.allot``)."""

    powers: Tensor
    largest: Tensor
    factors: Tensor


class ComponentSender(ComponentLaunches):
    """Of one stream."""

    def __init__(self, spec: ComponentSpec, tables: ComponentTables, view: MatrixView, device: torch.device) -> None:
        super().__init__(spec, tables, view, device)
        self._course_tables = _near_and_below(self._levels, self._there) if spec.stride else ()

    def take_in(self, x: Tensor, terms: tuple[MovingTerm, ...], flag: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``x`` less the sum of ``terms`` over powers of two, as matrices; zeros if it is not finite.

        Args:
            x: flat, contiguous.
            terms: of the prediction, flat.
            flag: int32 ``[1]``, set to 1 if a residual is not finite.

        Returns:
            float32 ``(G, R, K)``, zeros beyond the channels; sums of the squares of their rows, float32 ``(G, R)``;
            exponents of the powers, int32 ``(G,)``.
        """
        view = self.view
        number, source = source_of(terms, x)
        given = x, *source, self._offsets.row_at, self._offsets.column_at
        largest = torch.zeros(view.groups, dtype=torch.int32, device=self._device)
        constants = {"TERMS": number, "PLACE": self._offsets.kind}
        numbers, programs = (view.rows, view.channels, view.numel), view.groups * view.rows
        chunk = min(1024, triton.next_power_of_2(self._count))
        self._launch(
            ("largest", number, x.dtype),
            fitting.largest_residuals,
            programs,
            (*given, largest),
            numbers,
            CHUNK=chunk,
            **constants,
        )
        matrix, squares = self._floats(view.groups, view.rows, self._count), self._floats(view.groups, view.rows)
        exponents = torch.empty(view.groups, dtype=torch.int32, device=self._device)
        self._launch(
            ("take in", number, x.dtype),
            fitting.take_in,
            programs,
            (*given, largest, matrix, squares, exponents, flag),
            (*numbers, self._count, self._tables.moderate),
            CHUNK=chunk,
            **constants,
        )
        return matrix, squares, exponents

    def encode(self, turned: Tensor, squares: Tensor, exponents: Tensor, payload: Tensor) -> Parts:
        """Write the payloads of components.

        Rows are fitted twice: to all components, then to those that get bits, each as strong as its amplitude says.

        Args:
            turned: the components, float32 ``(G, K, R)``, contiguous.
            squares: sums of their squares, float32 ``(G, R)``; may differ a little.
            exponents: of two, int32 ``(G,)``: what they are to be multiplied by.
            payload: of all groups, contiguous.
        """
        groups, rows = squares.shape
        payload.zero_()
        room = self._room_for_parts()
        fit = _Fit(*(self._floats(groups, size) for size in (self._count, 1, self._count)))
        scales, inverses = self._floats(2, groups, rows)
        of_rows = squares[:, None]
        for end in (allotment.FITTED, allotment.CODED):
            self._fit_rows(of_rows, payload, scales, inverses)
            self._powers(turned, inverses, fit.powers)
            self._allot(payload, room, end, *fit)
            if end is allotment.FITTED:
                of_rows = self._weighed_rows(turned, fit.factors)
        energies, agreements = self._choose(turned, Allotment(*room[:2]), fit.factors, (scales, inverses), payload)
        self._write_scales(payload, energies, agreements, room[3], fit.largest, exponents)
        return self._with_rows(payload, room)

    def _fit_rows(self, squares: Tensor, payload: Tensor, scales: Tensor, inverses: Tensor) -> None:
        at, (groups, parts, rows) = self.spec, squares.shape
        self._launch(
            ("fit rows", parts),
            fitting.fit_rows,
            groups,
            (squares, payload, self._tables.row_scales, scales, inverses),
            (rows, parts, float(self._tables.row_slope), at.nbytes, at.rows_at),
            warps=8,
            PAIRS=min(_PAIRS, triton.next_power_of_2(-(-rows // 2))),
        )

    def _powers(self, turned: Tensor, inverses: Tensor, powers: Tensor) -> None:
        self._launch(
            "powers",
            fitting.component_powers,
            self.view.groups * -(-self._count // _COMPONENTS),
            (turned, inverses, powers),
            (self.view.rows, self._count, self._sampled, self.spec.step),
            COMPONENTS=_COMPONENTS,
            ROWS=ROWS,
        )

    def _weighed_rows(self, turned: Tensor, weights: Tensor) -> Tensor:
        """See ``fitting.weigh_rows``; float32 ``(G, parts, R)``."""
        squares = self._floats(self.view.groups, min(_MOST_PARTS, -(-self._count // _COMPONENTS)), self.view.rows)
        parts = squares.shape[1]
        self._launch(
            "weigh rows",
            fitting.weigh_rows,
            self.view.groups * parts * -(-self.view.rows // ROWS),
            (turned, weights, squares),
            (self.view.rows, self._count, parts),
            COMPONENTS=_COMPONENTS,
            ROWS=ROWS,
        )
        return squares

    def _write_scales(
        self, payload: Tensor, energies: Tensor, agreements: Tensor, units: Tensor, largest: Tensor, exponents: Tensor
    ) -> None:
        at = self.spec
        self._launch(
            "write scales",
            fitting.write_scales,
            self.view.groups * at.blocks,
            (payload, energies, agreements, units, largest, exponents),
            (at.width, at.blocks, energies.shape[1], at.nbytes, float(self._tables.smallest)),
            WIDTH=triton.next_power_of_2(at.width),
        )

    def _choose(
        self,
        turned: Tensor,
        allotment: Allotment,
        inverses: Tensor,
        rows: tuple[Tensor, Tensor],
        payload: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Write the planes of components; what ``reference.components.choose`` or ``choose_on_trellis`` does.

        Args:
            turned: float32 ``(G, K, R)``, contiguous.
            allotment: of the planes.
            inverses: float32 ``(G, K)``.
            rows: scales and their inverses, float32 ``(G, R)``.
            payload: of all groups; its planes are written.

        Returns:
            Of levels times scales, for each component: sums of squares, and of products with the component, float32
            ``(G, tiles, K)``, over tiles of rows.
        """
        groups, count, length = turned.shape
        given: tuple[Tensor, ...] = (turned, inverses, *rows, payload, *allotment)
        numbers: tuple[int, ...]
        if self.spec.stride:
            lanes, tiles = self.spec.stride, 1
            turns, beside = -(-length // lanes), max(1, _COURSES // lanes)
            courses = torch.empty(groups * count * turns * lanes, dtype=torch.int32, device=self._device)
            kernel, numbers = trellis.choose_on_trellis, (length, count, turns, *self._planes)
            given, constants = (*given, *self._course_tables, courses), {"COMPONENTS": beside, "LANES": lanes}
        else:
            tiles, kernel, numbers = -(-length // ROWS), components.choose_components, (length, count, *self._planes)
            given, constants = (*given, self._tables.steps, self._levels), {"COMPONENTS": _COMPONENTS, "ROWS": ROWS}
        energies, agreements = self._floats(2, groups, tiles, count)
        programs = groups * tiles * -(-count // constants["COMPONENTS"])
        self._launch("choose", kernel, programs, (*given, energies, agreements), numbers, **constants)
        return energies, agreements


def _near_and_below(levels: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
    """``levels`` and ``below`` as ``trellis.choose_on_trellis`` takes them."""
    ends = (trellis.BEYOND, trellis.BEYOND)
    near = torch.nn.functional.pad(torch.where(there, levels.float(), _NOWHERE), ends, value=_NOWHERE)
    near[:, : trellis.BEYOND], near[0] = -_NOWHERE, 0
    whole = torch.arange(-128, 128, device=levels.device)
    below = ((levels[:, None] <= whole[:, None]) & there[:, None]).sum(-1)
    return near, torch.minimum(below, (there.sum(-1) - 1).clamp(min=0)[:, None]).to(torch.uint8)
