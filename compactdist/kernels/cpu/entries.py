"""Whole steps, from the first pass to the last; compiled by Numba, and called with one address.

They are the same for all dtypes and kinds: the loops that differ are works, whose addresses lie in the block.
"""

from __future__ import annotations

from typing import Any

from compactdist.kernels.cpu import call
from compactdist.kernels.cpu.call import SIGN
from compactdist.kernels.cpu.checksum import add_rest
from compactdist.kernels.cpu.elements import grain_of, table_of
from compactdist.kernels.cpu.scales import read_channel_scales, read_row_scales, settle_channels, settle_rows
from compactdist.kernels.cpu.simd.elements import Pointer
from compactdist.kernels.cpu.simd.jit import inlined
from compactdist.kernels.cpu.simd.slots import bytes_at, room_at, run

_PAYLOAD = call.PAYLOAD
_OUT = call.OUT
_KIND = call.KIND
_APART = call.APART
_BAD = call.BAD
_CODES_NBYTES = call.CODES_NBYTES
_ROW_SCALES_AT = call.ROW_SCALES_AT
_ROW_SCALE_COUNT = call.ROW_SCALE_COUNT
_CHANNEL_SCALES_AT = call.CHANNEL_SCALES_AT
_SCALE_COUNT = call.SCALE_COUNT
_TOTAL_NBYTES = call.TOTAL_NBYTES
_CHANNELS = call.CHANNELS
_GROUPS = call.GROUPS
_SHARED = call.SHARED
_T_ROOM = call.T_ROOM
_C_ROOM = call.C_ROOM
_FIRST_PASS = call.FIRST_PASS
_FOLD = call.FOLD
_SECOND_PASS = call.SECOND_PASS
_APART_PASS = call.APART_PASS
_SUM = call.SUM


@inlined
def _clear(payload: Pointer, start: int, end: int) -> None:
    for at in range(start, end):
        payload[at] = 0


@inlined
def clear_padding(args: Any) -> None:
    """Write the zeros between and behind the sections of the payload."""
    payload = bytes_at(args, _PAYLOAD)
    _clear(payload, args[_CODES_NBYTES], args[_ROW_SCALES_AT])
    _clear(payload, args[_ROW_SCALES_AT] + args[_ROW_SCALE_COUNT], args[_CHANNEL_SCALES_AT])
    _clear(payload, args[_CHANNEL_SCALES_AT] + 2 * args[_SCALE_COUNT], args[_TOTAL_NBYTES])


def encode_rows() -> Any:
    """Encode with scales by row and channel; 0 to decline."""

    def body(args: Any) -> int:
        clear_padding(args)
        args[_SUM] = 0
        run(args, _FIRST_PASS)
        if not settle_rows(args, grain_of(table_of(args))):
            return 0
        run(args, _FOLD)
        settle_channels(args)
        if args[_KIND] != SIGN or args[_OUT] != 0:
            run(args, _SECOND_PASS)
        if args[_APART] != 0:
            run(args, _APART_PASS)
        add_rest(args)
        return 1

    return body


def encode_blocks() -> Any:
    """Encode with a scale for each block; 0 to decline."""

    def body(args: Any) -> int:
        clear_padding(args)
        args[_SUM] = 0
        args[_BAD] = 0
        run(args, _FIRST_PASS)
        if args[_BAD] != 0:
            return 0
        if args[_APART] != 0:
            run(args, _APART_PASS)
        add_rest(args)
        return 1

    return body


@inlined
def _apply(args: Any) -> None:
    """Apply the codes."""
    if args[_APART] != 0:
        run(args, _APART_PASS)
    run(args, _SECOND_PASS)


def decode_rows() -> Any:
    """Decode with scales by row and channel; 0 to decline."""

    def body(args: Any) -> int:
        repeat = args[_CHANNELS] if args[_SHARED] != 0 else 1
        if not read_channel_scales(args, room_at(args, _C_ROOM), repeat):
            return 0
        read_row_scales(args)
        _apply(args)
        return 1

    return body


def decode_blocks() -> Any:
    """Decode with a scale for each block, which are the rows of one group here; 0 to decline."""

    def body(args: Any) -> int:
        if not read_channel_scales(args, room_at(args, _T_ROOM), 1):
            return 0
        c = room_at(args, _C_ROOM)
        for j in range(args[_CHANNELS]):
            c[j] = 1.0
        _apply(args)
        return 1

    return body


def first_pass() -> Any:
    """Run a work that stands alone."""

    def body(args: Any) -> int:
        run(args, _FIRST_PASS)
        return 1

    return body
