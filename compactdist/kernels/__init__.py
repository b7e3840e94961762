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

from compactdist.kernels.queues import captures, queue_of, stream_of
from compactdist.kernels.reference import components, rounding, terms
from compactdist.kernels.reference.checksum import weighted_sum
from compactdist.kernels.reference.rotations import sweep
from compactdist.kernels.reference.samples import is_far_larger
from compactdist.kernels.sources import digest
from compactdist.kernels.spec import (
    ComponentSpec,
    ComponentTables,
    FactorSpec,
    HeadPlaces,
    MatrixView,
    MovingTerm,
    QuantizerSpec,
    Velocity,
)

if TYPE_CHECKING:
    from types import ModuleType

    from compactdist.kernels.gpu.component_steps import ComponentSteps
    from compactdist.kernels.gpu.lowrank_steps import LowRankSteps

__all__ = [
    "MIN_ELEMENTS",
    "Checksum",
    "FarLarger",
    "DeviceSteps",
    "Frames",
    "HistorySteps",
    "Picks",
    "Rounding",
    "Steps",
    "captures",
    "checksum_for",
    "choice",
    "component_steps_for",
    "cpu_velocities_for",
    "cpu_runs",
    "device_component_steps_for",
    "device_lowrank_steps_for",
    "device_topk_steps_for",
    "device_velocities_for",
    "digest",
    "far_larger_for",
    "frames_for",
    "history_steps_for",
    "picks_for",
    "queue_of",
    "restored",
    "rotate",
    "rounding_for",
    "steps_for",
    "stream_of",
    "use",
]

MIN_ELEMENTS = 1 << 14
"""Below this the calls into the CPU kernels, and loading them, cost more than they save."""

_log = logging.getLogger("compactdist")


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

    def quantize(self, values: Tensor, codes: Tensor, scales: Tensor, accepted: Tensor | None = None) -> None:
        """Write the codes ``[numel]`` and the bfloat16 scales ``[ceil(numel / 128)]`` of finite values.

        With ``accepted``, uint8 ``[2]`` on the device, only where the first of it is not 0.
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
    """As :func:`steps_for`, for ``scales="token_history"``."""
    if choice.forced == "gpu" or (device.type == "cuda" and choice.forced is None):
        if not _gpu_runs(device):
            return None
        from compactdist.kernels.gpu import history_steps as on_device

        return on_device.steps_of(spec, view, dtype, device)
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
    if not _gpu_runs(device):
        return None
    from compactdist.kernels.gpu.ends import FrameEnds

    return FrameEnds


def device_component_steps_for(
    spec: ComponentSpec, tables: ComponentTables, view: MatrixView, dtype: torch.dtype, device: torch.device
) -> ComponentSteps | None:
    """The steps of a stream of components on a device that the host does not wait for; ``None`` where there are none.

    Args:
        spec: of the codec and view.
        tables: of the codec, on the device.
        view: of the stream's flat tensors.
        dtype: of these tensors.
        device: of these tensors.
    """
    if not _gpu_runs(device):
        return None
    from compactdist.kernels.gpu import component_steps

    return component_steps.steps_of(spec, tables, view, dtype, device)


def rounding_for(numel: int, dtype: torch.dtype, codes: torch.dtype, device: torch.device) -> Rounding:
    """What rounds tensors to eight bits for each element, and back.

    Args:
        numel: elements of the tensors.
        dtype: of the tensors.
        codes: dtype of the codes, see ``spec.RoundedForm``.
        device: of the tensors.
    """
    made: Rounding | None = None
    if _gpu_runs(device):
        from compactdist.kernels.gpu import rounding as on_device

        made = on_device.rounding_of(numel, dtype, codes, device)
    elif device.type == "cpu" and cpu_runs(numel):
        from compactdist.kernels.cpu import rounding_steps, steps

        made = rounding_steps if dtype in steps.DTYPES else None
    return rounding if made is None else made


def restored(term: MovingTerm, out: Tensor | None = None) -> Tensor:
    """The term as a tensor, flat ``[numel]`` of its dtype; a tensor as it is.

    ``out``: contiguous; holds what is made of another term.
    """
    if isinstance(term, Tensor):
        return term
    if out is None:
        out = torch.empty(term.numel(), dtype=term.dtype, device=term.device)
    if not term.numel():
        return out
    if isinstance(term, Velocity):
        _velocities_for(term).write_out(term, out)
    else:
        rounding_for(term.numel(), term.dtype, term.codes.dtype, term.device).dequantize(term.codes, term.scales, out)
    return out


def _velocities_for(term: Velocity) -> ModuleType:
    """What writes out such a velocity: ``reference/terms.py``, or a compiled twin."""
    on_device = device_velocities_for(term.numel(), term.dtype, term.device)
    if on_device is not None:
        return on_device
    return cpu_velocities_for(term.numel(), term.dtype, term.device) or terms


def cpu_velocities_for(numel: int, dtype: torch.dtype, device: torch.device) -> ModuleType | None:
    """What weighs and writes out velocities of such tensors on a CPU, ``cpu/velocities.py``; ``None``: torch does."""
    if device.type != "cpu" or choice.forced == "gpu" or not cpu_runs(numel):
        return None
    from compactdist.kernels.cpu import steps, velocities

    return velocities if dtype in steps.DTYPES else None


def device_velocities_for(numel: int, dtype: torch.dtype, device: torch.device) -> ModuleType | None:
    """What makes and chooses velocities of such tensors on a device, ``gpu/velocities.py``; ``None``: torch does."""
    if not _gpu_runs(device):
        return None
    from compactdist.kernels.gpu import velocities

    return velocities if velocities.supports(dtype, numel) else None


def rotate(matrices: Tensor, basis: Tensor, sizes: Sequence[int], smallest: float) -> tuple[Tensor, Tensor]:
    """Turn symmetric matrices towards diagonal ones, and a basis along, as ``reference/rotations.py`` says."""
    if matrices.is_cpu and min(sizes) >= 4 and cpu_runs(8 * basis.numel() * max(sizes)):
        from compactdist.kernels.cpu import products

        return products.sweep(matrices, basis, sizes, smallest)
    if _gpu_runs(matrices.device) and min(sizes) == max(sizes) >= 4:
        from compactdist.kernels.gpu import rotations

        same = torch.full((len(sizes),), sizes[0], dtype=torch.int32, device=matrices.device)
        return rotations.sweep(matrices, basis, same, smallest)
    return sweep(matrices, basis, sizes, smallest)


def component_steps_for(numel: int, device: torch.device) -> ModuleType:
    """What chooses and reads the levels of so many elements: ``reference/components.py``, or its compiled twin."""
    if device.type == "cpu" and cpu_runs(numel):
        from compactdist.kernels.cpu import component_steps

        return component_steps
    return components


def picks_for(view: MatrixView, m: int, dtype: torch.dtype, device: torch.device) -> Picks | None:
    """What keeps one of m elements of a stream's flat tensors; ``None`` where the reference is to be used.

    That is on other devices, for other dtypes, and where runs of m do not follow one another in memory.
    """
    in_order = view.axes is None and (view.groups == 1 or view.rows * view.channels % m == 0)
    if device.type != "cpu" or not in_order or not view.numel or not cpu_runs(view.numel):
        return None
    from compactdist.kernels.cpu import steps, topk_steps

    runs = view.groups * -(-view.rows * view.channels // m)
    return topk_steps.Picks(m, runs) if dtype in steps.DTYPES else None


def device_topk_steps_for(
    view: MatrixView, m: int, values: QuantizerSpec | None, dtype: torch.dtype, device: torch.device
) -> DeviceSteps | None:
    """The steps of a stream of ``topk`` on a device that the host does not wait for; ``None`` where there are none.

    Args:
        view: of its flat tensors.
        m: elements of a run.
        values: of what codes the kept elements, seen as ``(G, 1, K)``; ``None``: they are bfloat16.
        dtype: of its tensors.
        device: of its tensors.
    """
    if not _gpu_runs(device):
        return None
    from compactdist.kernels.gpu import topk_steps

    return topk_steps.steps_of(view, m, values, dtype, device)


def device_lowrank_steps_for(
    spec: FactorSpec, view: MatrixView, dtype: torch.dtype, device: torch.device
) -> LowRankSteps | None:
    """The steps of a stream of thin factors on a device that the host does not wait for; ``None`` if there are none.

    Args:
        spec: of the codec.
        view: of its flat tensors.
        dtype: of its tensors.
        device: of its tensors.
    """
    if not _gpu_runs(device):
        return None
    from compactdist.kernels.gpu import lowrank_steps

    return lowrank_steps.steps_of(spec, view, dtype, device)


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


FarLarger = Callable[[Tensor, tuple[MovingTerm, ...]], bool]
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


def _gpu_runs(device: torch.device) -> bool:
    """Whether Triton's kernels are to be used for tensors of a device."""
    if choice.forced != "gpu" and (device.type != "cuda" or choice.forced is not None):
        return False
    steps = _gpu_steps()
    return steps is not None and device.type == steps.DEVICE_TYPE


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
