"""Sixty-four lanes as one value: what Numba lacks to keep a whole step in registers, and arithmetic on it.

LLVM takes vectors of any length on every processor and splits them as it must: with AVX-512, 64 float32 are four
registers. Loops over such values are straight lines without stores in between, and no cost model decides about them.

Every operation is the one that the scalar expression would be, rounded by itself: nothing is contracted or reordered.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from llvmlite.binding import get_host_cpu_features

from compactdist.kernels.cpu.simd.jit import (
    AbstractTemplate,
    cgutils,
    config,
    infer_global,
    intrinsic,
    lower_builtin,
    lower_cast,
    models,
    register_model,
    signature,
    types,
)
from compactdist.kernels.reference import LANES

HOST: dict[str, bool] = get_host_cpu_features() if config.CPU_NAME is None else {}
"""What this processor can do, by LLVM's names; nothing is assumed of one that the user names to Numba."""

AVX2 = HOST.get("avx2", False) and not HOST.get("avx512f", False)
"""Registers of eight lanes are all there are, and there are sixteen of them."""

_float, _i32 = ir.FloatType(), ir.IntType(32)


class Vector(types.Type):
    """The type of a vector of ``count`` LLVM values."""

    def __init__(self, name: str, element: Any, count: int) -> None:
        self.of = ir.VectorType(element, count)
        super().__init__(name=f"Vector({name})")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Vector) -> None:
        super().__init__(manager, kind, kind.of)


FLOATS = Vector("floats", _float, LANES)
INTS = Vector("ints", _i32, LANES)
HALVES = Vector("halves", ir.IntType(16), LANES)
MASK = Vector("mask", ir.IntType(1), LANES)
SIXTEEN = Vector("sixteen", _float, 16)
SIXTEEN_BITS = Vector("sixteen bits", ir.IntType(1), 16)
EIGHT = Vector("eight", _float, 8)
EIGHT_INTS = Vector("eight ints", _i32, 8)


def full(value: Any, kind: Any = FLOATS) -> Any:
    """A constant in every lane."""
    return ir.Constant(kind.of, [value] * kind.of.count)


def spread(builder: Any, scalar: Any, kind: Vector) -> Any:
    """A scalar in every lane."""
    one = builder.insert_element(ir.Constant(kind.of, ir.Undefined), scalar, ir.Constant(_i32, 0))
    lanes = ir.Constant(ir.VectorType(_i32, kind.of.count), [0] * kind.of.count)
    return builder.shuffle_vector(one, ir.Constant(kind.of, ir.Undefined), lanes)


def unknown(builder: Any, scalar: Any) -> Any:
    """A scalar, or a vector that fills a register, of which LLVM does not see that it is constant: it would make
    numbers of masks to add them, three instructions for the one that adds under a mask.
    """
    place = "=x,0" if isinstance(scalar.type, ir.VectorType) else "=r,0"
    same = ir.InlineAsm(ir.FunctionType(scalar.type, [scalar.type]), "", place, False)
    return builder.call(same, [scalar], attrs=("readnone", "nounwind"))


@lower_cast(types.float32, FLOATS)
@lower_cast(types.float32, SIXTEEN)
@lower_cast(types.uint32, INTS)
def _to_lanes(context: Any, builder: Any, given: Any, wanted: Any, value: Any) -> Any:
    return spread(builder, value, wanted)


def _operator(symbol: Any, build: Callable[..., Any], *, compares: bool = False) -> None:
    """Give a binary operator a meaning for floats, sixty-four or sixteen, of which one may be a scalar."""
    for kind, mask in ((FLOATS, MASK), (SIXTEEN, SIXTEEN_BITS)):
        _operator_for(symbol, build, kind, mask if compares else kind)


def _operator_for(symbol: Any, build: Callable[..., Any], kind: Vector, result: Vector) -> None:
    @infer_global(symbol)
    class _Typed(AbstractTemplate):
        def generic(self, arguments: Any, keywords: Any) -> Any:
            known = kind in arguments and set(arguments) <= {kind, types.float32}
            return signature(result, kind, kind) if known else None

    @lower_builtin(symbol, kind, kind)
    def _lower(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        return build(builder, *arguments)


_operator(operator.add, lambda b, x, y: b.fadd(x, y))
_operator(operator.iadd, lambda b, x, y: b.fadd(x, y))
_operator(operator.sub, lambda b, x, y: b.fsub(x, y))
_operator(operator.mul, lambda b, x, y: b.fmul(x, y))
_operator(operator.truediv, lambda b, x, y: b.fdiv(x, y))
_operator(operator.gt, lambda b, x, y: b.fcmp_ordered(">", x, y), compares=True)
_operator(operator.lt, lambda b, x, y: b.fcmp_ordered("<", x, y), compares=True)
_operator(operator.ge, lambda b, x, y: b.fcmp_ordered(">=", x, y), compares=True)
_operator(operator.le, lambda b, x, y: b.fcmp_ordered("<=", x, y), compares=True)
_operator(operator.eq, lambda b, x, y: b.fcmp_ordered("==", x, y), compares=True)


def call(builder: Any, name: str, result: Any, *arguments: Any) -> Any:
    """Call one of LLVM's own functions."""
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)


def part(builder: Any, vector: Any, lanes: Any, other: Any = None) -> Any:
    """Some lanes of a vector, or of two one after another, as a vector."""
    lanes = ir.Constant(ir.VectorType(_i32, len(lanes)), list(lanes))
    return builder.shuffle_vector(vector, other or ir.Constant(vector.type, ir.Undefined), lanes)


def joined(builder: Any, parts: list[Any]) -> Any:
    """Vectors one after another, as many as a power of two."""
    while len(parts) > 1:
        every = range(2 * parts[0].type.count)
        parts = [part(builder, a, every, b) for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def by_eights(builder: Any, build: Callable[..., Any], *vectors: Any) -> Any:
    """What ``build`` makes of eight lanes of vectors, for all lanes.

    One register goes through all of it before the next begins, so that few are in use at a time.
    """
    parts = [
        build(*(part(builder, vector, range(at, at + 8)) for vector in vectors))
        for at in range(0, vectors[0].type.count, 8)
    ]
    return joined(builder, parts)


def every_nth(builder: Any, vector: Any, width: int, first: int) -> Any:
    """Half of each integer: of elements of ``width`` bits the ``first`` of every two."""
    # one permutation of two registers where a truncation would take three steps
    count = vector.type.count
    halves = builder.bitcast(vector, ir.VectorType(ir.IntType(width), 2 * count))
    return part(builder, halves, range(first, 2 * count, 2))


@intrinsic
def zeros(typing_context: Any) -> Any:
    """Sixty-four zeros."""
    return FLOATS(), lambda context, builder, sig, arguments: full(0.0)


@intrinsic
def as_floats(typing_context: Any, x: Any) -> Any:
    """A scalar in every lane."""
    return FLOATS(FLOATS), lambda context, builder, sig, arguments: arguments[0]


@intrinsic
def lane_mask(typing_context: Any, count: Any) -> Any:
    """The first ``count`` lanes, int64; all from 64 on."""

    def build(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        return first_lanes(builder, arguments[0], LANES)

    return MASK(types.int64), build


def first_lanes(builder: Any, count: Any, length: int) -> Any:
    """The mask of the first ``count`` of ``length`` lanes."""
    limit, none = ir.Constant(count.type, length), ir.Constant(count.type, 0)
    count = builder.select(builder.icmp_signed("<", count, limit), count, limit)
    count = builder.select(builder.icmp_signed(">", count, none), count, none)
    count = builder.trunc(count, ir.IntType(8))
    lanes = Vector("", ir.IntType(8), length)
    return builder.icmp_unsigned("<", ir.Constant(lanes.of, list(range(length))), spread(builder, count, lanes))


@intrinsic
def magnitude(typing_context: Any, x: Any) -> Any:
    """Absolute values of floats."""

    def build(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        return call(builder, f"llvm.fabs.v{LANES}f32", FLOATS.of, *arguments)

    return FLOATS(FLOATS), build


@intrinsic
def where(typing_context: Any, mask: Any, x: Any, y: Any) -> Any:
    """By lanes of the mask, ``x`` where set, else ``y``; floats, of which one may be a scalar, or ints."""
    kind = INTS if INTS in (x, y) else FLOATS
    return kind(MASK, kind, kind), lambda context, builder, sig, arguments: builder.select(*arguments)


@intrinsic
def folded(typing_context: Any, x: Any) -> Any:
    """The sum of all lanes: upper half onto lower, until one is left, as in the reference."""

    def build(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        return one_of_all(builder, arguments[0], builder.fadd)

    return types.float32(FLOATS), build


def one_of_all(builder: Any, lanes: Any, combine: Callable[[Any, Any], Any]) -> Any:
    """All lanes combined: upper half with lower, until one is left."""
    half = lanes.type.count // 2
    while half:
        lanes = combine(part(builder, lanes, range(half)), part(builder, lanes, range(half, 2 * half)))
        half //= 2
    return builder.extract_element(lanes, ir.Constant(_i32, 0))


@intrinsic
def chosen(typing_context: Any, table: Any, index: Any) -> Any:
    """Elements of a table of 16 at ints below 16."""
    return FLOATS(SIXTEEN, INTS), lambda context, builder, sig, arguments: _chosen(builder, *arguments)


def _chosen(builder: Any, table: Any, index: Any) -> Any:
    out = ir.Constant(FLOATS.of, ir.Undefined)
    if not HOST.get("avx512f", False):
        for lane in range(LANES):
            at = builder.extract_element(index, ir.Constant(_i32, lane))
            out = builder.insert_element(out, builder.extract_element(table, at), ir.Constant(_i32, lane))
        return out
    parts = [
        call(builder, "llvm.x86.avx512.permvar.sf.512", SIXTEEN.of, table, part(builder, index, range(at, at + 16)))
        for at in range(0, LANES, 16)
    ]
    return joined(builder, parts)


@intrinsic(prefer_literal=True)
def level_of(typing_context: Any, levels: Any, codes: Any, bits: Any) -> Any:
    """Levels of codes of so many bits; of sixteen the upper eight are the lower eight with the other sign."""
    width = bits.literal_value

    def build(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        levels, codes, _ = arguments
        if not AVX2:
            return _chosen(builder, levels, codes)
        if width == 2:
            return by_eights(builder, lambda some: _level_of_four(builder, levels, some), codes)
        return by_eights(builder, lambda some: _level_of_sixteen(builder, levels, some), codes)

    return FLOATS(SIXTEEN, INTS, bits), build


def _level_of_four(builder: Any, levels: Any, codes: Any) -> Any:
    twice = part(builder, levels, [0, 1, 2, 3, 0, 1, 2, 3])
    return call(builder, "llvm.x86.avx.vpermilvar.ps.256", EIGHT.of, twice, codes)


def _level_of_sixteen(builder: Any, levels: Any, codes: Any) -> Any:
    # permutations across a whole register are slow, and one finds eight levels: a second one gives way to a sign
    size = call(builder, "llvm.x86.avx2.permps", EIGHT.of, part(builder, levels, range(8)), codes)
    sign = builder.shl(codes, ir.Constant(codes.type, [28] * 8))
    sign = builder.and_(sign, ir.Constant(codes.type, [1 << 31] * 8))
    return builder.bitcast(builder.xor(builder.bitcast(size, codes.type), sign), EIGHT.of)
