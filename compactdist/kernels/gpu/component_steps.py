"""What the transform codec calls on a GPU: tensors to launches of the kernels of ``components.py``.

Nothing here waits for the device, and no shape follows from a value.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from compactdist.kernels.gpu import components, trellis
from compactdist.kernels.gpu.launch import Launch, Slot, run
from compactdist.kernels.gpu.plan import DEVICE_TYPE, INTERPRETED, MOST_ELEMENTS, offsets_on
from compactdist.kernels.gpu.rotations import LARGEST
from compactdist.kernels.reference.components import STRIDE
from compactdist.kernels.spec import Allotment, ComponentSpec, MatrixView

__all__ = ["ComponentSteps", "steps_of"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_EXACT = {"enable_fp_fusion": False}
_ROWS, _COMPONENTS = 64, 32
_SMALLEST_DOT, _LARGEST_TILE = 16, 128
_COURSES = 4096 if INTERPRETED else 128
"""Courses that one program follows."""

_NOWHERE = 1e4
"""A level that no value is near, for values are held to ``FARTHEST``."""


@lru_cache(maxsize=256)
def steps_of(
    spec: ComponentSpec, tables: Tensor, view: MatrixView, dtype: torch.dtype, device: torch.device
) -> ComponentSteps | None:
    """The steps of one stream; ``None`` where there are no kernels for its device, dtype, or so many elements.

    Args:
        spec: of the codec and view.
        tables: borders and levels, as ``reference.components.Chosen.steps``; along the trellis, of all its levels.
        view: of the stream's flat tensors.
        dtype: of these tensors.
        device: of these tensors.
    """
    if device.type != DEVICE_TYPE or dtype not in _DTYPES:
        return None
    padded = view.groups * spec.blocks * spec.width * max(view.rows, spec.width)
    if max(padded, view.groups * spec.nbytes) > MOST_ELEMENTS or not LARGEST >= spec.width >= 2:
        return None
    return ComponentSteps(spec, tables, view, device)


def _levels_of(tables: Tensor, more: int) -> tuple[Tensor, Tensor]:
    """int8 ``(9, STRIDE)``, by depth and code, which has ``more`` bits; of depth 0 zeros. Which of them there are."""
    levels = tables[:, 1].cumsum(-1)
    codes = torch.arange(STRIDE, device=tables.device)
    there = codes < 2 ** (torch.arange(len(levels), device=tables.device) + more)[:, None]
    there[0] = False
    return torch.where(there, levels, 0.0).to(torch.int8), there


def _near_and_below(levels: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
    """``levels`` and ``below`` as ``trellis.choose_on_trellis`` takes them."""
    ends = (trellis.BEYOND, trellis.BEYOND)
    near = torch.nn.functional.pad(torch.where(there, levels.float(), _NOWHERE), ends, value=_NOWHERE)
    near[:, : trellis.BEYOND], near[0] = -_NOWHERE, 0
    whole = torch.arange(-128, 128, device=levels.device)
    below = ((levels[:, None] <= whole[:, None]) & there[:, None]).sum(-1)
    return near, torch.minimum(below, (there.sum(-1) - 1).clamp(min=0)[:, None]).to(torch.uint8)


class ComponentSteps:
    """Of one stream. Shapes: G groups, M blocks of n channels, K = M n components, R rows."""

    def __init__(self, spec: ComponentSpec, tables: Tensor, view: MatrixView, device: torch.device) -> None:
        self.spec = spec
        self._tables, self._view, self._device = tables, view, device
        self._levels, there = _levels_of(tables, int(spec.stride > 0))
        self._course_tables = _near_and_below(self._levels, there) if spec.stride else ()
        self._offsets = offsets_on(view, device, look_up_all=True)
        along = min(_LARGEST_TILE, max(_SMALLEST_DOT, triton.next_power_of_2(spec.width)))
        self._tiles = {"WIDTH": along, "PARTS": -(-spec.width // along), "BEHIND": spec.stride // 8}
        self._sampled = -(-view.rows // spec.step)
        self._planes = spec.nbytes, spec.planes_at, -(-view.rows // 8)
        self._launches: dict[Any, Launch] = {}

    def weigh(self, basis: Tensor, units: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Components times what a level of 1 is of each, in whole numbers.

        Args:
            basis: int16 ``(G, M, n, n)``.
            units: float32 ``(G, K)``.

        Returns:
            Both limbs, int8 ``(G, M, n, n)``, and what a weight of 1 is, float32 ``(G, M)``.
        """
        at = self.spec
        high, low = torch.empty((2, *basis.shape), dtype=torch.int8, device=self._device)
        steps = torch.empty(basis.shape[:2], dtype=torch.float32, device=self._device)
        if "weigh" not in self._launches:
            limits = at.width, float(at.largest_weight), float(at.largest_sum)
            along = max(_SMALLEST_DOT, triton.next_power_of_2(at.width))
            constants = {"ROWS": max(1, 4096 // along), "WIDTH": along, "num_warps": 4, **_EXACT}
            self._launches["weigh"] = Launch(
                components.weigh_basis, self._view.groups * at.blocks, (*map(Slot, range(5)), *limits), 5, constants
            )
        run(self._launches["weigh"], (basis, units, high, low, steps), self._device)
        return high, low, steps

    def decode(
        self,
        payload: Tensor,
        allotment: Allotment,
        weights: tuple[Tensor, Tensor, Tensor],
        row_scales: Tensor,
        terms: tuple[Tensor, ...],
        out: Tensor,
    ) -> None:
        """Write the sum of ``terms`` plus what the planes say, kept finite and rounded once, to ``out``.

        Args:
            payload: of all groups, contiguous.
            allotment: of its planes.
            weights: as :meth:`weigh` returns them, but for the last: what a product of 1 is, of a row of scale 1.
            row_scales: float32 ``(G, R)``.
            terms: as many as there are, flat.
            out: flat, contiguous; may be the first of the terms.
        """
        at, view = self.spec, self._view
        base, velocity, *_ = (*(term.contiguous() for term in terms), out, out)
        places = self._offsets.row_at, self._offsets.column_at
        given = base, velocity, out, payload, *weights, *allotment, self._levels, row_scales, *places
        key = "decode", len(terms), out.dtype
        if key not in self._launches:
            numbers = view.rows, view.channels, view.numel, at.width, at.blocks, *self._planes
            constants = {"TERMS": len(terms), "PLACE": self._offsets.kind, "ROWS": _ROWS, **self._tiles}
            grid = view.groups * -(-view.rows // _ROWS) * at.blocks * self._tiles["PARTS"]
            arguments = (*map(Slot, range(len(given))), *numbers)
            self._launches[key] = Launch(
                components.decode_components, grid, arguments, len(given), {**constants, "num_warps": 8, **_EXACT}
            )
        run(self._launches[key], given, self._device)

    def correlate(self, payload: Tensor, allotment: Allotment, order: Tensor, weights: Tensor) -> Tensor:
        """Sums of products of levels, each weighted by its row and rounded, over the rows that count.

        Args:
            payload: as for :meth:`decode`.
            allotment: as for :meth:`decode`.
            order: the component of its block at each place, int32 ``(G, M, n)``.
            weights: of each row that counts, 0 to 1, float32 ``(G, R')``.

        Returns:
            float32 ``(G, M, n, n)``, rows and columns in that order; whole numbers.
        """
        at = self.spec
        sums = torch.empty(*order.shape, at.width, dtype=torch.float32, device=self._device)
        given = payload, order, *allotment, self._levels, weights, sums
        if "correlate" not in self._launches:
            numbers = at.width, self._sampled, at.step, *self._planes, at.blocks
            constants = {**self._tiles, "num_warps": 8, **_EXACT}
            grid = self._view.groups * at.blocks * self._tiles["PARTS"] ** 2
            self._launches["correlate"] = Launch(
                components.correlate, grid, (*map(Slot, range(len(given))), *numbers), len(given), constants
            )
        run(self._launches["correlate"], given, self._device)
        return sums

    def choose(
        self, turned: Tensor, allotment: Allotment, inverses: Tensor, row_scales: Tensor, payload: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Write the planes of components; what ``reference.components.choose`` does.

        Args:
            turned: float32 ``(G, K, R)``, contiguous.
            allotment: of the planes.
            inverses: float32 ``(G, K)``.
            row_scales: float32 ``(G, R)``.
            payload: of all groups; its planes are written.

        Returns:
            Of levels times scales, for each component: sums of squares, and of products with the component, float32
            ``(G, K)``. They may differ in their last bits.
        """
        if self.spec.stride:
            return self._choose_on_trellis(turned, allotment, inverses, row_scales, payload)
        groups, count, rows = turned.shape
        tiles = -(-rows // _ROWS)
        sums = torch.empty(2, groups, tiles, count, dtype=torch.float32, device=self._device)
        inverse = torch.where(row_scales > 0, 1 / row_scales, 0.0)
        given = turned, inverses, row_scales, inverse, payload, *allotment, self._tables, self._levels, *sums
        if "choose" not in self._launches:
            constants = {"COMPONENTS": _COMPONENTS, "ROWS": _ROWS, "num_warps": 4, **_EXACT}
            arguments = (*map(Slot, range(len(given))), rows, count, *self._planes)
            grid = groups * tiles * -(-count // _COMPONENTS)
            self._launches["choose"] = Launch(components.choose_components, grid, arguments, len(given), constants)
        run(self._launches["choose"], given, self._device)
        energies, agreements = sums.sum(2)
        return energies, agreements

    def _choose_on_trellis(
        self, turned: Tensor, allotment: Allotment, inverses: Tensor, row_scales: Tensor, payload: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As :meth:`choose`; ``inverses`` are what makes levels."""
        groups, count, rows = turned.shape
        lanes = self.spec.stride
        turns, beside = -(-rows // lanes), max(1, _COURSES // lanes)
        energies, agreements = torch.empty(2, groups, count, dtype=torch.float32, device=self._device)
        courses = torch.empty(groups * count * turns * lanes, dtype=torch.int32, device=self._device)
        inverse = torch.where(row_scales > 0, 1 / row_scales, 0.0)
        of_values = turned, inverses, row_scales, inverse
        given = *of_values, payload, *allotment, *self._course_tables, courses, energies, agreements
        if "choose" not in self._launches:
            constants = {"COMPONENTS": beside, "LANES": lanes, "num_warps": 4, **_EXACT}
            arguments = (*map(Slot, range(len(given))), rows, count, turns, *self._planes)
            grid = groups * -(-count // beside)
            self._launches["choose"] = Launch(trellis.choose_on_trellis, grid, arguments, len(given), constants)
        run(self._launches["choose"], given, self._device)
        return energies, agreements
