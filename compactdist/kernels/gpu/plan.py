"""What the Triton kernels need to know of a codec and a view, worked out once; and memory for their sums.

A plan holds small tables on the device, and making one copies them there: a step must have run once before it can be
captured in a CUDA graph (Triton compiles in that first run, too).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
from numpy.typing import NDArray
from torch import Tensor

from compactdist.kernels.gpu import codes, elements
from compactdist.kernels.offsets import offsets_of
from compactdist.kernels.reference.scales import LARGEST_OF_MEAN, LEVEL_OF_TRITS
from compactdist.kernels.sections import Sections
from compactdist.kernels.spec import FLOAT8, MatrixView, QuantizerSpec

KINDS: dict[str, int] = {
    "sign": codes.SIGN.value,
    "nearest": codes.NEAREST.value,
    "trits": codes.TERNARY.value,
    "linear": codes.LINEAR.value,
    "e4m3": codes.FLOAT8.value,
    "e5m2": codes.FLOAT8.value,
}
INTERPRETED = bool(triton.knobs.runtime.interpret)
"""The kernels run on CPU tensors, and only there."""

DEVICE_TYPE = "cpu" if INTERPRETED else "cuda"
"""Of the tensors that the kernels take."""

UNITS_OF_TILE = 128 if INTERPRETED else 32
"""Eighths of the channels that one program sums up over a tile. No block size changes a result."""

MOST_ELEMENTS = 2**31 - 2**20
"""Kernels count in int32, and the last program of a pass may reach beyond the end."""

_MOST_PLANS = 256
_MOST_BUCKET_BITS = 12
_here = threading.local()


class Offsets(NamedTuple):
    """Where the elements of a matrix lie: ``kind`` and tables as ``elements.in_rows`` takes them, int32."""

    kind: int
    row_at: Tensor
    column_at: Tensor


@dataclass(frozen=True, eq=False)
class Plan:
    """Of one codec, view and device.

    Attributes:
        sections: Of the payload.
        by_block: A scale covers one row of the sections, or a block: what ``blocks.py`` is for.
        kind, mantissa, widening, table, constant: Of the codec, as ``codes`` takes them.
        per: Codes of a unit, 8 or 5.
        whole, offsets, padded: As ``codes.in_memory`` takes them.
        whole_rows: As ``elements.in_rows`` takes it.
        blocks, pad, matrix_channels, numel: Likewise, in its ``where``.
        units: Of the section of codes, alignment included.
        tiles: Of 64 rows, in each group.
        channel_blocks: Of ``8 * UNITS_OF_TILE`` channels, in each row.
    """

    sections: Sections
    by_block: bool
    kind: int
    mantissa: int
    widening: int
    table: Tensor
    constant: float
    per: int
    whole: bool
    whole_rows: bool
    offsets: Offsets
    padded: bool
    blocks: int
    pad: int
    matrix_channels: int
    numel: int
    units: int
    tiles: int
    channel_blocks: int

    @property
    def codec_flags(self) -> dict[str, Any]:
        """The constants that describe a code."""
        return {"KIND": self.kind, "BITS": self.sections.bits, "MANTISSA": self.mantissa}

    @property
    def offsets_flags(self) -> dict[str, Any]:
        """The constants that describe where coded elements lie."""
        return {"WHOLE": self.whole, "PADDED": self.padded, "PLACE": self.offsets.kind}


@lru_cache(maxsize=256)
def plan_of(spec: QuantizerSpec, view: MatrixView, device: torch.device) -> Plan | None:
    """The plan, or ``None`` where there are no kernels for so many elements, for none, or for such levels."""
    sections = spec.sections_of(view.shape)
    table = table_of(spec.magnitudes)
    if view.numel == 0 or sections.elements > MOST_ELEMENTS or table is None:
        return None
    groups, rows, channels = view.shape
    blocks = sections.groups // groups
    pad = sections.elements // groups - rows * channels
    offsets = offsets_on(view, device)
    per = 5 if sections.base3 else 8
    whole_rows = channels % 8 == 0 and view.numel % 8 == 0
    whole = per == 8 and (sections.channels % 8, pad % 8, view.numel % 8) == (0, 0, 0)
    if offsets.kind != elements.CONSECUTIVE.value:
        whole = whole and whole_rows
        if not whole and offsets.kind == elements.EIGHTS.value:
            offsets = offsets_on(view, device, look_up_all=True)
    section = sections.row_scales_at
    return Plan(
        sections=sections,
        by_block=sections.rows == 1,
        kind=KINDS[spec.kind],
        mantissa=FLOAT8[spec.kind].mantissa_bits if spec.kind in FLOAT8 else 0,
        widening=spec.roots,
        table=torch.tensor(table, dtype=torch.float32, device=device),
        constant=_constant(spec),
        per=per,
        whole=whole,
        whole_rows=whole_rows,
        offsets=offsets,
        padded=pad > 0 and (groups > 1 or offsets.kind != elements.CONSECUTIVE.value),
        blocks=blocks,
        pad=pad,
        matrix_channels=channels,
        numel=view.numel,
        units=section if sections.base3 else -(-section // sections.bits),
        tiles=-(-sections.rows // 64),
        channel_blocks=-(-sections.channels // (8 * UNITS_OF_TILE)),
    )


def table_of(magnitudes: Sequence[float]) -> list[float] | None:
    """As the kernels of ``codes.py`` take it; a zero where there are no magnitudes.

    Of eight magnitudes seven borders are followed by a power of two that brings all of them below 1, by a number that
    rounds to a bucket where it is added, by a zero, and by a pair for each bucket: its border, or infinity, and how
    many borders lie below it, an int32. Values of 1 and more are in the last bucket. No bucket has two borders;
    ``None`` where they are so near to one another that it would take too many buckets.
    """
    borders = np.array([(low + high) / 2 for low, high in pairwise(magnitudes)], dtype=np.float32)
    table = [*magnitudes, *(-level for level in magnitudes), *borders.tolist()] or [0.0]
    if len(magnitudes) != 8:
        return table
    power = 2.0 ** -int(np.frexp(borders[-1])[1])
    for bits in range(3, _MOST_BUCKET_BITS + 1):
        rounding = np.float32(2.0 ** (23 - bits))
        bucket = ((borders * np.float32(power) + rounding).view(np.int32) - rounding.view(np.int32)).tolist()
        if len(set(bucket)) == len(bucket):
            break
    else:
        return None
    pairs = np.empty(((1 << bits) + 1, 2), dtype=np.float32)
    pairs[:, 0] = np.inf
    pairs[bucket, 0] = borders * np.float32(power)
    pairs[:, 1] = np.searchsorted(bucket, np.arange(len(pairs))).astype(np.int32).view(np.float32)
    return [*table, power, float(rounding), 0.0, *pairs.ravel().tolist()]


def _constant(spec: QuantizerSpec) -> float:
    if spec.roots:
        return LARGEST_OF_MEAN / spec.magnitudes[0]
    return LEVEL_OF_TRITS if spec.kind == "trits" else spec.reach


def offsets_on(view: MatrixView, device: torch.device, *, look_up_all: bool = False) -> Offsets:
    """Where the elements of a view lie; with ``look_up_all`` never ``EIGHTS``."""
    if view.axes is None:
        nothing = torch.zeros(1, dtype=torch.int32, device=device)
        return Offsets(elements.CONSECUTIVE.value, nothing, nothing)

    def on_device(at: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(at.astype(np.int32)).to(device)

    at = offsets_of(view)
    chunks = zip(at.chunk_from.tolist(), at.chunk_len.tolist(), strict=True)
    columns = np.concatenate([np.arange(first, first + length) for first, length in chunks])
    if not look_up_all and at.channels % 8 == 0 and not (at.row_at % 8).any():
        eights = columns.reshape(-1, 8)
        if not (eights[:, 0] % 8).any() and (eights == eights[:, :1] + np.arange(8)).all():
            return Offsets(elements.EIGHTS.value, on_device(at.row_at), on_device(eights[:, 0]))
    return Offsets(elements.SCATTERED.value, on_device(at.row_at), on_device(columns))


class Scratch(NamedTuple):
    """Memory for one step, in parts. ``zeroed`` begins with ``flag`` and goes on with ``largest``."""

    zeroed: Tensor
    flag: Tensor
    largest: Tensor
    statistic: Tensor
    low: Tensor
    row_weights: Tensor
    first: Tensor
    energy: Tensor
    weight: Tensor
    inverse: Tensor
    wire: Tensor
    factors: Tensor


class Memory(NamedTuple):
    """Scratch, and the addresses of its parts."""

    scratch: Scratch
    pointers: tuple[int, ...]


def scratch_of(plan: Plan, device: torch.device, stream: int | None) -> Memory:
    """Memory for a step on the current stream, whose number is ``stream``; ``None`` on the CPU.

    Kept for each thread and stream, whose steps follow one another; a step that is captured in a CUDA graph gets memory
    of its own, for its replays follow nothing.
    """
    if stream is None or torch.cuda.is_current_stream_capturing():
        return _parts(plan, None, device)
    try:
        streams = _here.streams
    except AttributeError:
        streams = _here.streams = {}
    key = device.index, stream
    buffer, known = streams.get(key, (None, {}))
    memory: Memory | None = known.get(plan)
    if memory is None:
        needed, size = sum(_sizes(plan)), 0 if buffer is None else buffer.numel()
        if size < needed or len(known) >= _MOST_PLANS:
            buffer, known = _memory(max(needed, size), device), {}
            streams[key] = buffer, known
        memory = known[plan] = _parts(plan, buffer, device)
    return memory


def floats_of(
    sizes: tuple[int, ...], device: torch.device, stream: int | None
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """float32 of these sizes, each a multiple of 4, and their addresses; kept as :func:`scratch_of` keeps memory.

    They are not the memory of a scratch.
    """
    if stream is None or torch.cuda.is_current_stream_capturing():
        return _split(_memory(sum(sizes), device), sizes)
    try:
        streams = _here.floats
    except AttributeError:
        streams = _here.floats = {}
    key = device.index, stream
    buffer, known = streams.get(key, (None, {}))
    found: tuple[tuple[Tensor, ...], tuple[int, ...]] | None = known.get(sizes)
    if found is None:
        needed, size = sum(sizes), 0 if buffer is None else buffer.numel()
        if size < needed or len(known) >= _MOST_PLANS:
            buffer, known = _memory(max(needed, size), device), {}
            streams[key] = buffer, known
        found = known[sizes] = _split(buffer, sizes)
    return found


def _split(buffer: Tensor, sizes: tuple[int, ...]) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    parts = buffer[: sum(sizes)].split(list(sizes))
    return tuple(parts), tuple([part.data_ptr() for part in parts])


def _memory(size: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # or it could not be written to outside of the mode it was made in
        return torch.empty(size, dtype=torch.float32, device=device)


def _sizes(plan: Plan) -> list[int]:
    at = plan.sections
    scales = at.groups * at.channel_scales_per_group
    used = [4, 0, 0, 0, 0, 0, 0, 0, scales, scales, at.groups]
    if not plan.by_block:
        sums, weights = at.groups * plan.tiles * at.channels, at.groups * plan.tiles * plan.channel_blocks
        energies = sums if plan.kind in (codes.NEAREST.value, codes.TERNARY.value) else 0
        used[1:8] = [3 * at.groups, *[at.groups * at.rows] * 3, sums, energies, weights]
    return [-(-size // 4) * 4 for size in used]


def _parts(plan: Plan, buffer: Tensor | None, device: torch.device) -> Memory:
    sizes = _sizes(plan)
    if buffer is None:
        buffer = _memory(sum(sizes), device)
    parts = buffer[: sum(sizes)].split(sizes)
    zeroed = buffer[: sizes[0] + sizes[1]].view(torch.int32)
    scratch = Scratch(zeroed, zeroed[:1], zeroed[sizes[0] :], *parts[2:])
    return Memory(scratch, tuple([part.data_ptr() for part in scratch]))
