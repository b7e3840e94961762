"""What the Triton kernels need to know of a codec and a view, worked out once; and memory for their sums.

A plan holds small tables on the device, and making one copies them there: a step must have run once before it can be
captured in a CUDA graph (Triton compiles in that first run, too).
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import triton
from numpy.typing import NDArray
from torch import Tensor

from compactdist.codecs.scalar.binary import Binary
from compactdist.codecs.scalar.fp8 import _FORMATS, Fp8
from compactdist.codecs.scalar.int2 import Int2
from compactdist.codecs.scalar.int3 import Int3
from compactdist.codecs.scalar.int4 import Int4
from compactdist.codecs.scalar.int8 import Int8
from compactdist.codecs.scalar.layout import Layout
from compactdist.codecs.scalar.lloyd_max import LloydMaxQuantizer
from compactdist.codecs.scalar.scales import LARGEST_OF_MEAN, LEVEL_OF_TRITS
from compactdist.codecs.scalar.ternary import Ternary
from compactdist.kernels import gpu_codes as codes
from compactdist.kernels import gpu_elements as elements
from compactdist.kernels.places import place_of

if TYPE_CHECKING:
    from compactdist.codecs.scalar.quantized import ScalarQuantizer
    from compactdist.kernels.spec import MatrixView

KINDS: dict[type[ScalarQuantizer], int] = {
    Binary: codes.SIGN.value,
    Int2: codes.NEAREST.value,
    Int3: codes.NEAREST.value,
    Int4: codes.NEAREST.value,
    Ternary: codes.TERNARY.value,
    Int8: codes.LINEAR.value,
    Fp8: codes.FLOAT8.value,
}
INTERPRETED = bool(triton.knobs.runtime.interpret)
"""The kernels run on CPU tensors, and only there."""

UNITS_OF_TILE = 128 if INTERPRETED else 32
"""Eighths of the channels that one program sums up over a tile. No block size changes a result."""

MOST_ELEMENTS = 2**31 - 2**20
"""Kernels count in int32, and the last program of a pass may reach beyond the end."""

_MOST_PLANS = 256
_plans: dict[tuple[int, MatrixView, torch.device], tuple[ScalarQuantizer, Plan | None]] = {}
_here = threading.local()


class Place(NamedTuple):
    """Where the elements of a matrix lie: ``kind`` and tables as ``gpu_elements.in_rows`` takes them, int32."""

    kind: int
    row_at: Tensor
    column_at: Tensor


@dataclass(frozen=True, eq=False)
class Plan:
    """Of one codec, view and device.

    Attributes:
        layout: Of the payload.
        by_block: A scale covers one row of the layout, or a block: what ``gpu_blocks.py`` is for.
        kind, mantissa, widening, table, constant: Of the codec, as ``gpu_codes`` takes them.
        per: Codes of a unit, 8 or 5.
        whole, place, padded: As ``gpu_codes.in_memory`` takes them.
        whole_rows: As ``gpu_elements.in_rows`` takes it.
        blocks, pad, matrix_channels, numel: Likewise, in its ``where``.
        units: Of the section of codes, alignment included.
        tiles: Of 64 rows, in each group.
        channel_blocks: Of ``8 * UNITS_OF_TILE`` channels, in each row.
    """

    layout: Layout
    by_block: bool
    kind: int
    mantissa: int
    widening: int
    table: Tensor
    constant: float
    per: int
    whole: bool
    whole_rows: bool
    place: Place
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
        return {"KIND": self.kind, "BITS": self.layout.bits, "MANTISSA": self.mantissa}

    @property
    def place_flags(self) -> dict[str, Any]:
        """The constants that describe where coded elements lie."""
        return {"WHOLE": self.whole, "PADDED": self.padded, "PLACE": self.place.kind}


def plan_of(codec: ScalarQuantizer, view: MatrixView, device: torch.device) -> Plan | None:
    """The plan, or ``None`` where there are no kernels for the codec, its options or so many elements."""
    key = id(codec), view, device  # a codec's own hash costs more than a launch; what is stored keeps the id valid
    known = _plans.get(key)
    if known is None:
        if len(_plans) >= _MOST_PLANS:
            _plans.clear()
        known = _plans[key] = codec, _make(codec, view, device)
    return known[1]


def _make(codec: ScalarQuantizer, view: MatrixView, device: torch.device) -> Plan | None:
    if type(codec) not in KINDS or codec.scales not in ("token_channel", "block") or view.numel == 0:
        return None
    layout = codec.layout_of(view.shape)
    if layout.offsets or layout.elements > MOST_ELEMENTS:
        return None
    groups, rows, channels = view.shape
    blocks = layout.groups // groups
    pad = layout.elements // groups - rows * channels
    place = _place(view, device)
    per = 5 if layout.base3 else 8
    whole_rows = channels % 8 == 0 and view.numel % 8 == 0
    whole = per == 8 and (layout.channels % 8, pad % 8, view.numel % 8) == (0, 0, 0)
    if place.kind != elements.CONSECUTIVE.value:
        whole = whole and whole_rows
        if not whole and place.kind == elements.EIGHTS.value:
            place = _place(view, device, look_up_all=True)
    section = layout.row_scales_at
    return Plan(
        layout=layout,
        by_block=layout.rows == 1,
        kind=KINDS[type(codec)],
        mantissa=_FORMATS[codec.format].mantissa_bits if isinstance(codec, Fp8) else 0,
        widening=codec.widening,
        table=torch.tensor(_table(codec), dtype=torch.float32, device=device),
        constant=_constant(codec),
        per=per,
        whole=whole,
        whole_rows=whole_rows,
        place=place,
        padded=pad > 0 and (groups > 1 or place.kind != elements.CONSECUTIVE.value),
        blocks=blocks,
        pad=pad,
        matrix_channels=channels,
        numel=view.numel,
        units=section if layout.base3 else -(-section // layout.bits),
        tiles=-(-layout.rows // 64),
        channel_blocks=-(-layout.channels // (8 * UNITS_OF_TILE)),
    )


def _table(codec: ScalarQuantizer) -> list[float]:
    if not isinstance(codec, LloydMaxQuantizer):
        return [0.0]
    borders = [(low + high) / 2 for low, high in pairwise(codec.magnitudes)]
    return [*codec.magnitudes, *(-level for level in codec.magnitudes), *borders]


def _constant(codec: ScalarQuantizer) -> float:
    if isinstance(codec, LloydMaxQuantizer):
        return LARGEST_OF_MEAN / codec.magnitudes[0]
    if isinstance(codec, Fp8):
        return _FORMATS[codec.format].units
    return LEVEL_OF_TRITS if isinstance(codec, Ternary) else 127.0


def _place(view: MatrixView, device: torch.device, *, look_up_all: bool = False) -> Place:
    if view.axes is None:
        nothing = torch.zeros(1, dtype=torch.int32, device=device)
        return Place(elements.CONSECUTIVE.value, nothing, nothing)

    def on_device(at: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(at.astype(np.int32)).to(device)

    at = place_of(view)
    chunks = zip(at.chunk_from.tolist(), at.chunk_len.tolist(), strict=True)
    columns = np.concatenate([np.arange(first, first + length) for first, length in chunks])
    if not look_up_all and at.channels % 8 == 0 and not (at.row_at % 8).any():
        eights = columns.reshape(-1, 8)
        if not (eights[:, 0] % 8).any() and (eights == eights[:, :1] + np.arange(8)).all():
            return Place(elements.EIGHTS.value, on_device(at.row_at), on_device(eights[:, 0]))
    return Place(elements.SCATTERED.value, on_device(at.row_at), on_device(columns))


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


def scratch_of(plan: Plan, device: torch.device) -> Scratch:
    """Memory for a step.

    Kept for each thread and stream, whose steps follow one another; a step that is captured in a CUDA graph gets memory
    of its own, for its replays follow nothing.
    """
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return _parts(plan, None, device)
    key = device.index, torch.cuda.current_stream(device).cuda_stream
    if not hasattr(_here, "streams"):
        _here.streams = {}
    buffer, known = _here.streams.get(key, (None, {}))
    if plan not in known:
        needed, size = sum(_sizes(plan)), 0 if buffer is None else buffer.numel()
        if size < needed or len(known) >= _MOST_PLANS:
            buffer, known = _memory(max(needed, size), device), {}
            _here.streams[key] = buffer, known
        known[plan] = _parts(plan, buffer, device)
    parts: Scratch = known[plan]
    return parts


def _memory(size: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # or it could not be written to outside of the mode it was made in
        return torch.empty(size, dtype=torch.float32, device=device)


def _sizes(plan: Plan) -> list[int]:
    at = plan.layout
    scales = at.groups * at.channel_scales_per_group
    used = [4, 3 * at.groups, 0, 0, 0, 0, 0, 0, scales, scales, at.groups]
    if not plan.by_block:
        sums, weights = at.groups * plan.tiles * at.channels, at.groups * plan.tiles * plan.channel_blocks
        energies = sums if plan.kind in (codes.NEAREST.value, codes.TERNARY.value) else 0
        used[2:8] = [*[at.groups * at.rows] * 3, sums, energies, weights]
    return [-(-size // 4) * 4 for size in used]


def _parts(plan: Plan, buffer: Tensor | None, device: torch.device) -> Scratch:
    sizes = _sizes(plan)
    if buffer is None:
        buffer = _memory(sum(sizes), device)
    parts = buffer[: sum(sizes)].split(sizes)
    zeroed = buffer[: sizes[0] + sizes[1]].view(torch.int32)
    return Scratch(zeroed, zeroed[:1], zeroed[sizes[0] :], *parts[2:])
