"""Frames that are sealed and checked on the device: the host knows every size and never looks at a value.

One launch at each end: all programs add up the payload's checksum (``reference/checksum.py``), the last one to come
makes the header of the frame from it. The sender writes that header, the receiver compares it with the one that
arrived. The digest of a stream's history stays on the device, in the stream's clock (``spec.CLOCK_WORDS``): each
frame reads one of its two digests and writes the other, so that a frame that is not sent leaves the digest as it was. A
launch is told step, epoch and sequence. One that a CUDA graph captures is told none of them: it reads the clock, which
every frame moves on, so that a replay is the next frame.

What goes wrong is written to the group's board (``spec.BOARD_WORDS``), and only the first of it.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import threading
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from compactdist.kernels.gpu.launch import Launch, Slot, alignment_of, stream_getter
from compactdist.kernels.gpu.plan import INTERPRETED
from compactdist.kernels.spec import (
    CHECKSUM_WEIGHT,
    DIGEST_FACTOR,
    ENDED,
    ENDED_CLOCK,
    FROM_CLOCK,
    FROM_HOST,
    HEAD_WORDS,
    NOT_FINITE,
    REFUSED,
    STEP_WORD,
    TURN_WORD,
    HeadPlaces,
)

__all__ = ["CHANGING", "FrameKernels", "changing_of", "sums_of"]

_WEIGHT = tl.constexpr(CHECKSUM_WEIGHT)
_FACTOR = tl.constexpr(DIGEST_FACTOR - (1 << 64))
_HEAD = tl.constexpr(HEAD_WORDS)
_NOT_FINITE, _REFUSED, _ENDED_CLOCK = map(tl.constexpr, (NOT_FINITE, REFUSED, ENDED_CLOCK))
_STEP, _TURN = tl.constexpr(STEP_WORD), tl.constexpr(TURN_WORD)
_FROM_HOST, _FROM_CLOCK, _ENDED = map(tl.constexpr, (FROM_HOST, FROM_CLOCK, ENDED))
_WORDS = 16384 if INTERPRETED else 2048
_here = threading.local()


@triton.jit
def weighed(words, at):
    """int64 products of 32-bit words and the weights of their positions."""
    weights = (2 * at + 1).to(tl.uint32) * _WEIGHT
    return words.to(tl.uint32, bitcast=True).to(tl.int64) * weights.to(tl.uint32).to(tl.int64)


@triton.jit
def added(payload, count, sums, WORDS: tl.constexpr):
    """Add this program's words to the payload's checksum; whether it is the last program to do so."""
    at = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    words = tl.load(payload + at, mask=at < count, other=0)
    tl.atomic_add(sums, tl.sum(weighed(words, at), 0))
    before = tl.atomic_add(sums + 1, tl.full((), 1, tl.int64))
    return before == tl.num_programs(0) - 1


@triton.jit
def taken(sums):
    """The checksum; the sums are zero again for the next frame."""
    tl.atomic_xchg(sums + 1, tl.full((), 0, tl.int64))
    return tl.atomic_xchg(sums, tl.full((), 0, tl.int64))


@triton.jit
def joined(low, high):
    """An int64 of two int32."""
    return (high.to(tl.int64) << 32) | (low.to(tl.int64) & 0xFFFFFFFF)


@triton.jit
def due(clock, step, epoch, sequence, source):
    """Step, epoch, sequence and source of the frame: as given or, where ``source`` says so, as the clock has them."""
    asked = source == _FROM_CLOCK
    when, turn = tl.load(clock + _STEP), tl.load(clock + _TURN)
    step = tl.where(asked, when.to(tl.int32), step)
    epoch = tl.where(asked, (when >> 32).to(tl.int32), epoch)
    sequence = tl.where(asked, turn.to(tl.int32), sequence)
    return step, epoch, sequence, tl.where(asked, (turn >> 32).to(tl.int32), source), asked


@triton.jit
def move_on(clock, digest, step, epoch, sequence, source):
    """Let the clock say what the next frame is, which is made against ``digest``."""
    written = tl.where(source == 0, 1, 0)
    tl.store(clock + written, digest)
    tl.store(clock + _STEP, joined(step + tl.where(step < 0, 0, 1), epoch))  # -1: there are no steps
    tl.store(clock + _TURN, joined(sequence + 1, written))


@triton.jit
def digest_before(clock, source, known_low, known_high):
    """The digest that the frame is made against: from the clock, or from the host where ``source`` says so."""
    return tl.where(source == _FROM_HOST, joined(known_low, known_high), tl.load(clock + tl.where(source == 1, 1, 0)))


@triton.jit
def digest_after(digest, checksum):
    return (digest ^ checksum) * _FACTOR + 1


@triton.jit
def put(words, lane, at, value):
    """``words`` with an int64 in two lanes."""
    words = tl.where(lane == at, value.to(tl.int32), words)
    return tl.where(lane == at + 1, (value >> 32).to(tl.int32), words)


@triton.jit
def head_of(
    template, checksum, digest, step, epoch, sequence, flags,
    FLAGS: tl.constexpr, CALL: tl.constexpr, SUMS: tl.constexpr, TOTAL: tl.constexpr,
):  # fmt: skip
    """The header's words: those that all frames of the stream share, and what differs."""
    lane = tl.arange(0, _HEAD)
    words = tl.load(template + lane)
    words = tl.where(lane == FLAGS, words | flags, words)
    words = tl.where(lane == CALL, step, words)
    words = tl.where(lane == CALL + 1, epoch, words)
    words = tl.where(lane == CALL + 2, sequence, words)
    words = put(words, lane, SUMS, checksum)
    words = put(words, lane, SUMS + 2, digest)
    counts = (lane != TOTAL) & (lane != TOTAL + 1)
    total = tl.sum(tl.where(counts, weighed(words, lane), tl.zeros((_HEAD,), tl.int64)), 0)
    return put(words, lane, TOTAL, total)


@triton.jit
def report(board, code, stream, got, expected):
    """Write to the board unless something is written there already."""
    if tl.atomic_cas(board, 0, code) == 0:
        lane = tl.arange(0, _HEAD)
        tl.store(board + 1, stream)
        tl.store(board + 2 + lane, got)
        tl.store(board + 2 + _HEAD + lane, expected)


_CHANGING = ["step", "epoch", "sequence", "source", "known_low", "known_high"]
"""What a call gives beside tensors. Triton must not make constants of it: each value would be compiled anew."""
CHANGING = len(_CHANGING)
_GENERAL = [*_CHANGING, "count", "stream"]
_GIVEN = 4
"""Tensors that a call gives, before those numbers."""


@triton.jit(do_not_specialize=_GENERAL)
def seal_frame(
    frame, sums, clock, flag, step, epoch, sequence, source, known_low, known_high,
    template, board, count, stream,
    WORDS: tl.constexpr, NONFINITE: tl.constexpr,
    FLAGS: tl.constexpr, CALL: tl.constexpr, SUMS: tl.constexpr, TOTAL: tl.constexpr,
):  # fmt: skip
    """Write the header of a frame whose payload is there; report a residual that was not finite.

    By a clock that has ended the frame is made against a digest that no receiver has, and the clock stays.
    """
    head_at = frame.to(tl.pointer_type(tl.int32))
    if added(head_at + _HEAD, count, sums, WORDS):
        checksum = taken(sums)
        step, epoch, sequence, source, asked = due(clock, step, epoch, sequence, source)
        ended = asked & (source == _ENDED)
        digest = digest_before(clock, source, known_low, known_high)
        digest = tl.where(ended, ~digest, digest)
        flagged = tl.load(flag) != 0
        flags = tl.where(flagged, NONFINITE, 0)
        head = head_of(template, checksum, digest, step, epoch, sequence, flags, FLAGS, CALL, SUMS, TOTAL)
        tl.store(head_at + tl.arange(0, _HEAD), head)
        if ended:
            report(board, _ENDED_CLOCK, stream, head, head)
        else:
            move_on(clock, digest_after(digest, checksum), step, epoch, sequence, source)
        if flagged:
            tl.store(flag, 0)
            report(board, _NOT_FINITE, stream, head, head)


@triton.jit(do_not_specialize=_GENERAL)
def check_frame(
    frame, sums, clock, accepted, step, epoch, sequence, source, known_low, known_high,
    template, board, count, stream,
    WORDS: tl.constexpr, NONFINITE: tl.constexpr,
    FLAGS: tl.constexpr, CALL: tl.constexpr, SUMS: tl.constexpr, TOTAL: tl.constexpr,
):  # fmt: skip
    """Compare a frame with what is expected: 1 in the first of ``accepted`` if it is that and is to be applied, and in
    the second if it holds values, else 0.

    The frame of a residual that was not finite is applied, as its sender applies it, but its values are not handed out.
    Any other difference breaks the stream for good: its digest becomes one that no frame has. By a clock that has ended
    no frame is the expected one, and the clock stays.
    """
    head_at = frame.to(tl.pointer_type(tl.int32))
    if added(head_at + _HEAD, count, sums, WORDS):
        checksum = taken(sums)
        step, epoch, sequence, source, asked = due(clock, step, epoch, sequence, source)
        ended = asked & (source == _ENDED)
        digest = digest_before(clock, source, known_low, known_high)
        lane = tl.arange(0, _HEAD)
        got = tl.load(head_at + lane)
        flags = tl.load(head_at + FLAGS) & NONFINITE
        head = head_of(template, checksum, digest, step, epoch, sequence, flags, FLAGS, CALL, SUMS, TOTAL)
        same = (tl.sum(tl.where(got == head, 0, 1), 0) == 0) & (ended == 0)
        after = digest_after(digest, checksum)
        if ended:
            report(board, _ENDED_CLOCK, stream, got, head)
        else:
            move_on(clock, tl.where(same, after, ~after), step, epoch, sequence, source)
        tl.store(accepted, tl.where(same, 1, 0).to(tl.uint8))
        tl.store(accepted + 1, tl.where(same & (flags == 0), 1, 0).to(tl.uint8))
        if not same:
            report(board, _REFUSED, stream, got, head)
        elif flags != 0:
            report(board, _NOT_FINITE, stream, got, head)


class _Sums(NamedTuple):
    """What lies zero between two frames: checksum and programs done, int64; the encoder's flag, int32."""

    sums: Tensor
    flag: Tensor


def _zeros(device: torch.device) -> _Sums:
    with torch.inference_mode(False):  # or they could not be written to outside of the mode they were made in
        return _Sums(torch.zeros(2, dtype=torch.int64, device=device), torch.zeros(1, dtype=torch.int32, device=device))


def sums_of(device: torch.device, stream: int | None) -> _Sums:
    """Kept for each thread and stream, whose frames follow one another; a captured frame gets its own."""
    if stream is None or torch.cuda.is_current_stream_capturing():
        return _zeros(device)
    if not hasattr(_here, "streams"):
        _here.streams = {}
    found: _Sums | None = _here.streams.get((device.index, stream))
    if found is None:
        found = _here.streams[device.index, stream] = _zeros(device)
    return found


class FrameKernels:
    """Seals or checks the frames of one end of a stream, see ``kernels.Frames``.

    Args:
        head: the 128 bytes before the payload that all frames share.
        places: where in them stands what differs.
        payload_nbytes: of every frame, a multiple of 4.
        board: int32 of ``BOARD_WORDS``, of the group.
        stream: the stream's number on the board.

    Attributes:
        holds_values: bool ``[1]`` on the device: whether the frame checked last was the expected one and held values.
        accepted: uint8 ``[2]``: whether it was the expected one, and whether it held values, too.
        template: uint8, ``head`` on the device: an end that writes to it sends, or expects, other bytes from then on.
        views: of the template, as ``kernels.Frames`` says.
    """

    __slots__ = ("accepted", "checking", "device", "holds_values", "sealing", "stream_of", "template", "views")

    def __init__(self, head: bytes, places: HeadPlaces, payload_nbytes: int, board: Tensor, stream: int) -> None:
        device = self.device = board.device
        self.stream_of = stream_getter(device)
        with torch.inference_mode(False):
            template = torch.frombuffer(bytearray(head), dtype=torch.int32).to(device)
            self.template = template.view(torch.uint8)
            self.accepted = torch.zeros(2, dtype=torch.uint8, device=device)
            self.holds_values = self.accepted[1:].view(torch.bool)
        self.views: dict[str, Tensor] = {}
        count, given = payload_nbytes // 4, _GIVEN + len(_CHANGING)
        arguments = (*map(Slot, range(given)), template, board, count, stream)
        constants = {"WORDS": _WORDS, **places._asdict(), "num_warps": 4, "enable_fp_fusion": False}
        grid = -(-count // _WORDS)
        self.sealing = Launch(seal_frame, grid, arguments, given, constants)
        self.checking = Launch(check_frame, grid, arguments, given, constants)

    def launch(
        self,
        launch: Launch,
        tensors: tuple[Tensor, ...],
        call: tuple[int, int, int, int, int],
        stream: int | None,
    ) -> None:
        """Seal or check a frame, by itself, on the current device.

        Args:
            launch: ``sealing`` or ``checking``.
            tensors: the frame, its ``sums``, the clock, and the encoder's flag or ``accepted``.
            call: as for :func:`changing_of`.
            stream: the current one; ``None`` on the CPU.
        """
        changing, pointers = changing_of(call), tuple([tensor.data_ptr() for tensor in tensors])
        launch(tensors + changing, pointers + changing, alignment_of(pointers), stream)


def changing_of(call: tuple[int, int, int, int, int]) -> tuple[int, ...]:
    """What a call gives beside tensors, as Triton takes it for int32 whatever it is.

    ``call``: step, epoch, sequence, source, the digest that the host knows.
    """
    step, epoch, sequence, source, known = call
    if source != FROM_HOST:  # no kernel looks at what the host knows
        known = 0
    if (epoch | sequence | known) >> 31:
        return step, _signed(epoch), _signed(sequence), source, _signed(known), _signed(known >> 32)
    return step, epoch, sequence, source, known, 0


def _signed(value: int) -> int:
    """The low 32 bits, as Triton takes them for an int32 whatever they are."""
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value >> 31 else value
