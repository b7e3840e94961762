"""The kernels under the codecs. ``reference`` is the definition; faster twins must give the same bytes.

``cpu`` holds fused steps for CPU tensors, compiled when first used; ``gpu`` those for CUDA tensors, compiled by Triton.
They are taken wherever they apply, and leave every byte as it is: which kernels ran is invisible but for the time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from compactdist.kernels.protocols import (
    Checksum,
    DeviceSteps,
    FarLarger,
    Frames,
    HistorySteps,
    Picks,
    Rounding,
    Steps,
)
from compactdist.kernels.queues import captures, queue_of, stream_of
from compactdist.kernels.reference import components, terms
from compactdist.kernels.reference import rounding as reference_rounding
from compactdist.kernels.reference.checksum import weighted_sum
from compactdist.kernels.reference.energies import energies as reference_energies
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
    Rounded,
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
    "energies",
    "far_larger_for",
    "frames_for",
    "history_steps_for",
    "picks_for",
    "queue_of",
    "restored",
    "rotate",
    "round_off",
    "rounding_for",
    "steps_for",
    "stream_of",
    "use",
    "write_sum",
]

MIN_ELEMENTS = 1 << 14
"""Below this the calls into the CPU kernels, and loading them, cost more than they save."""

_log = logging.getLogger("compactdist")


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
    return reference_rounding if made is None else made


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
        if isinstance(term.previous, Rounded):
            term = replace(term, base=restored(term.base), previous=restored(term.previous))
        _velocities_for(term).write_out(term, out)
    else:
        rounding_for(term.numel(), term.dtype, term.codes.dtype, term.device).dequantize(term.codes, term.scales, out)
    return out


def round_off(values: Tensor | Velocity, codes: Tensor, scales: Tensor, accepted: Tensor | None = None) -> None:
    """Round a flat, finite tensor to eight bits for each element: to a ``Rounded`` with these codes and scales.

    A velocity whose ``previous`` is in eight bits is worked out on the way, where there are kernels for it.

    Args:
        values: flat ``[numel]``.
        codes: as ``Rounding.quantize`` takes them.
        scales: likewise.
        accepted: likewise.
    """
    if not values.numel():
        return
    numel, dtype, device = values.numel(), values.dtype, values.device
    rounding = rounding_for(numel, dtype, codes.dtype, device)
    if isinstance(values, Velocity) and (rounding is reference_rounding or isinstance(values.previous, Tensor)):
        values = restored(values)
    rounding.quantize(values, codes, scales, accepted)


def _velocities_for(term: Velocity) -> ModuleType:
    """What writes out such a velocity: ``reference/terms.py``, or a compiled twin."""
    on_device = device_velocities_for(term.numel(), term.dtype, term.device)
    if on_device is not None:
        return on_device
    return cpu_velocities_for(term.numel(), term.dtype, term.device) or terms


def cpu_velocities_for(numel: int, dtype: torch.dtype, device: torch.device) -> ModuleType | None:
    """What weighs and writes out velocities of such tensors on a CPU, ``cpu/velocities.py``; ``None``: torch does."""
    if not _cpu_loops_take(numel, dtype, device):
        return None
    from compactdist.kernels.cpu import velocities

    return velocities


def _cpu_loops_take(numel: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether loops on a CPU that stand alone take such tensors."""
    if device.type != "cpu" or choice.forced == "gpu" or not cpu_runs(numel):
        return False
    from compactdist.kernels.cpu import steps

    return dtype in steps.DTYPES


def device_velocities_for(numel: int, dtype: torch.dtype, device: torch.device) -> ModuleType | None:
    """What makes and chooses velocities of such tensors on a device, ``gpu/velocities.py``; ``None``: torch does."""
    if not _gpu_runs(device):
        return None
    from compactdist.kernels.gpu import velocities

    return velocities if velocities.supports(dtype, numel) else None


def write_sum(terms: tuple[MovingTerm, ...], out: Tensor) -> None:
    """Write the sum of one or two terms to ``out``, flat and contiguous, kept finite and rounded once."""
    if _cpu_loops_take(out.numel(), out.dtype, out.device):
        from compactdist.kernels.cpu import terms as on_cpu

        on_cpu.write_sum(terms, out)
        return
    total = restored(terms[0])
    if len(terms) > 1:
        limit = torch.finfo(out.dtype).max
        total = total.float().add(restored(terms[1])).clamp_(-limit, limit)
    out.copy_(total)


def energies(x: Tensor, terms: tuple[MovingTerm, ...], value: Tensor) -> Tensor:
    """Sums of squares of a tensor, of what it differs by from its prediction, and of what its reconstruction loses.

    Args:
        x: flat ``[numel]``.
        terms: of the prediction.
        value: the reconstruction, flat, of the same dtype.

    Returns:
        float64 ``[3]`` on the device of ``x``, for which the host does not wait. Rounded otherwise on each device: only
        a sender may go by it.
    """
    numel, dtype, device = x.numel(), x.dtype, x.device
    if _gpu_runs(device):
        from compactdist.kernels.gpu import energies as on_device

        if on_device.supports(dtype, numel):
            return on_device.energies(x, terms, value)
    elif _cpu_loops_take(numel, dtype, device):
        from compactdist.kernels.cpu import energies as on_cpu

        return on_cpu.energies(x, terms, value)
    return reference_energies(x, terms, value)


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
