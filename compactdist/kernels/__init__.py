"""The kernels under the codecs. ``reference`` is the definition; faster twins must give the same bytes.

``cpu`` holds fused steps for CPU tensors, compiled when first used; ``gpu`` those for CUDA tensors, compiled by Triton.
They are taken wherever they apply, and leave every byte as it is: which kernels ran is invisible but for the time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor

from compactdist.kernels.reference import components
from compactdist.kernels.reference.checksum import weighted_sum
from compactdist.kernels.reference.rotations import sweep
from compactdist.kernels.reference.samples import is_far_larger
from compactdist.kernels.sources import digest
from compactdist.kernels.spec import HeadPlaces, MatrixView, QuantizerSpec

if TYPE_CHECKING:
    from types import ModuleType

__all__ = [
    "MIN_ELEMENTS",
    "Checksum",
    "FarLarger",
    "DeviceSteps",
    "Frames",
    "HistorySteps",
    "Steps",
    "checksum_for",
    "choice",
    "component_steps_for",
    "cpu_runs",
    "digest",
    "far_larger_for",
    "frames_for",
    "history_steps_for",
    "rotate",
    "steps_for",
    "topk_steps_for",
    "use",
]

MIN_ELEMENTS = 1 << 14
"""Below this the calls into the CPU kernels, and loading them, cost more than they save."""

_log = logging.getLogger("compactdist")


class Steps(Protocol):
    """The steps of one stream, prepared once: everything that does not change between two steps is held here.

    Attributes:
        checksum: of the payload that the last :meth:`encode` wrote, or the last :meth:`decode` with ``sums`` read, if
            it was summed up on the way, else ``None``.
        sums: whether :meth:`decode` can sum up payloads.
    """

    checksum: int | None
    sums: bool

    def encode(self, x: Tensor, terms: tuple[Tensor, ...], out: Tensor | None, payload: Tensor) -> bool:
        """Write the payload of ``x`` less the sum of ``terms``, and to ``out`` what :meth:`decode` will give.

        Returns:
            Whether it was done; if not, ``out`` and ``payload`` hold anything, and the reference has to do it.
        """
        ...

    def decode(self, payload: Tensor, terms: tuple[Tensor, ...], out: Tensor, *, sums: bool = False) -> bool:
        """Write the sum of ``terms`` plus the decoded payload to ``out``, which may be the first of the terms.

        With ``sums``, sum up the payload on the way. It may be any bytes then, and ``out`` is to be none of the terms.

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
    ) -> bool:
        """As ``Steps.encode``."""
        ...

    def decode(self, payload: Tensor, terms: tuple[Tensor, ...], out: Tensor, scales: tuple[Tensor, Tensor]) -> bool:
        """As ``Steps.decode``."""
        ...


class DeviceSteps(Steps, Protocol):
    """Steps that nothing waits for: what they find out stays on the device."""

    def encode(
        self, x: Tensor, terms: tuple[Tensor, ...], out: Tensor | None, payload: Tensor, *, flag: Tensor | None = None
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
        sums: bool = False,
        accepted: Tensor | None = None,
    ) -> bool:
        """As ``Steps``; with ``accepted``, uint8, ``out`` stays as it was where the first of it is 0."""
        ...


class Frames(Protocol):
    """Seals or checks the frames of one end of a stream on a device."""

    def flag(self) -> Tensor:
        """For the encoder of the next frame that is sealed on this thread and CUDA stream: int32 ``[1]``, zero."""
        ...

    def seal(
        self,
        frame: Tensor,
        flag: Tensor,
        digests: Tensor,
        call: tuple[int, int, int],
        source: int,
        known: int,
    ) -> None:
        """Write the header of a frame whose payload is there.

        Args:
            frame: 1-D uint8, contiguous; the payload stands behind the header.
            flag: as the encoder left it.
            digests: int64 ``[2]``: the digest the frame is made against, and a place for the next one.
            call: step, epoch and sequence.
            source: which of the digests the frame is made against; 2: ``known``.
            known: a digest that the host knows.
        """
        ...

    def check(self, frame: Tensor, digests: Tensor, call: tuple[int, int, int], source: int, known: int) -> Tensor:
        """Compare a frame with the one that is expected. Arguments as for :meth:`seal`.

        Returns:
            uint8 ``[2]``, the same tensor every time: 1 if the frame is to be applied, 1 if it holds values.
        """
        ...


class _Choice:
    """Which kernels :func:`use` has forced. Whoever holds steps compares this with what it was when they were made."""

    __slots__ = ("forced",)

    def __init__(self) -> None:
        self.forced: str | None = None


choice = _Choice()


@contextmanager
def use(kernels: Literal["reference", "cpu", "gpu"]) -> Iterator[None]:
    """Run codecs on these kernels inside the block, in all threads; for tests and for finding faults.

    Args:
        kernels: ``"reference"`` for torch operations only; ``"cpu"`` for the fused steps on CPU tensors at every size;
            ``"gpu"`` for those of Triton, where its interpreter is switched on also on CPU tensors.

    Raises:
        ValueError: There are no kernels of this name.
        RuntimeError: Triton's kernels cannot run here: neither on a GPU nor interpreted.
    """
    if kernels not in ("reference", "cpu", "gpu"):
        raise ValueError(f"kernels are 'reference', 'cpu' or 'gpu', got {kernels!r}")
    if kernels == "gpu":
        _check_gpu()
    before, choice.forced = choice.forced, kernels
    try:
        yield
    finally:
        choice.forced = before


def _check_gpu() -> None:
    kernels = _gpu_steps()
    if kernels is None:
        raise RuntimeError("Triton cannot be imported, so there are no GPU kernels: pip install triton")
    if not kernels.INTERPRETED and not torch.cuda.is_available():
        raise RuntimeError(
            "there is no GPU here, and Triton's interpreter is off: to run the GPU kernels on CPU tensors, set "
            "TRITON_INTERPRET=1 before Triton is first imported"
        )


def steps_for(spec: QuantizerSpec, view: MatrixView, dtype: torch.dtype, device: torch.device) -> Steps | None:
    """Prepare the fused steps of one stream, or of one tensor.

    Args:
        spec: of the quantizer.
        view: how the flat tensors become matrices.
        dtype: of the tensors.
        device: of the tensors.

    Returns:
        The steps; ``None`` where the reference is to be used.
    """
    steps: Steps | None = None
    module = None
    if spec.scales == "token_history":
        return None  # history_steps_for has them
    if choice.forced == "gpu" or (device.type == "cuda" and choice.forced is None):
        module = _gpu_steps()
    elif device.type == "cpu" and cpu_runs(view.numel):
        from compactdist.kernels.cpu import steps as module
    if module is not None:
        steps = module.steps_of(spec, view, dtype, device)
    return steps


def history_steps_for(
    spec: QuantizerSpec, view: MatrixView, dtype: torch.dtype, device: torch.device
) -> HistorySteps | None:
    """As :func:`steps_for`, for ``scales="token_history"``; there are none for GPUs."""
    if device.type != "cpu" or not cpu_runs(view.numel):
        return None
    from compactdist.kernels.cpu import history_steps

    return history_steps.steps_of(spec, view, dtype, device)


def frames_for(device: torch.device) -> Callable[[bytes, HeadPlaces, int, Tensor, int], Frames] | None:
    """What seals and checks frames on a device; ``None`` where the host does it.

    Returns:
        Makes :class:`Frames` from the 128 bytes before the payload that all frames of a stream share, the places in
        them of what differs, the payload's bytes, the group's board (int32 ``[BOARD_WORDS]``) and the stream's number
        on it.
    """
    if choice.forced != "gpu" and (device.type != "cuda" or choice.forced is not None):
        return None
    steps = _gpu_steps()
    if steps is None or device.type != ("cpu" if steps.INTERPRETED else "cuda"):
        return None
    from compactdist.kernels.gpu.frames import FrameKernels

    return FrameKernels


def rotate(matrices: Tensor, basis: Tensor, sizes: Sequence[int], smallest: float) -> tuple[Tensor, Tensor]:
    """Turn symmetric matrices towards diagonal ones, and a basis along, as ``reference/rotations.py`` says."""
    if matrices.is_cpu and min(sizes) >= 4 and cpu_runs(8 * basis.numel() * max(sizes)):
        from compactdist.kernels.cpu import products

        return products.sweep(matrices, basis, sizes, smallest)
    return sweep(matrices, basis, sizes, smallest)


def component_steps_for(numel: int, device: torch.device) -> ModuleType:
    """What chooses and reads the levels of so many elements: ``reference/components.py``, or its compiled twin."""
    if device.type == "cpu" and cpu_runs(numel):
        from compactdist.kernels.cpu import component_steps

        return component_steps
    return components


def topk_steps_for(view: MatrixView, m: int, dtype: torch.dtype, device: torch.device) -> ModuleType | None:
    """The module with ``pick`` and ``spread`` for a stream's flat tensors; ``None`` where the reference is to be used.

    That is on other devices, for other dtypes, and where runs of m do not follow one another in memory. ``pick`` gives
    the bytes of ``reference/topk.py``.
    """
    in_order = view.axes is None and (view.groups == 1 or view.numel // max(view.groups, 1) % m == 0)
    if device.type != "cpu" or not in_order or not view.numel or not cpu_runs(view.numel):
        return None
    from compactdist.kernels.cpu import steps, topk_steps

    return topk_steps if dtype in steps.DTYPES else None


class Checksum(Protocol):
    """Sums up 1-D uint8 ``data``, and copies it to ``copy``, of the same size, on the way."""

    def __call__(self, data: Tensor, copy: Tensor | None = None) -> int: ...


def checksum_for(nbytes: int, device: torch.device) -> Checksum:
    """The function that sums up payloads of this many bytes; ``reference/checksum.py`` says how.

    Args:
        nbytes: of every payload.
        device: of the payloads, which are contiguous.
    """
    if device.type != "cpu" or nbytes % 4 or not cpu_runs(nbytes):
        return weighted_sum
    from compactdist.kernels.cpu import steps

    return steps.weighted_sum


FarLarger = Callable[[Tensor, tuple[Tensor, ...]], bool]
"""Whether a flat tensor less the sum of its terms, one or two, is far larger than the tensor."""


def far_larger_for(numel: int, dtype: torch.dtype, device: torch.device) -> FarLarger:
    """The function that judges the residuals of one stream; ``reference/samples.py`` says how.

    Args:
        numel: elements of every tensor.
        dtype: of the tensors.
        device: of the tensors.
    """
    if device.type != "cpu" or not cpu_runs(numel):
        return is_far_larger
    from compactdist.kernels.cpu import steps

    return steps.Samples(numel, dtype) if dtype in steps.DTYPES else is_far_larger


@cache
def _gpu_steps() -> ModuleType | None:
    try:
        from compactdist.kernels.gpu import steps
    except ImportError as error:
        _log.info("codecs run on torch operations on the GPU, much slower: Triton cannot be imported (%s)", error)
        return None
    return steps


def cpu_runs(numel: int) -> bool:
    """Whether the compiled kernels are to be used for CPU tensors of this size."""
    if choice.forced == "reference" or (numel < MIN_ELEMENTS and choice.forced is None):
        return False
    return _numba_is_there()


@cache
def _numba_is_there() -> bool:
    # not imported here: what is compiled already runs without it
    there = find_spec("numba") is not None
    if not there:
        _log.info("codecs run on torch operations, several times slower: there is no Numba")
    return there
