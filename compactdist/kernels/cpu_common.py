"""What the encoding and the decoding half of ``cpu.py`` share: tensors as arrays of bits, and codes packed apart."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compactdist.codecs.scalar.layout import Layout
from compactdist.codecs.scalar.scales import LARGEST_OF_MEAN
from compactdist.kernels.cpu_codes import pack_eights, pack_trits, unpack_eights, unpack_trits
from compactdist.kernels.cpu_settle import E4M3, E5M2, LINEAR, NEAREST, SIGN, TRITS
from compactdist.kernels.places import place_of, place_of_blocks
from compactdist.kernels.threads import spread

if TYPE_CHECKING:
    from compactdist.codecs.scalar.quantized import ScalarQuantizer
    from compactdist.kernels.spec import MatrixView

_BIT_TYPES = {torch.float32: "<f4", torch.bfloat16: "<u2", torch.float16: "<i2", torch.uint8: "|u1"}
_NOTHING: dict[torch.dtype, NDArray[Any]] = {dtype: np.empty(0, kind) for dtype, kind in _BIT_TYPES.items()}

DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))
"""What the loops take."""

_MOST_PLANS = 256
_plans: dict[tuple[int, int], tuple[ScalarQuantizer, MatrixView, Plan | None]] = {}
"""By identity, as equality takes longer; what is held here cannot be something else with the same one."""

_KINDS = {"sign": SIGN, "nearest": NEAREST, "trits": TRITS, "linear": LINEAR, "e4m3": E4M3, "e5m2": E5M2}


class Plan(NamedTuple):
    """What the loops need to know of a codec and a matrix view.

    Attributes:
        layout: of the payload.
        place: a *place*, see ``cpu_loops.py``; rows are blocks where a scale covers one row or less.
        kind: of codes, see ``cpu_settle.py``.
        row_count: rows, or blocks, of all groups.
        bits: width of the codes that the loops write: their own where they fill the bytes of every chunk, else 8.
        apart: codes are packed in a step of its own.
        grain: what magnitudes are multiplied with, a power of two, before borders are looked up.
        borders: between the magnitudes, in grains.
        table: sixteen float32 each: the level of every code of a table codec, zero past the last one; the border from
            each whole number of grains to the next, infinity where there is none; and how many borders there are below
            that number, the bits of an int32.
        bound: see ``settle_channels`` in ``cpu_settle.py``.
    """

    layout: Layout
    place: tuple[Any, ...]
    kind: int
    row_count: int
    bits: int
    apart: bool
    grain: np.float32
    borders: tuple[np.float32, ...]
    table: NDArray[np.float32]
    bound: np.float32


def plan_for(codec: ScalarQuantizer, view: MatrixView) -> Plan | None:
    """The plan, or ``None`` where the loops do not apply: blocks that are not consecutive in memory, or levels that are
    too uneven to be looked up. Worked out once: it is asked for at every step.
    """
    known = _plans.get((id(codec), id(view)))
    if known is None:
        if len(_plans) >= _MOST_PLANS:
            _plans.clear()
        plan = _plan(view, codec.layout_of(view.shape), codec.fused, codec.magnitudes, codec.reach)
        known = _plans[id(codec), id(view)] = codec, view, plan
    return known[2]


@lru_cache(maxsize=64)
def _plan(view: MatrixView, layout: Layout, fused: str, magnitudes: tuple[float, ...], reach: float) -> Plan | None:
    place = place_of_blocks(view, layout.groups, layout.channels) if layout.rows == 1 else place_of(view)
    if place is None:
        return None
    apart = layout.base3 or layout.bits not in (1, 2, 4, 8) or bool(((place.chunk_len * layout.bits) % 8).any())
    grain, borders = _in_grains([np.float32((low + high) / 2) for low, high in pairwise(magnitudes)])
    table, count, levels = np.zeros(48, np.float32), len(magnitudes), np.array(magnitudes, np.float32)
    if fused == "trits":
        table[:3] = levels[0], levels[1], -levels[1]
    else:
        table[:count], table[count : 2 * count] = levels, -levels
    whole = np.array(borders).astype(int)
    if np.unique(whole).size < whole.size:  # two borders in one place of the table: no levels of ours
        return None
    table[16:32] = np.inf
    table[16 + whole] = borders
    table[32:48] = (whole[:, None] < np.arange(16)).sum(0, dtype=np.int32).view(np.float32)
    bound = np.float32(LARGEST_OF_MEAN / magnitudes[0] if fused == "nearest" else reach)
    bits = 8 if apart else layout.bits
    return Plan(layout, tuple(place), _KINDS[fused], place.row_at.size, bits, apart, grain, borders, table, bound)


def _in_grains(borders: list[np.float32]) -> tuple[np.float32, tuple[np.float32, ...]]:
    """The smallest grains of which no border is sixteen, and the borders in them."""
    if not borders:
        return np.float32(1), ()
    grain = np.exp2(np.floor(np.log2(np.nextafter(np.float32(16), np.float32(0)) / borders[-1])), dtype=np.float32)
    return grain, tuple(border * grain for border in borders)


class _Memory:
    """A tensor's memory, for NumPy. The way over ``view`` and ``numpy`` takes five times as long, as it goes through
    code of torch that is in no cache when a step begins.
    """

    __slots__ = ("__array_interface__", "tensor")

    def __init__(self, tensor: Tensor, kind: str) -> None:
        self.tensor = tensor
        place = tensor.data_ptr(), False
        self.__array_interface__ = {"data": place, "shape": (tensor.numel(),), "typestr": kind, "version": 3}


def bits_of(x: Tensor | None, dtype: torch.dtype) -> NDArray[Any]:
    """A flat tensor on the CPU as the array of bits the loops take; an empty one for none or nothing."""
    if x is None or not x.numel():
        return _NOTHING[dtype]
    array: NDArray[Any] = np.asarray(_Memory(x if x.is_contiguous() else x.detach().contiguous(), _BIT_TYPES[dtype]))
    return array


def expectation(terms: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[NDArray[Any], NDArray[Any], int]:
    """Base and velocity as bits, and how many of them there are."""
    base = bits_of(terms[0], dtype) if terms else _NOTHING[dtype]
    return base, bits_of(terms[1], dtype) if len(terms) > 1 else _NOTHING[dtype], len(terms)


def pack_apart(codec: ScalarQuantizer, codes: NDArray[np.uint8], packed: NDArray[np.uint8]) -> None:
    """Pack codes that do not fill the bytes of every chunk, once all are there."""
    if codec.base3:
        spread(lambda parts: pack_trits(codes, parts, packed), packed.size, codes.size)
    else:
        spread(lambda parts: pack_eights(codes, codec.bits, parts, packed), -(-codes.size // 8), codes.size)


def unpack_apart(codec: ScalarQuantizer, packed: NDArray[np.uint8], count: int) -> NDArray[np.uint8]:
    """Undo ``pack_apart``: ``count`` codes, one to a byte."""
    codes = np.empty(count, np.uint8)
    if codec.base3:
        spread(lambda parts: unpack_trits(packed, parts, codes), packed.size, count)
    else:
        spread(lambda parts: unpack_eights(packed, codec.bits, parts, codes), -(-count // 8), count)
    return codes
