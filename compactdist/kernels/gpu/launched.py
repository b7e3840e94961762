"""Steps that are nothing but launches: they list them, and are run alone or within the series of a frame's end.

All launches of one encoding get the same arguments, and so do those of one decoding. First what every stream gives:

* encoding: x, the terms as ``elements.expected`` takes them, out, payload, flag, copy (a missing tensor of the terms
  repeats ``x``, and so does a missing ``out``; a missing ``copy`` repeats ``out``);
* decoding: the terms, out, payload, accepted, copy (a missing tensor of the terms, or ``copy``, repeats ``out``);

then memory of the steps' own, and then the sections of the payload whose addresses they ask for.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from compactdist.kernels.gpu.launch import Launch, Slot, alignment_of, on, stream_getter
from compactdist.kernels.gpu.terms import TERMS, source_of
from compactdist.kernels.spec import MovingTerm

__all__ = [
    "DECODING",
    "ENCODING",
    "NOTHING",
    "TO_DECODE",
    "TO_ENCODE",
    "Cut",
    "LaunchedSteps",
    "Own",
    "cut_out",
]


class _Encoding(NamedTuple):
    """What every encoding gives, by slots."""

    x: Slot
    terms: tuple[Slot, ...]
    out: Slot
    payload: Slot
    flag: Slot
    copy: Slot


class _Decoding(NamedTuple):
    """What every decoding gives, by slots."""

    terms: tuple[Slot, ...]
    out: Slot
    payload: Slot
    accepted: Slot
    copy: Slot


def _slots(first: int, count: int) -> tuple[Slot, ...]:
    return tuple(map(Slot, range(first, first + count)))


TO_ENCODE = _Encoding(Slot(0), _slots(1, TERMS), *_slots(1 + TERMS, 4))
TO_DECODE = _Decoding(_slots(0, TERMS), *_slots(TERMS, 4))
ENCODING, DECODING = TO_ENCODE.copy.number + 1, TO_DECODE.copy.number + 1
"""How much that is, before what is the steps' own."""


class Own(NamedTuple):
    """Memory of the steps' own, and its addresses."""

    tensors: tuple[Tensor, ...]
    pointers: tuple[int, ...]


NOTHING = Own((), ())


class Cut(NamedTuple):
    """A section of the payload: from which byte on, a multiple of 16, and the dtype that kernels take it for."""

    start: int
    dtype: torch.dtype


def cut_out(payload: Tensor, cuts: Iterable[Cut]) -> tuple[Tensor, ...]:
    """The sections of a payload."""
    return tuple([payload[cut.start :].view(cut.dtype) for cut in cuts])


class LaunchedSteps:
    """The steps of one stream, see ``kernels.DeviceSteps``.

    Args:
        dtype: of the tensors.
        device: of the tensors.
        payload_nbytes: of every payload.
        cuts: sections that launches ask for.

    Attributes:
        dtype, cuts: as above.
    """

    __slots__ = ("_decodings", "_device", "_encodings", "_payload_nbytes", "_stream_of", "checksum", "cuts", "dtype")

    def __init__(
        self, dtype: torch.dtype, device: torch.device, payload_nbytes: int, cuts: tuple[Cut, ...] = ()
    ) -> None:
        self.checksum: int | None = None
        self.dtype, self.cuts = dtype, cuts
        self._payload_nbytes = payload_nbytes
        self._stream_of = stream_getter(device)
        index: int | None = device.index
        if self._stream_of is not None and index is None:
            device = torch.device(device.type, torch.cuda.current_device())
        self._device = device
        self._encodings: dict[tuple[int, bool, bool, bool], list[Launch]] = {}
        self._decodings: dict[tuple[int, bool, bool], list[Launch]] = {}

    @abstractmethod
    def encoding(self, terms: int, writes: bool, copies: bool, lockstep: bool) -> list[Launch]:
        """All launches of an encoding, in order.

        Args:
            terms: how many there are, or what ``elements.ROUNDED`` says.
            writes: ``out`` gets what the receiver will hold.
            copies: ``copy`` gets the same; only with ``writes``.
            lockstep: of a residual that is not finite, payload and ``out`` say what both ends can go on with.
        """

    @abstractmethod
    def decoding(self, terms: int, checked: bool, copies: bool) -> list[Launch]:
        """All launches of a decoding, in order.

        Args:
            terms: how many there are, or what ``elements.ROUNDED`` says.
            checked: ``accepted`` is given.
            copies: ``copy`` is given.
        """

    @abstractmethod
    def to_encode(self, stream: int | None, lockstep: bool) -> Own:
        """Memory for an encoding on the current CUDA stream, in the state it begins with.

        Args:
            stream: its number; ``None``: on the CPU.
            lockstep: as for :meth:`encoding`.
        """

    def to_decode(self, stream: int | None) -> Own:
        """As :meth:`to_encode`, for a decoding."""
        return NOTHING

    def flag_in(self, own: Own) -> Tensor:
        """Zero, int32 ``[1]``, for an encoding that is given no flag."""
        return torch.zeros(1, dtype=torch.int32, device=self._device)

    def encode(
        self,
        x: Tensor,
        terms: tuple[MovingTerm, ...],
        out: Tensor | None,
        payload: Tensor,
        *,
        copy: Tensor | None = None,
        flag: Tensor | None = None,
    ) -> bool:
        """Encode ``x`` less the sum of ``terms`` and, if ``out`` is given, write there what the receiver will hold.

        Args:
            x: flat.
            terms: what is expected, each flat.
            out: flat, contiguous, none of the terms.
            payload: uint8, gets the payload; directly if it is aligned to 16 bytes.
            copy: contiguous, apart from all other tensors; gets what ``out`` does, and only with that.
            flag: int32 of one element, set to 1 if the residual is not finite, else left as it is. With it nothing
                waits for the device. What is then sent decodes to no change where the residual is not finite: in a
                payload of zeros, or in the row, block or run concerned. ``out`` gets what the receiver makes of it, so
                that both ends stay equal.

        Returns:
            Whether it was done; not if tensors are of another dtype or device, or if the residual is not finite and
            there is no flag; ``out`` and ``payload`` hold anything then.
        """
        if not self._takes([one for one in (x, *terms, out, copy) if one is not None]):
            return False
        if payload.dtype != torch.uint8 or not (flag is None or flag.dtype == torch.int32):
            return False
        device, written = self._device, payload
        if payload.data_ptr() % 16 or not payload.is_contiguous():
            written = torch.empty(self._payload_nbytes, dtype=torch.uint8, device=device)
        x = x if x.is_contiguous() else x.detach().contiguous()
        number, source = source_of(terms, x)
        key = number, out is not None, copy is not None, flag is not None
        launches = self._encodings.get(key)
        if launches is None:
            launches = self._encodings[key] = self.encoding(*key)
        with on(device):
            stream = None if self._stream_of is None else self._stream_of(device.index)
            own = self.to_encode(stream, flag is not None)
            reported = self.flag_in(own) if flag is None else flag
            target = x if out is None else out
            given = (x, *source, target, written, reported, target if copy is None else copy)
            self._launch(launches, given, own, written, stream)
        if flag is None and int(reported):
            return False
        if written is not payload:
            payload.copy_(written)
        return True

    def decode(
        self,
        payload: Tensor,
        terms: tuple[MovingTerm, ...],
        out: Tensor,
        *,
        copy: Tensor | None = None,
        accepted: Tensor | None = None,
    ) -> bool:
        """Write the sum of ``terms`` plus the decoded payload to ``out``, kept finite and rounded to its dtype.

        Never waits for the device; ``out`` may be the first of the terms. With ``accepted``, uint8 ``[2]``, ``out``
        stays as it was where the first of it is 0, and ``copy`` gets NaN where the second is.

        Returns:
            Whether it was done; not if tensors are of another dtype or device, or the payload of another length.
        """
        if (
            not self._takes((out, *terms) if copy is None else (out, copy, *terms))
            or payload.dtype != torch.uint8
            or payload.shape != (self._payload_nbytes,)
        ):
            return False
        if payload.data_ptr() % 16 or not payload.is_contiguous():  # the middle of someone's buffer
            payload = payload.clone(memory_format=torch.contiguous_format)
        number, source = source_of(terms, out)
        key = number, accepted is not None, copy is not None
        launches = self._decodings.get(key)
        if launches is None:
            launches = self._decodings[key] = self.decoding(*key)
        checked, second = payload if accepted is None else accepted, out if copy is None else copy
        given = *source, out, payload, checked, second
        with on(self._device):
            stream = None if self._stream_of is None else self._stream_of(self._device.index)
            self._launch(launches, given, self.to_decode(stream), payload, stream)
        return True

    def _launch(
        self, launches: list[Launch], given: tuple[Tensor, ...], own: Own, payload: Tensor, stream: int | None
    ) -> None:
        cuts = cut_out(payload, self.cuts)
        pointers = (
            *[tensor.data_ptr() for tensor in given], *own.pointers, *[tensor.data_ptr() for tensor in cuts]
        )  # fmt: skip
        aligned, tensors = alignment_of(pointers), given + own.tensors + cuts
        for launch in launches:
            launch(tensors, pointers, aligned, stream)

    def _takes(self, tensors: Iterable[MovingTerm]) -> bool:
        kind = self._device.type
        for tensor in tensors:  # noqa: SIM110 - a generator costs a call for each tensor
            if tensor.dtype != self.dtype or tensor.device.type != kind:
                return False
        return True
