"""What callers of the kernels hold, prepared once for a stream or a size. The classes are those of the rooms below."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from compactdist.kernels.spec import MovingTerm, Velocity

__all__ = ["Checksum", "DeviceSteps", "FarLarger", "Frames", "HistorySteps", "Picks", "Rounding", "Steps"]


class Steps(Protocol):
    """The steps of one stream, prepared once: everything that does not change between two steps is held here.

    Attributes:
        checksum: of the payload that the last :meth:`encode` wrote, if it was summed up on the way, else ``None``.
    """

    checksum: int | None

    def encode(
        self,
        x: Tensor,
        terms: tuple[Tensor, ...],
        out: Tensor | None,
        payload: Tensor,
        *,
        copy: Tensor | None = None,
    ) -> bool:
        """Write the payload of ``x`` less the sum of ``terms``, and to ``out`` what :meth:`decode` will give.

        With ``copy``, contiguous, as large as ``out`` and apart from all other tensors, write the same values there
        too.

        Returns:
            Whether it was done; if not, ``out``, ``copy`` and ``payload`` hold anything, and the reference has to do
            it.
        """
        ...

    def decode(
        self,
        payload: Tensor,
        terms: tuple[Tensor, ...],
        out: Tensor,
        *,
        copy: Tensor | None = None,
    ) -> bool:
        """Write the sum of ``terms`` plus the decoded payload to ``out``, which may be the first of the terms.

        With ``copy``, contiguous and as large as ``out``, write the same values there too; steps may decline that.

        Returns:
            Whether it was done; if not, ``out`` is as it was.
        """
        ...


class HistorySteps(Protocol):
    """The steps of a stream with ``scales="token_history"``, as ``Steps``, for all frames but the first.

    ``scales``: the channel scales that both ends hold, and where those of the next frame go; float32, contiguous,
    elements of ``(groups, channels)``.
    """

    checksum: int | None

    def encode(
        self,
        x: Tensor,
        terms: tuple[Tensor, ...],
        out: Tensor | None,
        payload: Tensor,
        scales: tuple[Tensor, Tensor],
        *,
        copy: Tensor | None = None,
    ) -> bool:
        """As ``Steps.encode``."""
        ...

    def decode(
        self,
        payload: Tensor,
        terms: tuple[Tensor, ...],
        out: Tensor,
        scales: tuple[Tensor, Tensor],
        *,
        copy: Tensor | None = None,
    ) -> bool:
        """As ``Steps.decode``."""
        ...


class DeviceSteps(Steps, Protocol):
    """Steps that nothing waits for: what they find out stays on the device."""

    def encode(
        self,
        x: Tensor,
        terms: tuple[Tensor, ...],
        out: Tensor | None,
        payload: Tensor,
        *,
        copy: Tensor | None = None,
        flag: Tensor | None = None,
    ) -> bool:
        """As ``Steps``; with ``flag``, int32 ``[1]``, that is set to 1 where the residual is not finite, and payload
        and ``out`` then say that nothing changed.
        """
        ...

    def decode(
        self,
        payload: Tensor,
        terms: tuple[Tensor, ...],
        out: Tensor,
        *,
        copy: Tensor | None = None,
        accepted: Tensor | None = None,
    ) -> bool:
        """As ``Steps``; with ``accepted``, uint8 ``[2]``, ``out`` stays as it was where the first of it is 0, and
        ``copy`` gets NaN where the second is.
        """
        ...


class Frames(Protocol):
    """Seals or checks the frames of one end of a stream on a device.

    Attributes:
        holds_values: bool ``[1]``, the same tensor every time: whether the frame checked last was the expected one and
            held values.
        accepted: uint8 ``[2]``, the same tensor every time: whether it was the expected one; as ``holds_values``.
        template: uint8, the bytes before the payload that frames share. Where a frame says something of its own, an end
            writes that here before it sends or checks the frame.
        views: of the template, by names that an end gives them; it makes each once.
    """

    holds_values: Tensor
    accepted: Tensor
    template: Tensor
    views: dict[str, Tensor]

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
        """Encode ``x``, as ``DeviceSteps`` do, and write the header of its frame.

        Args:
            steps: of the stream, for this device.
            x: flat.
            terms: what is expected, each flat and contiguous.
            out: flat, contiguous, none of the terms; gets what the receiver will hold.
            copy: contiguous, apart from all other tensors; gets the same values. Only with ``out``.
            frame: 1-D uint8, contiguous.
            payload: the part of it behind the header.
            clock: of this end, see ``spec.CLOCK_WORDS``; moves on by one frame.
            call: step, epoch and sequence; which of the clock's digests the frame is made against, ``FROM_HOST`` for
                one that the host knows; that one. With ``FROM_CLOCK`` the clock says it all, and the other numbers are
                not looked at: the launches may be repeated as they are.
            queue: :func:`queue_of` the device.

        Returns:
            Whether it was done; not if ``x`` is of another dtype or device than the steps.
        """
        ...

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
        """Compare a frame with the one that is expected, and decode it to ``out`` unless it is another one.

        Args:
            steps: of the stream, for this device.
            frame: 1-D uint8.
            nbytes: of the frame; those behind are padding.
            terms: what is expected, each flat and contiguous.
            out: flat, contiguous; may be the first of the terms.
            copy: contiguous; gets the values, too, or NaN where the frame is another one or holds none.
            clock: as for :meth:`send`.
            call: as for :meth:`send`.
            queue: :func:`queue_of` the device.

        Returns:
            Whether it was done; not if the frame is not contiguous, or its payload not aligned to 16 bytes.
        """
        ...

    def has_sent(self, steps: DeviceSteps, terms: tuple[Tensor, ...], writes: bool, copies: bool) -> bool:
        """Whether :meth:`send` was called with such terms, with ``out`` and with ``copy``: all is compiled then."""
        ...

    def repeats(self, steps: DeviceSteps) -> bool:
        """Whether all that an end does with these steps is launches, which a CUDA graph can repeat."""
        ...


class Rounding(Protocol):
    """Rounds flat tensors of one size and dtype to ``spec.Rounded`` and back, as ``reference/rounding.py`` says."""

    def quantize(
        self, values: Tensor | Velocity, codes: Tensor, scales: Tensor, accepted: Tensor | None = None
    ) -> None:
        """Write the codes ``[numel]`` and the bfloat16 scales ``[ceil(numel / 128)]`` of finite values.

        Args:
            values: flat; for kernels other than the reference also a velocity between a tensor and a ``Rounded``.
            codes: as ``spec.RoundedForm`` says.
            scales: of runs of 128 elements.
            accepted: uint8 ``[2]`` on the device: nothing is written where the first of it is 0.
        """

    def dequantize(self, codes: Tensor, scales: Tensor, out: Tensor) -> None:
        """Write the values ``[numel]``, kept finite and rounded once to the dtype of ``out``, which is contiguous."""


class Picks(Protocol):
    """Finds the element that is kept of each run of m of a stream's tensors, and puts it back: ``reference/topk.py``.

    ``places``: uint8, the section of places with its padding. ``kept``: uint8, the section of values with its padding,
    or float32, one for each run, and one more if the runs are odd in number.
    """

    def pick(self, x: Tensor, terms: tuple[Tensor, ...], places: Tensor, kept: Tensor) -> bool:
        """Write places and kept elements of ``x`` less the sum of ``terms``, and zeros behind them.

        Returns:
            Whether the residual was finite; if not, ``places`` and ``kept`` hold anything.
        """
        ...

    def spread(self, places: Tensor, kept: Tensor, terms: tuple[Tensor, ...], out: Tensor) -> None:
        """Write the sum of ``terms`` plus the kept elements in their places to ``out``, kept finite and rounded once.

        ``out`` may be the first of the terms.
        """
        ...


class Checksum(Protocol):
    """Sums up 1-D uint8 ``data``, and copies it to ``copy``, of the same size, on the way."""

    def __call__(self, data: Tensor, copy: Tensor | None = None) -> int: ...


FarLarger = Callable[[Tensor, tuple[MovingTerm, ...]], bool]
"""Whether a flat tensor less the sum of its terms, one or two, is far larger than the tensor."""
