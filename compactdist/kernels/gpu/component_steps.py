"""What the transform codec calls on a GPU to read payloads and to learn from them: tensors to launches of the kernels
of ``components.py``, ``allotment.py`` and ``following.py``.
"""

from __future__ import annotations

from functools import cached_property, lru_cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from compactdist.kernels.gpu import allotment, components, following
from compactdist.kernels.gpu.component_launches import ROWS, ComponentLaunches, Parts
from compactdist.kernels.gpu.component_sender import ComponentSender
from compactdist.kernels.gpu.elements import DTYPES
from compactdist.kernels.gpu.plan import DEVICE_TYPE, MOST_ELEMENTS
from compactdist.kernels.gpu.rotations import LARGEST, sweep_held
from compactdist.kernels.gpu.terms import source_of
from compactdist.kernels.spec import Allotment, ComponentSpec, ComponentTables, MatrixView, MovingTerm

__all__ = ["ComponentSteps", "Learnt", "steps_of"]

_SMALLEST_DOT, _LARGEST_TILE = 16, 128


@lru_cache(maxsize=256)
def steps_of(
    spec: ComponentSpec, tables: ComponentTables, view: MatrixView, dtype: torch.dtype, device: torch.device
) -> ComponentSteps | None:
    """The steps of one stream; ``None`` where there are no kernels for its device, dtype, or so many elements.

    Args:
        spec: of the codec and view.
        tables: of the codec.
        view: of the stream's flat tensors.
        dtype: of these tensors.
        device: of these tensors.
    """
    if device.type != DEVICE_TYPE or dtype not in DTYPES:
        return None
    rows = view.rows + -view.rows % max(1, spec.stride)
    padded = view.groups * spec.blocks * spec.width * max(rows, spec.width)
    if max(padded, view.groups * spec.nbytes) > MOST_ELEMENTS or not LARGEST >= spec.width >= 2:
        return None
    return ComponentSteps(spec, tables, view, device)


class Learnt(NamedTuple):
    """What a frame of all groups says of the components of each block.

    Attributes:
        amplitudes: float32 ``(G, K)``.
        order: those that got bits, then the others, both ascending, int32 ``(G, M, n)``.
        counts: how many got bits, int32 ``(G, M)``.
        sums: of products of the evidence of components in that order, whole numbers, float32 ``(G, M, n, n)``.
    """

    amplitudes: Tensor
    order: Tensor
    counts: Tensor
    sums: Tensor


class ComponentSteps(ComponentLaunches):
    """Of one stream."""

    @cached_property
    def sender(self) -> ComponentSender:
        """What makes payloads of this stream."""
        return ComponentSender(self.spec, self._tables, self.view, self._device)

    @cached_property
    def _tiles(self) -> dict[str, int]:
        along = min(_LARGEST_TILE, max(_SMALLEST_DOT, triton.next_power_of_2(self.spec.width)))
        return {"WIDTH": along, "PARTS": -(-self.spec.width // along), "BEHIND": self.spec.stride // 8}

    def read(self, payload: Tensor) -> Parts:
        """All sections but the planes of the payloads of all groups, contiguous."""
        room = self._room_for_parts()
        self._allot(payload, room, allotment.RECEIVED, self._floats(1), self._floats(1), self._floats(1))
        return self._with_rows(payload, room)

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
        steps = self._floats(*basis.shape[:2])
        along = max(_SMALLEST_DOT, triton.next_power_of_2(at.width))
        self._launch(
            "weigh",
            components.weigh_basis,
            self.view.groups * at.blocks,
            (basis, units, high, low, steps),
            (at.width, float(at.largest_weight), float(at.largest_sum)),
            ROWS=max(1, 4096 // along),
            WIDTH=along,
        )
        return high, low, steps

    def decode(
        self,
        payload: Tensor,
        allotment: Allotment,
        weights: tuple[Tensor, Tensor, Tensor],
        row_scales: Tensor,
        terms: tuple[MovingTerm, ...],
        out: Tensor,
        copy: Tensor | None = None,
        accepted: Tensor | None = None,
    ) -> None:
        """Write the sum of ``terms`` plus what a payload says, kept finite and rounded once, to ``out``.

        Args:
            payload: of all groups, contiguous.
            allotment: of its planes.
            weights: as :meth:`weigh` returns them.
            row_scales: float32 ``(G, R)``.
            terms: of the prediction, flat.
            out: flat, contiguous; may be the first of the terms.
            copy: contiguous, receives the same.
            accepted: uint8 ``[2]``: ``out`` is left as it is if the first is 0, ``copy`` gets NaN if the second is.
        """
        at, view = self.spec, self.view
        number, source = source_of(terms, out)
        places = self._offsets.row_at, self._offsets.column_at
        self._launch(
            ("decode", number, out.dtype, copy is None, accepted is None),
            components.decode_components,
            view.groups * -(-view.rows // ROWS) * at.blocks * self._tiles["PARTS"],
            (
                *source,
                out,
                payload if accepted is None else accepted,
                out if copy is None else copy,
                payload,
                *weights,
                *allotment,
                self._levels,
                row_scales,
                *places,
            ),
            (view.rows, view.channels, view.numel, at.width, at.blocks, *self._planes),
            warps=8,
            TERMS=number,
            PLACE=self._offsets.kind,
            ROWS=ROWS,
            CHECKED=accepted is not None,
            COPIES=copy is not None,
            **self._tiles,
        )

    def order(self, depths: Tensor, accepted: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Of each block the components that have bits, then the others, both ascending, int32 ``(G, M, n)``; how many
        have, int32 ``(G, M)``, or -1 where a frame is not ``accepted``.
        """
        groups, at = self.view.groups, self.spec
        order = torch.empty(groups, at.blocks, at.width, dtype=torch.int32, device=self._device)
        counts = torch.empty(groups, at.blocks, dtype=torch.int32, device=self._device)
        self._launch(
            ("order", accepted is None),
            allotment.order_components,
            groups * at.blocks,
            (depths, depths if accepted is None else accepted, order, counts),
            (at.width,),
            warps=1,
            CHECKED=accepted is not None,
            WIDTH=triton.next_power_of_2(at.width),
        )
        return order, counts

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
        sums = self._floats(*order.shape, at.width)
        self._launch(
            "correlate",
            components.correlate,
            self.view.groups * at.blocks * self._tiles["PARTS"] ** 2,
            (payload, order, *allotment, self._levels, weights, sums),
            (at.width, self._sampled, at.step, *self._planes, at.blocks),
            warps=8,
            **self._tiles,
        )
        return sums

    def learnt(self, payload: Tensor, parts: Parts, accepted: Tensor | None = None) -> Learnt:
        """What a basis learns from a payload, which it does not need any more: nothing if that is not ``accepted``."""
        order, counts = self.order(parts.allotment.depths, accepted)
        return Learnt(parts.amplitudes, order, counts, self.correlate(payload, parts.allotment, order, parts.weights))

    def followed(self, rows: Tensor, energies: Tensor, learnt: Learnt) -> tuple[Tensor, Tensor]:
        """The basis after a frame, as ``codecs.transform.basis.followed``, new tensors.

        Args:
            rows: of the basis that coded the frame, int16 ``(G, M, n, n)``.
            energies: of that basis, float32 ``(G, M, n)``.
            learnt: from the frame.
        """
        n, tables = self.spec.width, self._tables
        blocks, size = learnt.counts.numel(), max(n, tables.smallest_sweep)
        held, turned = self._floats(2, blocks, size, size), self._floats(2, blocks, size, n)
        sizes, kept = torch.empty_like(learnt.counts), self._floats(blocks, n)
        along = triton.next_power_of_2(size)
        tile = {"ROWS": min(along, max(1, 4096 // along)), "WIDTH": along}
        of_frame = learnt.amplitudes, learnt.sums, learnt.order, learnt.counts
        self._launch(
            "gather",
            following.gather_basis,
            blocks * -(-size // tile["ROWS"]),
            (rows, energies, *of_frame, held[0], turned[0], sizes, kept),
            (n, size, tables.share),
            **tile,
        )
        sweep_held(held, turned, sizes.view(-1), tables.smallest_angle)
        new_rows, new_energies = torch.empty_like(rows), torch.empty_like(energies)
        self._launch(
            "scatter",
            following.scatter_basis,
            blocks * -(-n // tile["ROWS"]),
            (rows, held[0], turned[0], kept, learnt.order, learnt.counts, new_rows, new_energies),
            (n, size),
            **tile,
        )
        return new_rows, new_energies
