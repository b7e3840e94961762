"""What streams on a device report to the host, which never waits for them in a steady call.

Kernels that seal or check a frame write to a board on their device when something is wrong, the first time only. The
host copies the board without waiting at every step and raises what it finds, one or two steps after the fault; until
then the receiver's outputs of the call concerned hold NaN.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

from compactdist import kernels
from compactdist.errors import CaptureError, CompactDistError, FrameError, NonFiniteError
from compactdist.kernels.spec import BOARD_WORDS, ENDED_CLOCK, NOT_FINITE
from compactdist.state.remedies import RESET, remedy_of
from compactdist.wire import HEADER_NBYTES, KEYFRAME, differences, flags_in, is_intact, step_in

__all__ = ["Board"]


_MOST_STREAMS = 1 << 16


class _OnDevice:
    """A board, and its last copy on the host."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        with torch.inference_mode(False):
            self.board = torch.zeros(BOARD_WORDS, dtype=torch.int32, device=device)
            self.copy = torch.zeros(BOARD_WORDS, dtype=torch.int32, device="cpu", pin_memory=device.type == "cuda")
        self.copied: torch.cuda.Event | None = None

    def look(self, wait: bool) -> Tensor | None:
        """The board as it was when it was last copied; ``None`` while that copy is under way."""
        if self.device.type != "cuda":
            return self.board.clone()
        if wait:
            torch.cuda.synchronize(self.device)
            return self.board.cpu()
        seen = None
        if self.copied is not None and self.copied.query():
            seen = self.copy.clone()
            self.copied = None
        if self.copied is None:
            self.copy.copy_(self.board, non_blocking=True)
            self.copied = torch.cuda.Event()
            self.copied.record()
        return seen

    def clear(self) -> None:
        """Take reports again."""
        self.copied = None
        self.board.zero_()


class Board:
    """The boards of one group, one for each device, and the streams that write to them.

    Attributes:
        used: some stream may write to one.
    """

    def __init__(self) -> None:
        self.used = False
        self._streams: dict[int, str] = {}
        self._next = 0
        self._devices: dict[torch.device, _OnDevice] = {}
        self._lock = threading.Lock()

    def on(self, device: torch.device) -> Tensor:
        """The board on a device, int32, made on first use."""
        with self._lock:
            if device not in self._devices:
                self._devices[device] = _OnDevice(device)
            return self._devices[device].board

    def enter(self, where: str) -> int:
        """The number under which a stream reports."""
        with self._lock:
            self.used = True
            number, self._next = self._next, (self._next + 1) % (1 << 31)
            self._streams[number] = where
            if len(self._streams) > _MOST_STREAMS:  # every request has streams of its own
                del self._streams[next(iter(self._streams))]
            return number

    def poll(self, *, wait: bool = False) -> None:
        """Raise what was reported, once.

        Args:
            wait: for all that the devices are doing. ``False``: look at the last copy that has arrived, and begin
                another.

        Raises:
            NonFiniteError: what a tensor changed by was NaN or infinite at its sender.
            FrameError: a frame was not the one its receiver expected.
            CaptureError: a CUDA graph was replayed that had ended.
        """
        for one in tuple(self._devices.values()):
            if kernels.captures(one.device):
                continue
            seen = one.look(wait)
            if seen is not None and int(seen[0]):
                one.clear()
                raise self._error(seen)

    def _error(self, seen: Tensor) -> CompactDistError:
        code, stream = seen[:2].tolist()
        where = self._streams.get(stream, "a stream of an earlier request")
        heads = seen[2:].numpy().tobytes()
        got, expected = heads[:HEADER_NBYTES], heads[HEADER_NBYTES:]
        if code == ENDED_CLOCK:
            return CaptureError(
                f"{where}: a CUDA graph was replayed that had ended with the history it goes on from: by reset(), a "
                "keyframe, another shape or codec, or a frame that the host made. Outputs of that call hold NaN and no "
                "history has moved; make the call uncaptured until its frames are residuals, capture it again, and "
                "delete the old graph, on all ranks"
            )
        if code == NOT_FINITE and flags_in(got) & KEYFRAME:
            return NonFiniteError(
                f"{where}: in step {step_in(got)} the tensor held NaN or Inf, which a coded keyframe cannot carry. "
                "Receivers got NaN, all ranks remember zero where it could not be coded, and later calls were coded "
                "against that. Find the source of the NaN, or let the site pass through"
            )
        if code == NOT_FINITE:
            return NonFiniteError(
                f"{where}: in step {step_in(got)} what the tensor changed by held NaN or Inf. Receivers got NaN, the "
                "history stayed as it was on all ranks, and later calls were coded against it. Find the source of the "
                "NaN, or let the site pass through"
            )
        if not is_intact(got):
            return FrameError(
                f"{where}: what arrived in step {step_in(expected)} has a damaged header (its checksum does not match) "
                "or is no compactdist frame, as where its sender let the call pass through. Nothing was applied, the "
                f"output of that call holds NaN; {RESET}"
            )
        wrong: list[tuple[str, Any, Any]] = differences(got, expected)
        name, theirs, ours = wrong[0]
        others = f" (and {', '.join(other for other, _, _ in wrong[1:])})" if wrong[1:] else ""
        return FrameError(
            f"{where}: wrong {name}{others} in step {step_in(expected)}: the frame says {theirs}, expected {ours}. "
            f"Nothing was applied, the output of that call holds NaN; {remedy_of(name)}"
        )
