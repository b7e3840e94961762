"""What the transform codec calls on a GPU: tensors to launches of the kernels of ``components.py`` and its neighbours.

Nothing here waits for the device, and no shape follows from a value.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from compactdist.kernels.gpu import allotment, components, fitting, following, trellis
from compactdist.kernels.gpu.launch import Launch, Slot, run
from compactdist.kernels.gpu.plan import DEVICE_TYPE, INTERPRETED, MOST_ELEMENTS, offsets_on
from compactdist.kernels.gpu.rotations import LARGEST, sweep_held
from compactdist.kernels.reference.components import STRIDE
from compactdist.kernels.spec import Allotment, ComponentSpec, ComponentTables, MatrixView

__all__ = ["ComponentSteps", "Learnt", "Parts", "steps_of"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_EXACT = {"enable_fp_fusion": False}
_ROWS, _COMPONENTS = 64, 32
_SMALLEST_DOT, _LARGEST_TILE = 16, 128
_COURSES = 4096 if INTERPRETED else 128
"""Courses that one program follows."""

_NOWHERE = 1e4
"""A level that no value is near, for values are held to ``FARTHEST``."""

_CHUNK, _PAIRS = 4096, 1024
"""Components, and pairs of rows, that a program goes through at a time."""

_MOST_PARTS = 8
"""Programs among which the components of the same rows are divided."""


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
    if device.type != DEVICE_TYPE or dtype not in _DTYPES:
        return None
    rows = view.rows + -view.rows % max(1, spec.stride)
    padded = view.groups * spec.blocks * spec.width * max(rows, spec.width)
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


class Parts(NamedTuple):
    """What a payload says, or a sender has put into it.

    Attributes:
        allotment: of its planes.
        amplitudes: of all components, float32 ``(G, K)``, relative to the largest.
        units: what a level of 1 is of each of them, likewise.
        rows: scales, float32 ``(G, R)``.
        weights: those of rows that count, over the largest of these, float32 ``(G, R')``.
    """

    allotment: Allotment
    amplitudes: Tensor
    units: Tensor
    rows: Tensor
    weights: Tensor


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


class ComponentSteps:
    """Of one stream. Shapes: G groups, M blocks of n channels, K = M n components, R rows, of which R' count."""

    def __init__(self, spec: ComponentSpec, tables: ComponentTables, view: MatrixView, device: torch.device) -> None:
        self.spec, self.view = spec, view
        self._tables, self._device = tables, device
        self._levels, there = _levels_of(tables.steps, int(spec.stride > 0))
        self._course_tables = _near_and_below(self._levels, there) if spec.stride else ()
        self._offsets = offsets_on(view, device, look_up_all=True)
        along = min(_LARGEST_TILE, max(_SMALLEST_DOT, triton.next_power_of_2(spec.width)))
        self._tiles = {"WIDTH": along, "PARTS": -(-spec.width // along), "BEHIND": spec.stride // 8}
        self._count = spec.blocks * spec.width
        self._sampled = -(-view.rows // spec.step)
        self._planes = spec.nbytes, spec.planes_at, -(-view.rows // 8)
        self._launches: dict[Any, Launch] = {}

    def _launch(
        self,
        key: Any,
        kernel: Any,
        programs: int,
        tensors: tuple[Tensor, ...],
        numbers: tuple[int | float, ...],
        *,
        warps: int = 4,
        **constants: Any,
    ) -> None:
        """Run a kernel that takes these tensors and then these numbers, the same ones whenever the key is the same."""
        launch = self._launches.get(key)
        if launch is None:
            arguments = (*map(Slot, range(len(tensors))), *numbers)
            constants |= {"num_warps": warps, **_EXACT}
            launch = self._launches[key] = Launch(kernel, programs, arguments, len(tensors), constants)
        run(launch, tensors, self._device)

    def _floats(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self._device)

    # ---- what a payload says

    def read(self, payload: Tensor) -> Parts:
        """All sections but the planes of the payloads of all groups, contiguous."""
        room = self._room_for_parts()
        self._allot(payload, room, allotment.RECEIVED, self._floats(1), self._floats(1), self._floats(1))
        return self._with_rows(payload, room)

    def _room_for_parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Depths, planes, amplitudes and units of all components."""
        whole = torch.empty(2, self.view.groups, self._count, dtype=torch.int32, device=self._device)
        return (*whole.unbind(), *self._floats(2, self.view.groups, self._count).unbind())  # type: ignore[return-value]

    def _allot(
        self, payload: Tensor, room: tuple[Tensor, ...], end: Any, powers: Tensor, largest: Tensor, factors: Tensor
    ) -> None:
        """See ``allotment.allot``."""
        at, tables = self.spec, self._tables
        given = payload, tables.worth, tables.amplitudes, tables.unit_levels, *room, powers, largest, factors
        chunk = min(_CHUNK, triton.next_power_of_2(self._count))
        self._launch(
            ("allot", end.value),
            allotment.allot,
            self.view.groups,
            given,
            (self._count, at.planes, at.nbytes, at.energies_at, tables.per_octave),
            warps=max(1, min(16, chunk // 128)),
            DEEPEST=tables.worth.numel(),
            STEPS=tables.most.bit_length(),
            CHUNK=chunk,
            END=end.value,
            ON_TRELLIS=at.stride > 0,
        )

    def _with_rows(self, payload: Tensor, room: tuple[Tensor, Tensor, Tensor, Tensor]) -> Parts:
        at, (groups, rows) = self.spec, (self.view.groups, self.view.rows)
        scales, weights = self._floats(groups, rows), self._floats(groups, self._sampled)
        tile = min(1024, triton.next_power_of_2(rows))
        self._launch(
            "read rows",
            allotment.read_rows,
            groups * -(-rows // tile),
            (payload, self._tables.row_scales, scales, weights),
            (rows, self._sampled, at.step, at.nbytes, at.rows_at),
            ROWS=tile,
            SAMPLES=triton.next_power_of_2(self._sampled),
        )
        depths, planes, amplitudes, units = room
        return Parts(Allotment(depths, planes), amplitudes, units, scales, weights)

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
        terms: tuple[Tensor, ...],
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
            terms: as many as there are, flat.
            out: flat, contiguous; may be the first of the terms.
            copy: contiguous, receives the same.
            accepted: uint8 ``[2]``: ``out`` is left as it is if the first is 0, ``copy`` gets NaN if the second is.
        """
        at, view = self.spec, self.view
        base, velocity, *_ = (*(term.contiguous() for term in terms), out, out)
        places = self._offsets.row_at, self._offsets.column_at
        self._launch(
            ("decode", len(terms), out.dtype, copy is None, accepted is None),
            components.decode_components,
            view.groups * -(-view.rows // _ROWS) * at.blocks * self._tiles["PARTS"],
            (
                base,
                velocity,
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
            TERMS=len(terms),
            PLACE=self._offsets.kind,
            ROWS=_ROWS,
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

    # ---- what a sender puts into it

    def take_in(self, x: Tensor, terms: tuple[Tensor, ...], flag: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``x`` less the sum of ``terms`` over powers of two, as matrices; zeros if it is not finite.

        Args:
            x: flat, contiguous.
            terms: as many as there are, flat.
            flag: int32 ``[1]``, set to 1 if a residual is not finite.

        Returns:
            float32 ``(G, R, K)``, zeros beyond the channels; sums of the squares of their rows, float32 ``(G, R)``;
            exponents of the powers, int32 ``(G,)``.
        """
        view = self.view
        base, velocity, *_ = (*(term.contiguous() for term in terms), x, x)
        given = x, base, velocity, self._offsets.row_at, self._offsets.column_at
        largest = torch.zeros(view.groups, dtype=torch.int32, device=self._device)
        constants = {"TERMS": len(terms), "PLACE": self._offsets.kind}
        numbers, programs = (view.rows, view.channels, view.numel), view.groups * view.rows
        chunk = min(1024, triton.next_power_of_2(self._count))
        self._launch(
            ("largest", len(terms), x.dtype),
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
            ("take in", len(terms), x.dtype),
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
        room, fit = (
            self._room_for_parts(),
            _Fit(*(self._floats(groups, size) for size in (self._count, 1, self._count))),
        )
        scales, inverses = self._floats(2, groups, rows)
        of_rows = squares[:, None]
        for end in (allotment.FITTED, allotment.CODED):
            self._fit_rows(of_rows, payload, scales, inverses)
            self._powers(turned, inverses, fit.powers)
            self._allot(payload, room, end, *fit)
            if end is allotment.FITTED:
                of_rows = self._weighed_rows(turned, fit.factors)
        choose = self._choose_on_trellis if self.spec.stride else self._choose
        energies, agreements = choose(turned, Allotment(*room[:2]), fit.factors, (scales, inverses), payload)
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
            ROWS=_ROWS,
        )

    def _weighed_rows(self, turned: Tensor, weights: Tensor) -> Tensor:
        """See ``fitting.weigh_rows``; float32 ``(G, parts, R)``."""
        squares = self._floats(self.view.groups, min(_MOST_PARTS, -(-self._count // _COMPONENTS)), self.view.rows)
        parts = squares.shape[1]
        self._launch(
            "weigh rows",
            fitting.weigh_rows,
            self.view.groups * parts * -(-self.view.rows // _ROWS),
            (turned, weights, squares),
            (self.view.rows, self._count, parts),
            COMPONENTS=_COMPONENTS,
            ROWS=_ROWS,
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
        """Write the planes of components; what ``reference.components.choose`` does.

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
        tiles = -(-length // _ROWS)
        sums = self._floats(2, groups, tiles, count)
        self._launch(
            "choose",
            components.choose_components,
            groups * tiles * -(-count // _COMPONENTS),
            (turned, inverses, *rows, payload, *allotment, self._tables.steps, self._levels, *sums),
            (length, count, *self._planes),
            COMPONENTS=_COMPONENTS,
            ROWS=_ROWS,
        )
        energies, agreements = sums
        return energies, agreements

    def _choose_on_trellis(
        self,
        turned: Tensor,
        allotment: Allotment,
        inverses: Tensor,
        rows: tuple[Tensor, Tensor],
        payload: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """As :meth:`_choose`; ``inverses`` are what makes levels."""
        groups, count, length = turned.shape
        lanes = self.spec.stride
        turns, beside = -(-length // lanes), max(1, _COURSES // lanes)
        sums = self._floats(2, groups, 1, count)
        courses = torch.empty(groups * count * turns * lanes, dtype=torch.int32, device=self._device)
        self._launch(
            "choose",
            trellis.choose_on_trellis,
            groups * -(-count // beside),
            (turned, inverses, *rows, payload, *allotment, *self._course_tables, courses, *sums),
            (length, count, turns, *self._planes),
            COMPONENTS=beside,
            LANES=lanes,
        )
        energies, agreements = sums
        return energies, agreements


class _Fit(NamedTuple):
    """Of all components: mean squares, the root of the largest of these, and what follows (``allotment.allot``)."""

    powers: Tensor
    largest: Tensor
    factors: Tensor
