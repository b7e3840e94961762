"""Slots of a block (``call.py``), and the threads that share a loop; compiled by Numba."""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from compactdist.kernels.cpu import call
from compactdist.kernels.cpu.simd.elements import Pointer
from compactdist.kernels.cpu.simd.jit import inlined, intrinsic, types

_i64, _byte = ir.IntType(64), ir.IntType(8)
_BLOCK = types.CPointer(types.int64)
_TAKEN, _WORKERS, _COUNT, _PARTS = call.TAKEN, call.WORKERS, call.COUNT, call.PARTS
_BACKWARDS, _BODY, _ELEMENTS = call.BACKWARDS, call.BODY, call.WORK_ELEMENTS
_PARALLEL_ELEMENTS, _PART_ELEMENTS = call.PARALLEL_ELEMENTS, call.PART_ELEMENTS
_THREADS, _TEAM, _SCRATCH, _OWN_ROOM, _OWN_EACH = call.THREADS, call.TEAM, call.SCRATCH, call.OWN_ROOM, call.OWN_EACH


def _slot(builder: Any, args: Any, slot: Any) -> Any:
    return builder.load(builder.gep(args, [slot]))


def _pointer_of(name: str, element: Any) -> Any:
    """An intrinsic of a block and a slot that holds an address: that of elements of one type."""
    result = types.CPointer(element)

    def pointer(typing_context: Any, args: Any, slot: Any) -> Any:
        def build(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
            return builder.inttoptr(_slot(builder, *arguments), context.get_value_type(result))

        return result(_BLOCK, types.int64), build

    pointer.__name__ = pointer.__qualname__ = name
    return intrinsic(pointer)


floats_at = _pointer_of("floats_at", types.float32)
bytes_at = _pointer_of("bytes_at", types.uint8)
words_at = _pointer_of("words_at", types.uint32)
longs_at = _pointer_of("longs_at", types.int64)
doubles_at = _pointer_of("doubles_at", types.float64)
halves_at = _pointer_of("halves_at", types.uint16)
signed_bytes_at = _pointer_of("signed_bytes_at", types.int8)
_bf16_at = _pointer_of("bf16_at", types.uint16)
_f16_at = _pointer_of("f16_at", types.int16)

ELEMENTS_AT = {"float32": floats_at, "bfloat16": _bf16_at, "float16": _f16_at}
"""By dtype, the intrinsic for elements; their types are those of the bits, see ``memory.py``."""


@intrinsic
def float_in(typing_context: Any, args: Any, slot: Any) -> Any:
    """The float32 whose bits a slot holds."""

    def build(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        return builder.bitcast(builder.trunc(_slot(builder, *arguments), ir.IntType(32)), ir.FloatType())

    return types.float32(_BLOCK, types.int64), build


@intrinsic
def room_at(typing_context: Any, args: Any, slot: Any) -> Any:
    """Float32 in the scratch memory, as far on as a slot says."""

    def build(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        start = builder.inttoptr(_slot(builder, arguments[0], ir.Constant(_i64, _SCRATCH)), ir.FloatType().as_pointer())
        return builder.gep(start, [_slot(builder, *arguments)])

    return types.CPointer(types.float32)(_BLOCK, types.int64), build


@intrinsic
def halves_from(typing_context: Any, pointer: Any, at: Any) -> Any:
    """Bytes from ``at`` on as uint16."""

    def build(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        return builder.bitcast(builder.gep(*arguments[:1], [arguments[1]]), ir.IntType(16).as_pointer())

    return types.CPointer(types.uint16)(types.CPointer(types.uint8), types.int64), build


@intrinsic
def _take(typing_context: Any, args: Any, slot: Any) -> Any:
    """What a slot held before one was added to it."""

    def build(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        return builder.atomic_rmw("add", builder.gep(arguments[0], [arguments[1]]), ir.Constant(_i64, 1), "monotonic")

    return types.int64(_BLOCK, types.int64), build


@inlined
def next_part(args: Any, work: int) -> Any:
    """The bounds of a part of a work that no thread has taken yet; none is left where they are equal."""
    k, parts, count = _take(args, work + _TAKEN), args[work + _PARTS], args[work + _COUNT]
    if k >= parts:
        return 0, 0
    if args[work + _BACKWARDS] != 0:
        k = parts - 1 - k
    return count * k // parts, count * (k + 1) // parts


@inlined
def own_room(args: Any, work: int) -> Pointer:
    """The float32 that belong to this worker alone; to be asked for once in a loop."""
    return shifted_floats(room_at(args, _OWN_ROOM), _take(args, work + _WORKERS) * args[_OWN_EACH])


@intrinsic
def add_to(typing_context: Any, args: Any, slot: Any, value: Any) -> Any:
    """Add to a slot that other threads add to as well, modulo 2**64."""

    def build(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        builder.atomic_rmw("add", builder.gep(arguments[0], [arguments[1]]), arguments[2], "monotonic")
        return context.get_dummy_value()

    return types.void(_BLOCK, types.int64, types.uint64), build


@intrinsic
def shifted_floats(typing_context: Any, pointer: Any, by: Any) -> Any:
    """A pointer to ``by`` float32 further on."""

    def build(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        return builder.gep(arguments[0], [arguments[1]])

    return pointer(pointer, types.int64), build


@intrinsic
def _call(typing_context: Any, body: Any, args: Any) -> Any:
    """Call the loop at an address."""

    def build(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(_i64, [_i64.as_pointer()])
        builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), [arguments[1]])
        return context.get_dummy_value()

    return types.void(types.int64, _BLOCK), build


@intrinsic
def _call_team(typing_context: Any, team: Any, body: Any, args: Any, threads: Any) -> Any:
    """Let a team of threads call the loop at an address, as ``GOMP_parallel`` does; see ``threads.py``."""

    def build(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        team, body, args, threads = arguments
        pointer, number = _byte.as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [pointer, pointer, number, number])
        given = builder.inttoptr(body, pointer), builder.bitcast(args, pointer), builder.trunc(threads, number)
        builder.call(builder.inttoptr(team, kind.as_pointer()), [*given, ir.Constant(number, 0)])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, _BLOCK, types.int64), build


@inlined
def run(args: Any, work: int) -> None:
    """Run a work to its end, on as many threads as there are."""
    count, elements, threads = args[work + _COUNT], args[work + _ELEMENTS], 1
    if elements >= _PARALLEL_ELEMENTS:
        threads = min(args[_THREADS], count)
    args[work + _PARTS] = max(threads, min(count, elements // _PART_ELEMENTS))
    args[work + _TAKEN] = 0
    args[work + _WORKERS] = 0
    if threads > 1:
        _call_team(args[_TEAM], args[work + _BODY], args, threads)
    else:
        _call(args[work + _BODY], args)
