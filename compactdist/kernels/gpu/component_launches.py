"""What both ends of the transform codec launch on a GPU, and what a payload says but for its planes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from compactdist.kernels.gpu import allotment
from compactdist.kernels.gpu.launch import Launch, Slot, run
from compactdist.kernels.gpu.plan import offsets_on
from compactdist.kernels.reference.components import STRIDE
from compactdist.kernels.spec import Allotment, ComponentSpec, ComponentTables, MatrixView

__all__ = ["ROWS", "ComponentLaunches", "Parts"]

ROWS = 64
"""Of a tile."""

_CHUNK = 4096
"""Components that a program goes through at a time."""

_EXACT = {"enable_fp_fusion": False}


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


class ComponentLaunches:
    """Of one end of a stream. Shapes: G groups, M blocks of n channels, K = M n components, R rows, of which R' count.

    Nothing here waits for the device, and no shape follows from a value.

    Args:
        spec: of the codec and view.
        tables: of the codec.
        view: of the stream's flat tensors.
        device: of these tensors.
    """

    def __init__(self, spec: ComponentSpec, tables: ComponentTables, view: MatrixView, device: torch.device) -> None:
        self.spec, self.view = spec, view
        self._tables, self._device = tables, device
        self._levels, self._there = _levels_of(tables.steps, int(spec.stride > 0))
        self._offsets = offsets_on(view, device, look_up_all=True)
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


def _levels_of(tables: Tensor, more: int) -> tuple[Tensor, Tensor]:
    """int8 ``(9, STRIDE)``, by depth and code, which has ``more`` bits; of depth 0 zeros. Which of them there are."""
    levels = tables[:, 1].cumsum(-1)
    codes = torch.arange(STRIDE, device=tables.device)
    there = codes < 2 ** (torch.arange(len(levels), device=tables.device) + more)[:, None]
    there[0] = False
    return torch.where(there, levels, 0.0).to(torch.int8), there
