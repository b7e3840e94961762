"""Steps on sixty-four elements at a time, from which the loops are made; compiled by Numba.

A *source* is ``(x, base, velocity, terms, factor)``: pointers, of which the first ``1 + terms`` are good, and what
``call.py`` says of terms. Elements from ``have`` on are not there: they count as zero and are not written. ``have`` may
be negative.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir

from compactdist.kernels.cpu import call
from compactdist.kernels.cpu.call import E4M3, LINEAR, SIGN
from compactdist.kernels.cpu.simd.elements import Pointer
from compactdist.kernels.cpu.simd.float8 import float8_codes, float8_levels
from compactdist.kernels.cpu.simd.ints import (
    as_whole_floats,
    bins_of,
    bits_of,
    borders_below,
    nearest_ints,
    raised,
    signed_floats,
    with_sign,
)
from compactdist.kernels.cpu.simd.jit import inlined, intrinsic, signature, types
from compactdist.kernels.cpu.simd.memory import (
    load_first,
    prefetch,
    prefetch_aside,
    rounded_for,
    sixteen_at,
    store_first,
    stream,
    velocity_for,
)
from compactdist.kernels.cpu.simd.packing import codes_at, signed_by
from compactdist.kernels.cpu.simd.slots import bytes_at, float_in, floats_at, halves_at, signed_bytes_at
from compactdist.kernels.cpu.simd.vectors import HOST, chosen, level_of, magnitude, zeros
from compactdist.kernels.reference import LANES

_u32, _f32 = np.uint32, np.float32

AHEAD = 2048
"""Elements between those that are computed and those that are asked for; measured, and anything near does."""
_SEARCHES = HOST.get("avx512f", False)


_X, _BASE, _VELOCITY, _TERMS, _TABLE = call.X, call.BASE, call.VELOCITY, call.TERMS, call.TABLE
_BORDERS, _GRAIN, _BOUND = call.BORDERS, call.GRAIN, call.BOUND
_FACTOR, _SECOND, _SECOND_SCALES = call.FACTOR, call.SECOND, call.SECOND_SCALES
_OUT, _OUT_STREAMS, _COPY, _COPY_STREAMS = call.OUT, call.OUT_STREAMS, call.COPY, call.COPY_STREAMS


@inlined
def source_of(args: Any, elements_at: Any) -> Any:
    """The source of a block with any number of terms."""
    x, base, velocity = elements_at(args, _X), elements_at(args, _BASE), elements_at(args, _VELOCITY)
    return x, base, velocity, args[_TERMS], float_in(args, _FACTOR)


@inlined
def _source_of_one(args: Any, elements_at: Any) -> Any:
    x = elements_at(args, _X)
    return x, elements_at(args, _BASE), x, 1, _f32(0)


def _sources_in(codes_at: Any) -> tuple[Any, Any]:
    """The sources of one term in eight bits and of two, whose codes ``codes_at`` gives."""

    @inlined
    def source_of_rounded(args: Any, elements_at: Any) -> Any:
        x = elements_at(args, _X)
        return x, (codes_at(args, _BASE), halves_at(args, _VELOCITY), x), x, 1, _f32(0)

    @inlined
    def source_of_two(args: Any, elements_at: Any) -> Any:
        x = elements_at(args, _X)
        base = codes_at(args, _BASE), halves_at(args, _VELOCITY), x
        second = codes_at(args, _SECOND), halves_at(args, _SECOND_SCALES), x
        return x, base, second, args[_TERMS], float_in(args, _FACTOR)

    return source_of_rounded, source_of_two


_source_of_int8, _source_of_two_int8 = _sources_in(signed_bytes_at)
_source_of_fp8, _source_of_two_fp8 = _sources_in(bytes_at)

SOURCES = (source_of, _source_of_one, _source_of_int8, _source_of_fp8, _source_of_two_int8, _source_of_two_fp8)
"""By what terms a loop is compiled for, see ``call.py``."""


@inlined
def table_of(args: Any) -> Pointer:
    """The table of a block: what is in it says ``call.py``."""
    return floats_at(args, _TABLE)


@inlined
def grain_of(table: Pointer) -> Any:
    """What magnitudes are multiplied with before borders are looked up."""
    return table[_GRAIN]


@inlined
def bound_of(table: Pointer) -> Any:
    """What holds a scale, or the level of the largest code."""
    return table[_BOUND]


@intrinsic(prefer_literal=True)
def floats_from(typing_context: Any, pointer: Any, at: Any, count: Any) -> Any:
    """So many float32 from ``at`` on as a tuple, so that a search among them is unrolled."""
    result = types.UniTuple(types.float32, count.literal_value)

    def build(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        pointer, at, _ = arguments
        places = [builder.add(at, ir.Constant(at.type, k)) for k in range(result.count)]
        values = [builder.load(builder.gep(pointer, [place])) for place in places]
        return context.make_tuple(builder, result, values)

    return signature(result, types.CPointer(types.float32), types.int64, count), build


@inlined
def expected_at(source: Any, at: int, have: int) -> Any:
    """What was expected: the sum of those of base and velocity that are there."""
    x, base, velocity, terms, factor = source
    if terms == 0:
        return zeros()
    one = load_first(base, at, have)
    if terms > 1:
        two = load_first(velocity, at, have)
        if terms > 2:
            two = velocity_for(x, one, two, factor)
        one = one + two
    return one


@inlined
def residual_at(source: Any, at: int, have: int) -> Any:
    """``x`` less what was expected."""
    return load_first(source[0], at, have) - expected_at(source, at, have)


@inlined
def ask_for_expected(source: Any, at: int) -> None:
    """Ask for elements of base and velocity that are about to be needed, so that memory does not rest."""
    _, base, velocity, terms, _ = source
    if terms:
        prefetch(base, at)
    if terms > 1:
        prefetch(velocity, at)


@inlined
def ask_for(source: Any, at: int) -> None:
    """The same, and for those of ``x``."""
    prefetch(source[0], at)
    ask_for_expected(source, at)


@inlined
def ask_early(source: Any, at: int) -> None:
    """The same where a row is read twice before these elements are reached: they wait in the second cache."""
    x, base, velocity, terms, _ = source
    prefetch_aside(x, at)
    if terms:
        prefetch_aside(base, at)
    if terms > 1:
        prefetch_aside(velocity, at)


@inlined
def target_of(args: Any, elements_at: Any) -> Any:
    """Where a block says that values go, as ``put_twice`` takes it."""
    copies, copy, copy_streams = args[_COPY] != 0, elements_at(args, _COPY), args[_COPY_STREAMS] != 0
    return elements_at(args, _OUT), args[_OUT_STREAMS] != 0, copies, copy, copy_streams


@inlined
def put(expected: Any, change: Any, target: Any, at: int, have: int) -> None:
    """``out = expected + change``, rounded and kept finite.

    A *target* is ``(out, streams)``: whether ``out`` begins a cache line and is written past the caches.
    """
    out, streams = target
    write(rounded_for(out, expected + change), out, streams, at, have)


@inlined
def put_twice(expected: Any, change: Any, target: Any, at: int, have: int) -> None:
    """As ``put``, and the same values to a copy. A target is ``(out, streams, copies, copy, copy_streams)``."""
    out, streams, copies, copy, copy_streams = target
    value = rounded_for(out, expected + change)
    write(value, out, streams, at, have)
    if copies:
        write(value, copy, copy_streams, at, have)


@inlined
def write(value: Any, out: Pointer, streams: Any, at: int, have: int) -> None:
    """What ``rounded_for`` made for ``out``; ``streams`` as of a target."""
    if have >= LANES and streams and at % LANES == 0:
        stream(value, out, at)
    else:
        store_first(value, out, at, have)


@inlined
def search_of(borders: Any, tables: Pointer) -> Any:
    """What ``nearest_codes`` takes; ``tables`` as ``plan.py`` makes them."""
    return borders, sixteen_at(tables, 16), sixteen_at(tables, 32)


@inlined
def nearest_codes(value: Any, u: Any, search: Any, trits: bool) -> Any:
    """How many borders lie below ``u``, the magnitude in grains, and the sign: the bit above, or for trits 2 for 1."""
    borders, border_in, count_below = search
    if len(borders) > 2 and _SEARCHES:
        bins = bins_of(u)
        index = bits_of(chosen(count_below, bins))
        index = raised(index, u > chosen(border_in, bins), _u32(1))
    else:
        index = borders_below(u, borders)
    if trits:
        return raised(index, value < _f32(0), index)
    if len(borders) == 7:
        return with_sign(index, value, 8)
    if len(borders) == 3:
        return with_sign(index, value, 4)
    return with_sign(index, value, 2) if len(borders) == 1 else raised(index, value < _f32(0), _u32(len(borders) + 1))


@inlined
def nearest_float8(kind: int, u: Any, below: Any) -> Any:
    """The nearest float8 of ``u``, with the sign where ``below``."""
    codes = float8_codes(u, 3, 0x7E) if kind == E4M3 else float8_codes(u, 2, 0x7B)
    return raised(codes, below, _u32(0x80))


@inlined
def change_by_float8(kind: int, scale: Any, codes: Any) -> Any:
    """What the receiver adds for a float8."""
    levels = float8_levels(codes, 3, 0x7E) if kind == E4M3 else float8_levels(codes, 2, 0x7B)
    return scale * levels


@inlined
def reaching(kind: int, u: Any, below: Any, scale: Any) -> Any:
    """Codes of a kind from ``LINEAR`` on for values ``u``, in units of their scales, and what the receiver adds.

    ``below`` tells negative values, also those that ``u`` has rounded to zero.
    """
    if kind == LINEAR:
        # scales are rounded up, so that nothing is nearer to an integer beyond the largest
        whole = nearest_ints(u)
        return whole, scale * as_whole_floats(whole)
    codes = nearest_float8(kind, magnitude(u), below)
    return codes, change_by_float8(kind, scale, codes)


@inlined
def change_of(kind: int, scale: Any, packed: Pointer, bits: int, table: Any, element: int, count: int) -> Any:
    """What the receiver adds: for a bit, for a byte in two's complement or a float8, or for a code of a table."""
    if kind == SIGN:
        return signed_by(scale, packed, element, count)
    if kind == LINEAR:
        return scale * signed_floats(codes_at(packed, 8, element, count))
    if kind > LINEAR:
        return change_by_float8(kind, scale, codes_at(packed, 8, element, count))
    return scale * level_of(table, codes_at(packed, bits, element, count), bits)
