"""Fused steps of the low-rank codecs: twelve launches encode, one decodes, and the host reads nothing.

From x and terms: ``take_residual``; three times ``sketch_rows``, between which ``turn_back`` improves the directions
(the second round ends at once where the stream remembers some of a large matrix); ``sort_directions``, ``fit_left``,
``measure_along`` and ``fit_right`` make the factors; ``compare_product`` sums up what the gain follows from, and
``write_product`` writes the payload and the new base. A CPU would choose other factors, and decodes these to the same
bytes.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from compactdist.kernels.gpu import lowrank, subspace
from compactdist.kernels.gpu.launch import Launch, Slot
from compactdist.kernels.gpu.launched import DECODING, ENCODING, TO_DECODE, TO_ENCODE, Cut, LaunchedSteps, Own
from compactdist.kernels.gpu.plan import INTERPRETED, MOST_ELEMENTS, floats_of, offsets_on, table_of
from compactdist.kernels.gpu.steps import EXACT, can_run
from compactdist.kernels.sections import padded_nbytes
from compactdist.kernels.spec import FactorSpec, MatrixView

__all__ = ["LowRankSteps", "Sizes", "steps_of"]

_ROWS, _WIDTH = 64, 128  # of a tile of the product
_TAKEN_ROWS = 64 if INTERPRETED else 8
_SKETCHED, _ALONG, _INNER = 64, 32, 64  # rows, or channels, of a program that multiplies; of one step of its sums
_SKETCHES, _COMPARISONS = 64, 1024  # programs of a group, at most: each leaves sums that all later ones add up
_BYTES = 1024
_SWEEPS, _REFITS = 4, 5
_MOST_DIRECTIONS, _LONGEST = 128, 32768
_LARGE = 1 << 18
"""Elements of a matrix from which on it is multiplied as bfloat16, and remembered directions take one round."""


class _Scratch(NamedTuple):
    """Memory of an encoding, float32, as the kernels describe it."""

    matrix: Any
    largest: Any
    start: Any
    sketch: Any
    grams: Any
    matrices: Any
    basis: Any
    turns: Any
    left: Any
    left_codes: Any
    left_scales: Any
    inverses: Any
    right: Any
    right_codes: Any
    right_scales: Any
    sums: Any


class Sizes:
    """Of one stream: what all launches are told.

    Args:
        view: of its flat tensors.
        spec: of the codec.

    Attributes:
        rank: components of a group.
        count, kept: directions looked for, and remembered.
        p, r: at least ``count`` and ``rank``, powers of two.
        n: rows that Jacobi's rotations take.
        large: see ``_LARGE``.
        tiles: of rows, that ``take_residual`` takes.
        sketches, comparisons: programs of a group.
        u_scales_at, v_scales_at: in the factors' sections.
        u_at, v_at, nbytes: sections, and all, of the payload.
    """

    def __init__(self, view: MatrixView, spec: FactorSpec) -> None:
        groups, rows, channels = view.shape
        self.rank = rank = min(spec.rank, rows, channels)
        self.count = min(max(2 * rank, rank + 4), rows, channels)
        self.kept = max(1, self.count - max(2, rank // 2))
        self.p = max(16, triton.next_power_of_2(self.count))
        self.r = max(16, triton.next_power_of_2(rank))
        self.n = max(4, self.count + self.count % 2)
        self.large = rows * channels >= _LARGE
        self.tiles = -(-rows // _TAKEN_ROWS)
        self.sketches = min(-(-rows // _SKETCHED), _SKETCHES)
        self.comparisons = min(-(-rows // _ROWS) * -(-channels // _WIDTH), _COMPARISONS)
        components = groups * rank
        self.u_at = padded_nbytes(2 * groups)
        self.u_scales_at, length = self._section(components, rows, spec)
        self.v_at = self.u_at + length
        self.v_scales_at, length = self._section(components, channels, spec)
        self.nbytes = self.v_at + length

    @staticmethod
    def _section(components: int, length: int, spec: FactorSpec) -> tuple[int, int]:
        """Where scales begin in a factor's section, and its bytes."""
        if not spec.magnitudes:
            nbytes = padded_nbytes(2 * components * length)
            return nbytes, nbytes
        scales_at = padded_nbytes(-(-components * length // 2))
        return scales_at, scales_at + padded_nbytes(2 * components)

    def scratch(self, view: MatrixView, fours: bool) -> _Scratch:
        """How many float32 each part has, a multiple of 4."""
        groups, rows, channels = view.shape
        directions, elements = groups * self.p, groups * rows * channels
        factors = [(directions * length, directions * length if fours else 0) for length in (rows, channels)]
        sizes = (
            -(-elements // 2) if self.large else elements, groups * self.tiles, directions * channels,
            directions * rows, 2 * directions * self.p * self.sketches, 2 * groups * self.n**2, 2 * groups * self.n**2,
            directions * self.p, *factors[0], directions, groups * self.r**2, *factors[1], directions,
            2 * groups * self.comparisons,
        )  # fmt: skip
        return _Scratch(*(-(-size // 4) * 4 for size in sizes))


def steps_of(spec: FactorSpec, view: MatrixView, dtype: torch.dtype, device: torch.device) -> LowRankSteps | None:
    """The steps of one stream; ``None`` where there are no kernels for its device, dtype, rank or size.

    Args:
        spec: of the codec.
        view: of its flat tensors.
        dtype: of its tensors.
        device: of its tensors.
    """
    if not can_run(dtype, device) or not view.numel:
        return None
    sizes = Sizes(view, spec)
    largest = max(view.groups * view.rows * view.channels, *sizes.scratch(view, fours=True))
    if sizes.p > _MOST_DIRECTIONS or max(view.rows, view.channels) > _LONGEST or largest > MOST_ELEMENTS:
        return None
    return LowRankSteps(spec, sizes, view, dtype, device)


@lru_cache(maxsize=8)
def _table_of(magnitudes: tuple[float, ...], device: torch.device) -> Tensor:
    table = table_of(magnitudes)
    assert table is not None
    return torch.tensor(table, dtype=torch.float32, device=device)


_SCRATCH = _Scratch(*map(Slot, range(ENCODING, ENCODING + len(_Scratch._fields))))
_HELD, _CALLS, _NEXT_HELD, _NEXT_CALLS = (Slot(ENCODING + len(_Scratch._fields) + number) for number in range(4))
_GIVEN = ENCODING + len(_Scratch._fields) + 4


class LowRankSteps(LaunchedSteps):
    """The steps of one stream, see ``kernels.DeviceSteps``; :meth:`commit` after an encoding whose frame is sent.

    Args:
        spec: of the codec.
        sizes: of the stream.
        view: of its flat tensors.
        dtype: of its tensors.
        device: of its tensors.

    Attributes:
        memory: of the sender: directions and their calls, as the next encoding finds them, then room for those that it
            leaves; bits of bfloat16, int16 ``(G, kept, C)``, and int32 ``(G,)``. Empty before the first encoding.
    """

    __slots__ = ("_encoded", "_form", "_offsets", "_room", "_sizes", "_table", "_view", "memory")

    def __init__(
        self, spec: FactorSpec, sizes: Sizes, view: MatrixView, dtype: torch.dtype, device: torch.device
    ) -> None:
        u_scales, v_scales = sizes.u_at + sizes.u_scales_at, sizes.v_at + sizes.v_scales_at
        fours = bool(spec.magnitudes)
        starts = (0, sizes.u_at, u_scales, sizes.v_at, v_scales) if fours else (0, sizes.u_at, 0, sizes.v_at, 0)
        coded = torch.uint8 if fours else torch.int16
        dtypes = torch.int16, coded, torch.int16, coded, torch.int16
        super().__init__(dtype, device, sizes.nbytes, tuple(map(Cut, starts, dtypes)))
        self._form = lowrank.FOURS.value if fours else lowrank.HALVES.value
        self._sizes, self._view = sizes, view
        self._table = _table_of(spec.magnitudes, device)
        self._offsets = offsets_on(view, device, look_up_all=True)
        self._room = tuple(sizes.scratch(view, fours))
        self.memory: tuple[Tensor, ...] = ()
        self._encoded = False

    def commit(self) -> None:
        """Begin the next search with what the last encoding found."""
        if self._encoded:
            self.memory, self._encoded = self.memory[2:] + self.memory[:2], False

    def rollback(self) -> None:
        """Begin the next search where the last encoding began its own."""
        self._encoded = False

    def to_encode(self, stream: int | None, lockstep: bool) -> Own:
        if not self.memory:
            view, kept = self._view, self._sizes.kept
            with torch.inference_mode(False):  # or it could not be written to outside of the mode it was made in
                self.memory = tuple(
                    torch.zeros(shape, dtype=dtype, device=self._device)
                    for _ in range(2)
                    for shape, dtype in (
                        ((view.groups, kept, view.channels), torch.int16),
                        ((view.groups,), torch.int32),
                    )
                )
        self._encoded = True
        scratch, pointers = floats_of(self._room, self._device, stream)
        held = [tensor.data_ptr() for tensor in self.memory]
        return Own((*scratch, *self.memory), (*pointers, *held))

    def decoding(self, terms: int, checked: bool, copies: bool) -> list[Launch]:
        terms_of, out, _, accepted, copy = TO_DECODE
        sections = map(Slot, range(DECODING, DECODING + 5))
        arguments = (
            *terms_of, out, accepted, copy, *sections, self._table, *self._places, self._sizes.rank,
            self._view.rows, self._view.channels, self._view.numel,
        )  # fmt: skip
        constants = {"TERMS": terms, "CHECKED": checked, "COPIES": copies, "FORM": self._form, **self._tile}
        return [Launch(lowrank.decode_product, self._tiles, arguments, DECODING + 5, constants)]

    def encoding(self, terms: int, writes: bool, copies: bool, lockstep: bool) -> list[Launch]:
        return [
            self._take(terms),
            self._sketch(begins=True),
            self._turn(again=False),
            self._sketch(again=self._sizes.large),
            self._turn(again=self._sizes.large),
            self._sketch(last=True),
            *self._factors(),
            *self._product(terms, writes, copies),
        ]

    @property
    def _places(self) -> tuple[Tensor, Tensor]:
        return self._offsets.row_at, self._offsets.column_at

    @property
    def _tiles(self) -> int:
        """Of the product, in all groups."""
        return self._view.groups * -(-self._view.rows // _ROWS) * -(-self._view.channels // _WIDTH)

    @property
    def _tile(self) -> dict[str, Any]:
        return {"PLACE": self._offsets.kind, "ROWS": _ROWS, "WIDTH": _WIDTH, "num_warps": 8, **EXACT}

    @property
    def _search(self) -> dict[str, Any]:
        """What the kernels that multiply with the matrix share."""
        precision = "tf32" if self._sizes.large else "ieee"
        half = {"HALF": self._sizes.large, "PRECISION": precision, "P": self._sizes.p}
        return {**half, "TILES": triton.next_power_of_2(self._sizes.tiles), "num_warps": 8, **EXACT}

    def _encode(self, kernel: Any, programs: int, arguments: tuple[Any, ...], constants: dict[str, Any]) -> Launch:
        return Launch(kernel, programs, arguments, _GIVEN + len(self.cuts), constants)

    def _take(self, terms: int) -> Launch:
        view, at = self._view, _SCRATCH
        arguments = TO_ENCODE.x, *TO_ENCODE.terms, at.matrix, at.largest, TO_ENCODE.flag, *self._places
        constants = {**self._tile, "TERMS": terms, "HALF": self._sizes.large, "ROWS": _TAKEN_ROWS, "WIDTH": 256}
        numbers = view.rows, view.channels, view.numel
        return self._encode(lowrank.take_residual, view.groups * self._sizes.tiles, (*arguments, *numbers), constants)

    def _sketch(self, *, begins: bool = False, again: bool = False, last: bool = False) -> Launch:
        view, sizes, at = self._view, self._sizes, _SCRATCH
        arguments = (
            at.matrix, at.largest, at.start, _HELD, _CALLS, at.sketch, at.grams, view.rows, view.channels,
            sizes.count, sizes.kept, sizes.tiles, sizes.sketches,
        )  # fmt: skip
        constants = {"BEGINS": begins, "AGAIN": again, "LAST": last, "ROWS": _SKETCHED, "WIDTH": _INNER, **self._search}
        return self._encode(subspace.sketch_rows, view.groups * sizes.sketches, arguments, constants)

    def _turn(self, *, again: bool) -> Launch:
        view, sizes, at = self._view, self._sizes, _SCRATCH
        arguments = (
            at.matrix, at.largest, at.grams, at.sketch, _CALLS, at.start, view.rows, view.channels, sizes.count,
            sizes.tiles, sizes.sketches,
        )  # fmt: skip
        constants = {"AGAIN": again, "ROWS": _INNER, "WIDTH": _ALONG, **self._search}
        return self._encode(subspace.turn_back, view.groups * -(-view.channels // _ALONG), arguments, constants)

    def _factors(self) -> list[Launch]:
        """From a sketch and the Gram matrices of its rows to both factors as they will be sent."""
        view, sizes, at, table = self._view, self._sizes, _SCRATCH, self._table
        p, tiles = {"P": sizes.p}, self._search["TILES"]
        warps = 16 if sizes.p >= 64 else 4
        sorting = {**p, "SWEEPS": _SWEEPS, "ROWS": min(sizes.p, 8192 // sizes.p), "num_warps": warps, **EXACT}
        sorted_of = at.grams, at.matrices, at.basis, at.turns, sizes.count, sizes.n, sizes.sketches, view.groups
        fitting = {**p, "FORM": self._form, "REFITS": _REFITS, "num_warps": 8, **EXACT}
        left_of = (
            at.turns, at.sketch, at.left, at.left_codes, at.left_scales, table, view.rows, sizes.count, sizes.rank
        )  # fmt: skip
        along_of = (
            at.matrix, at.largest, at.left, at.start, at.inverses, view.rows, view.channels, sizes.count, sizes.rank,
            sizes.tiles,
        )  # fmt: skip
        right_of = (
            at.inverses, at.start, at.right, at.right_codes, at.right_scales, table, at.largest, _CALLS, _NEXT_HELD,
            _NEXT_CALLS, view.channels, sizes.count, sizes.rank, sizes.kept, sizes.tiles,
        )  # fmt: skip
        programs, parts = view.groups * sizes.count, -(-view.channels // _ALONG)
        r, rows, channels = {"R": sizes.r}, _block(view.rows), _block(view.channels)
        noise = 2.0**-16 if sizes.large else 1e-7
        return [
            self._encode(subspace.sort_directions, view.groups, (*sorted_of, noise), sorting),
            self._encode(subspace.fit_left, programs, left_of, {**fitting, "LENGTH": rows}),
            self._encode(
                subspace.measure_along, view.groups * (parts + 1), along_of,
                {**r, "ROWS": _INNER, "WIDTH": _ALONG, **self._search},
            ),
            self._encode(
                subspace.fit_right, programs, right_of, {**fitting, **r, "LENGTH": channels, "TILES": tiles}
            ),
        ]  # fmt: skip

    def _product(self, terms: int, writes: bool, copies: bool) -> list[Launch]:
        """The gain, the payload and the new base."""
        view, sizes, at = self._view, self._sizes, _SCRATCH
        constants = {**self._tile, "TERMS": terms, "TILES": self._search["TILES"]}
        size = sizes.rank, sizes.p, view.rows, view.channels, view.numel, sizes.tiles, sizes.comparisons
        compared = TO_ENCODE.x, *TO_ENCODE.terms, at.left, at.right, at.largest, at.sums, *self._places, *size
        packs = -(-sizes.nbytes // _BYTES)
        written = (
            *TO_ENCODE.terms, TO_ENCODE.out, TO_ENCODE.copy, TO_ENCODE.payload, at.left, at.left_codes, at.left_scales,
            at.right, at.right_codes, at.right_scales, at.largest, at.sums, *self._places, view.groups, *size, packs,
            sizes.u_at, sizes.u_scales_at, sizes.v_at, sizes.v_scales_at, sizes.nbytes,
        )  # fmt: skip
        own = {"FORM": self._form, "PROGRAMS": triton.next_power_of_2(sizes.comparisons), "BYTES": _BYTES}
        own["COPIES"] = copies
        programs = packs + (self._tiles if writes else 0)
        return [
            self._encode(lowrank.compare_product, view.groups * sizes.comparisons, compared, constants),
            self._encode(lowrank.write_product, programs, written, {**constants, **own}),
        ]


def _block(length: int) -> int:
    return max(16, 1 << (length - 1).bit_length())
