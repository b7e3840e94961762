"""One end of a stream on a device: encode and seal a frame, or check and decode it, in one series of launches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from compactdist.kernels.gpu.frames import CHANGING, FrameKernels, changing_of, sums_of
from compactdist.kernels.gpu.launch import ADDRESS, Series, alignment_of
from compactdist.kernels.gpu.launched import TO_DECODE, TO_ENCODE, LaunchedSteps, cut_out
from compactdist.kernels.gpu.terms import number_of, source_of
from compactdist.kernels.spec import HEAD_WORDS, MovingTerm

if TYPE_CHECKING:
    from compactdist.kernels import DeviceSteps

__all__ = ["FrameEnds"]

_HEADER_NBYTES = 4 * HEAD_WORDS
_FLAG, _ACCEPTED = TO_ENCODE.flag.number, TO_DECODE.accepted.number
"""What the last launch of a sender, or the first of a receiver, shares with those of the steps."""


class FrameEnds(FrameKernels):
    """See ``kernels.Frames``; arguments as for :class:`FrameKernels`.

    With steps that are launches all of an end is one series. Other steps do their work before the frame is sealed, or
    after it was checked.
    """

    __slots__ = ("_index", "_series")

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._index = self.device.index if self.device.type == "cuda" else None  # what ``is_elsewhere`` compares
        self._series: dict[tuple[Any, ...], Series] = {}

    def send(
        self,
        steps: DeviceSteps,
        x: Tensor,
        terms: tuple[Tensor, ...],
        out: Tensor | None,
        copy: Tensor | None,
        frame: Tensor,
        payload: Tensor,
        clock: Tensor,
        call: tuple[int, int, int, int, int],
        queue: int,
    ) -> bool:
        """Encode and seal, see ``kernels.Frames``."""
        device = self.device
        if x.device != device:
            return False
        if self._index is not None and self._index != torch.cuda.current_device():
            with torch.cuda.device(device):
                return self.send(steps, x, terms, out, copy, frame, payload, clock, call, queue)
        stream = None if self.stream_of is None else queue
        if not isinstance(steps, LaunchedSteps):
            return self._send_in_turn(steps, x, terms, out, copy, frame, payload, clock, call, stream)
        if x.dtype != steps.dtype:
            return False
        own, own_pointers = steps.to_encode(stream, True)
        sums, flag = sums_of(device, stream)
        if not x.is_contiguous():
            x = x.contiguous()
        number, source = source_of(terms, x)
        target = x if out is None else out
        second = target if copy is None else copy
        told = x.data_ptr(), *map(ADDRESS, source), target.data_ptr(), second.data_ptr()
        aligned, changing = alignment_of(told), changing_of(call)  # our own buffers are aligned
        at = payload.data_ptr()
        cuts = [at + cut.start for cut in steps.cuts] if steps.cuts else ()
        ours = *own_pointers, *cuts, frame.data_ptr(), sums.data_ptr(), clock.data_ptr()
        pointers = (*told[:-1], at, flag.data_ptr(), told[-1], *ours, *changing)
        key = steps, number, out is not None, copy is not None
        series = self._series.get(key) or self._sending(*key)
        try:
            if not series.repeat(pointers, aligned, stream):
                given = x, *source, target, payload, flag, second
                sealed: tuple[Any, ...] = *own, *cut_out(payload, steps.cuts), frame, sums, clock, *changing
                series.begin(given + sealed, pointers, aligned, stream)
        except BaseException:
            flag.zero_()  # the next frame must not be taken for one of values that are not finite
            raise
        return True

    def _send_in_turn(
        self,
        steps: DeviceSteps,
        x: Tensor,
        terms: tuple[Tensor, ...],
        out: Tensor | None,
        copy: Tensor | None,
        frame: Tensor,
        payload: Tensor,
        clock: Tensor,
        call: tuple[int, int, int, int, int],
        stream: int | None,
    ) -> bool:
        sums, flag = sums_of(self.device, stream)
        try:
            if not steps.encode(x, terms, out, payload, copy=copy, flag=flag):
                return False
            self.launch(self.sealing, (frame, sums, clock, flag), call, stream)
        except BaseException:
            flag.zero_()
            raise
        return True

    def receive(
        self,
        steps: DeviceSteps,
        frame: Tensor,
        nbytes: int,
        terms: tuple[Tensor, ...],
        out: Tensor,
        copy: Tensor | None,
        clock: Tensor,
        call: tuple[int, int, int, int, int],
        queue: int,
    ) -> bool:
        """Check and decode, see ``kernels.Frames``."""
        device, address = self.device, frame.data_ptr()
        if address % 16 or not frame.is_contiguous():
            return False
        if self._index is not None and self._index != torch.cuda.current_device():
            with torch.cuda.device(device):
                return self.receive(steps, frame, nbytes, terms, out, copy, clock, call, queue)
        stream, accepted = None if self.stream_of is None else queue, self.accepted
        sums = sums_of(device, stream).sums
        if not isinstance(steps, LaunchedSteps):
            payload = frame[_HEADER_NBYTES:nbytes]
            self.launch(self.checking, (frame, sums, clock, accepted), call, stream)
            decoded = steps.decode(payload, terms, out, copy=copy, accepted=accepted)
            assert decoded, "the steps take what their stream holds"
            return True
        number, source = source_of(terms, out)
        target = out if copy is None else copy
        told = *map(ADDRESS, source), out.data_ptr(), target.data_ptr()
        aligned, changing = alignment_of(told), changing_of(call)
        at = address + _HEADER_NBYTES
        own, own_pointers = steps.to_decode(stream)
        cuts = [at + cut.start for cut in steps.cuts] if steps.cuts else ()
        ours = accepted.data_ptr(), told[-1], *own_pointers, *cuts, address, sums.data_ptr(), clock.data_ptr()
        pointers = (*told[:-1], at, *ours, *changing)
        key = steps, number, copy is not None
        series = self._series.get(key) or self._receiving(*key)
        if not series.repeat(pointers, aligned, stream):
            payload = frame[_HEADER_NBYTES:nbytes]
            given = *source, out, payload, accepted, target
            checked: tuple[Any, ...] = *own, *cut_out(payload, steps.cuts), frame, sums, clock, *changing
            series.begin(given + checked, pointers, aligned, stream)
        return True

    def has_sent(self, steps: DeviceSteps, terms: tuple[MovingTerm, ...], writes: bool, copies: bool) -> bool:
        """See ``kernels.Frames``."""
        return (steps, number_of(terms), writes, copies) in self._series

    def repeats(self, steps: DeviceSteps) -> bool:
        """See ``kernels.Frames``."""
        return isinstance(steps, LaunchedSteps)

    def _sending(self, steps: LaunchedSteps, terms: int, writes: bool, copies: bool) -> Series:
        encoding = steps.encoding(terms, writes, copies, True)
        numbers, given = _around(encoding[0].given, _FLAG)
        launches = [launch.renumbered(range(launch.given), given) for launch in encoding]
        made = self._series[steps, terms, writes, copies] = Series([*launches, self.sealing.renumbered(numbers, given)])
        return made

    def _receiving(self, steps: LaunchedSteps, terms: int, copies: bool) -> Series:
        decoding = steps.decoding(terms, True, copies)
        numbers, given = _around(decoding[0].given, _ACCEPTED)
        launches = [launch.renumbered(range(launch.given), given) for launch in decoding]
        made = self._series[steps, terms, copies] = Series([self.checking.renumbered(numbers, given), *launches])
        return made


def _around(given: int, shared: int) -> tuple[list[int], int]:
    """Where the arguments of sealing or checking are, behind those ``given`` to the steps, and how many there are then.

    Frame, sums and clock, what is ``shared`` with the steps, and what changes.
    """
    numbers = [*range(given, given + 3), shared, *range(given + 3, given + 3 + CHANGING)]
    return numbers, given + 3 + CHANGING
