"""One element of every run of m, found and put back in one launch each, as ``reference/topk.py`` says, to the bit.

A thread has a run, so nothing is searched across programs and nothing is compacted: every run sends one place and one
value. Of equal magnitudes the lowest place counts, whatever the order in which they are compared.

Arguments that both kernels share:

* ``base``, ``second``, ``base_scales``, ``second_scales``, ``coefficient``, ``TERMS``: as ``elements.expected`` takes
  them; ``out`` may be the memory of ``base`` or ``second``;
* ``places``: uint8, the section of places;
* ``kept``: of the runs, bits of bfloat16 (int16) or float32;
* ``runs``, ``per_group``: of all groups, and of each;
* ``length``, ``total``: elements of a group, and of all groups;
* ``row_at``, ``column_at``, ``channels``, ``numel``, ``PLACE``: as ``codes.in_memory`` takes them;
* ``M``, ``WIDTH``: elements of a run, and the next power of two;
* ``ALIKE``: runs follow one another from group to group;
* ``WHOLE``: of m = 8, the elements of a run are all in memory, side by side, or none is;
* ``UNITS``: of eight runs, in a program.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from compactdist.kernels.gpu import elements
from compactdist.kernels.gpu.codes import in_memory, store_packed
from compactdist.kernels.gpu.elements import (
    F32_MAX,
    INFINITY_BITS,
    add_change,
    bits_of,
    clamped,
    expected,
    from_bits,
    magnitude_bits,
    read,
    write_twice,
)
from compactdist.kernels.gpu.launch import Launch, Slot
from compactdist.kernels.gpu.plan import INTERPRETED, offsets_on
from compactdist.kernels.reference import BF16_MAX_BITS
from compactdist.kernels.sections import padded_nbytes
from compactdist.kernels.spec import MatrixView

__all__ = ["Runs"]

_UNITS = 256 if INTERPRETED else 32
_SMALLEST_BITS = tl.constexpr((127 - 118) << 23)
_BF16_MAX_BITS = tl.constexpr(BF16_MAX_BITS)


@triton.jit
def _elements_of(
    run, runs, per_group, length, total, where, M: tl.constexpr, WIDTH: tl.constexpr, ALIKE: tl.constexpr,
    WHOLE: tl.constexpr, PLACE: tl.constexpr,
):  # fmt: skip
    """Where the elements of runs ``(n, 1)`` lie in memory, and whether they do, ``(n, WIDTH)``."""
    lane = tl.arange(0, WIDTH)[None, :]
    if WHOLE:
        return in_memory(8 * run, lane, (run < runs) & (8 * run < total), 0, where, True, False, PLACE)
    else:
        known = (run < runs) & (lane < M)
        if ALIKE:
            element = run * M + lane
            known = known & (element < total)
        else:
            group = run // per_group
            inside = (run - group * per_group) * M + lane
            element = group * length + inside
            known = known & (inside < length)
        return in_memory(element, lane * 0, known, 0, where, False, False, PLACE)


@triton.jit
def _bf16_of(bits):
    """Bits of a bfloat16, int32, as ``round_signed_bf16`` and ``encode_signed_bf16`` make them of a finite float32."""
    size = bits & 0x7FFFFFFF
    half = (size + 0x7FFF + ((size >> 16) & 1)) >> 16
    half = tl.where(size < _SMALLEST_BITS, 0, tl.minimum(half, _BF16_MAX_BITS))
    return half | tl.where((bits < 0) & (size > 0), 0x8000, 0)


@triton.jit
def pick_of_runs(
    x, base, second, base_scales, second_scales, coefficient,
    out, places, kept, flag, copy, row_at, column_at,
    runs, per_group, length, total, section, kept_count, channels, numel,
    M: tl.constexpr, WIDTH: tl.constexpr, ALIKE: tl.constexpr, WHOLE: tl.constexpr, PLACE: tl.constexpr,
    TERMS: tl.constexpr, WRITES: tl.constexpr, COPIES: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """Places and kept elements of ``8 * UNITS`` runs, and zeros behind the last one.

    Of a run that is not finite 0 is kept, and the flag is set.

    Args:
        section: bytes of the places, alignment included.
        kept_count: numbers of ``kept``, alignment included; not more than ``2 * section``.
        WRITES: write what ``spread_over_runs`` will give to ``out``; COPIES: to ``copy``, too.
    """
    terms = (base, second, base_scales, second_scales, coefficient)
    run = tl.program_id(0) * (8 * UNITS) + tl.arange(0, 8 * UNITS)[:, None]
    lane = tl.arange(0, WIDTH)[None, :]
    where = (channels, 1, 0, channels, numel, row_at, column_at)
    at, there = _elements_of(run, runs, per_group, length, total, where, M, WIDTH, ALIKE, WHOLE, PLACE)
    before = expected(terms, at, there, TERMS)
    value = read(x, at, there) - before
    size = magnitude_bits(value)
    top = tl.max(size, axis=1)[:, None]
    place = tl.min(tl.where(size == top, lane, WIDTH), axis=1)[:, None]
    best = tl.sum(tl.where(lane == place, bits_of(value), 0), axis=1)[:, None]
    best = tl.where(top < INFINITY_BITS, best, 0)
    tl.store(flag, 1, mask=tl.max(tl.max(top, axis=1), axis=0) >= INFINITY_BITS)
    if kept.dtype.element_ty == tl.int16:
        half = _bf16_of(best)
        tl.store(kept + run, half.to(tl.int16), mask=run < kept_count)
        best = half << 16
    else:
        tl.store(kept + run, from_bits(best), mask=run < kept_count)
    if WRITES:
        write_twice(out, copy, at, before + tl.where(lane == place, from_bits(best), 0.0), there, COPIES)
    codes = tl.reshape(place, (UNITS, 8))
    packed = tl.sum(codes << (4 * tl.arange(0, 8)[None, :]), axis=1)
    unit = tl.program_id(0) * UNITS + tl.arange(0, UNITS)[:, None]
    store_packed(places, unit, packed, unit >= 0, section, 4)


@triton.jit
def spread_over_runs(
    base, second, base_scales, second_scales, coefficient,
    out, places, kept, accepted, copy, row_at, column_at,
    runs, per_group, length, total, channels, numel,
    M: tl.constexpr, WIDTH: tl.constexpr, ALIKE: tl.constexpr, WHOLE: tl.constexpr, PLACE: tl.constexpr,
    TERMS: tl.constexpr, CHECKED: tl.constexpr, COPIES: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """What was expected plus the kept elements in their places, of ``8 * UNITS`` runs; a place from m on keeps nothing.

    ``CHECKED`` and ``COPIES`` as for ``elements.add_change``.
    """
    terms = (base, second, base_scales, second_scales, coefficient)
    run = tl.program_id(0) * (8 * UNITS) + tl.arange(0, 8 * UNITS)[:, None]
    where = (channels, 1, 0, channels, numel, row_at, column_at)
    at, there = _elements_of(run, runs, per_group, length, total, where, M, WIDTH, ALIKE, WHOLE, PLACE)
    pair = tl.load(places + run // 2, mask=run < runs, other=0).to(tl.int32)
    place = (pair >> (4 * (run % 2))) & 15
    value = clamped(read(kept, run, run < runs), F32_MAX)
    change = tl.where(tl.arange(0, WIDTH)[None, :] == place, value, 0.0)
    add_change(terms, out, accepted, copy, at, there, change, TERMS, CHECKED, COPIES)


class Runs:
    """Those of a stream's tensors, and the launches that work on them.

    Args:
        view: of its flat tensors.
        m: elements of a run.
        device: of the tensors.

    Attributes:
        count: of all groups.
        section: bytes of the places in the payload, alignment included.
    """

    __slots__ = ("_constants", "_numbers", "_offsets", "_sizes", "count", "section")

    def __init__(self, view: MatrixView, m: int, device: torch.device) -> None:
        length = view.rows * view.channels
        eights = m == 8 and length % 8 == view.numel % 8 == view.channels % 8 == 0
        offsets = offsets_on(view, device, look_up_all=not eights)
        per_group = -(-length // m)
        self.count, self._offsets = view.groups * per_group, offsets
        self.section = padded_nbytes(-(-self.count // 2))
        self._sizes = self.count, per_group, length, view.groups * length
        self._numbers = view.channels, view.numel
        whole = m == 8 and length % 8 == view.numel % 8 == 0 and offsets.kind != elements.SCATTERED.value
        self._constants = {"M": m, "WIDTH": triton.next_power_of_2(m), "WHOLE": whole, "PLACE": offsets.kind}
        self._constants |= {"ALIKE": view.groups == 1 or length % m == 0, "UNITS": _UNITS}
        self._constants |= {"num_warps": 4, "enable_fp_fusion": False}

    def pick(
        self, slots: tuple[Slot, ...], given: int, kept_count: int, terms: int, *, writes: bool, copies: bool
    ) -> Launch:
        """Of ``(x, *terms, out, places, kept, flag, copy)``, in a call that gives so much; see
        ``pick_of_runs``.
        """
        numbers = *self._sizes, self.section, kept_count, *self._numbers
        constants = {"TERMS": terms, "WRITES": writes, "COPIES": copies}
        return self._launch(pick_of_runs, slots, given, numbers, self.section // 4, **constants)

    def spread(self, slots: tuple[Slot, ...], given: int, terms: int, *, checked: bool, copies: bool) -> Launch:
        """Of ``(*terms, out, places, kept, accepted, copy)``; see ``spread_over_runs``."""
        numbers = *self._sizes, *self._numbers
        constants = {"TERMS": terms, "CHECKED": checked, "COPIES": copies}
        return self._launch(spread_over_runs, slots, given, numbers, -(-self.count // 8), **constants)

    def _launch(
        self, kernel: Any, slots: tuple[Slot, ...], given: int, numbers: tuple[int, ...], units: int, **constants: Any
    ) -> Launch:
        arguments = *slots, self._offsets.row_at, self._offsets.column_at, *numbers
        return Launch(kernel, -(-units // _UNITS), arguments, given, {**self._constants, **constants})
