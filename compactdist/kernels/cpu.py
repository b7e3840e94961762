"""Fused steps of the scalar quantizers on CPU tensors: from x and base to payload and new base, and from payload and
base to new base, without a residual in memory.

The bytes are those of ``quantized.py`` on top of ``reference.py``. Passes over the elements are compiled loops
(``cpu_loops.py``, ``cpu_blocks.py``); ``cpu_settle.py`` makes the scales between them. Where values come
near the ends of float32 the steps decline, and the reference does the work.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compactdist.codecs.scalar.layout import Layout
from compactdist.kernels import cpu_blocks, reference
from compactdist.kernels import cpu_loops as loops
from compactdist.kernels import cpu_surveys as surveys
from compactdist.kernels.cpu_common import DTYPES, Plan, bits_of, expectation, pack_apart, plan_for
from compactdist.kernels.cpu_decode import decode_residual
from compactdist.kernels.cpu_memory import CACHE_LINE
from compactdist.kernels.cpu_settle import LINEAR, NEAREST, SIGN, TRITS, fold_tiles, settle_channels, settle_rows
from compactdist.kernels.threads import spread

if TYPE_CHECKING:
    from compactdist.codecs.scalar.quantized import ScalarQuantizer
    from compactdist.kernels.spec import MatrixView

__all__ = ["decode_residual", "encode_residual", "supports"]

STREAMED_NBYTES = 1 << 21
"""Below this, what is written may still lie in a cache when it is read again."""


class _Call(NamedTuple):
    codec: ScalarQuantizer
    plan: Plan
    source: tuple[NDArray[Any], NDArray[Any], NDArray[Any], int]
    packed: NDArray[np.uint8]
    written: NDArray[np.uint8]
    out: NDArray[Any]
    streams: tuple[bool, bool]

    @property
    def stored(self) -> NDArray[np.uint16]:
        """Where the channel scales belong in the payload."""
        layout = self.plan.layout
        nbytes = 2 * layout.groups * layout.channel_scales_per_group
        return self.written[layout.channel_scales_at :][:nbytes].view(np.uint16)

    def spread(self, loop: Callable[..., None], *arguments: Any, backwards: bool = False) -> None:
        """Run a loop that goes by rows or blocks, all of them; its parts come first among its arguments."""
        elements = self.plan.layout.elements
        spread(lambda parts: loop(parts, *arguments), self.plan.row_count, elements, backwards=backwards)


def supports(codec: ScalarQuantizer, view: MatrixView, *tensors: Tensor | None) -> bool:
    """Whether the fused steps apply: tensors of one known dtype on the CPU, and a form of codec the loops know."""
    given = [tensor for tensor in tensors if tensor is not None]
    if view.numel == 0 or codec.offsets or any(tensor.device.type != "cpu" for tensor in given):
        return False
    if given[0].dtype not in DTYPES or any(tensor.dtype != given[0].dtype for tensor in given):
        return False
    plan = plan_for(codec, view)
    if plan is None or (plan.layout.rows == 1 and codec.base3):
        return False
    # signs are packed as they are found, so they have to fill their bytes
    return codec.fused != "sign" or not plan.apart


def encode_residual(
    codec: ScalarQuantizer,
    x: Tensor,
    terms: tuple[Tensor, ...],
    view: MatrixView,
    out: Tensor | None,
    payload: Tensor | None = None,
) -> Tensor | None:
    """Encode ``x`` less the sum of ``terms`` and, if ``out`` is given, write there what the receiver will hold.

    Args:
        codec: how.
        x: flat.
        terms: what is expected, each flat.
        view: how the buffer becomes a matrix.
        out: flat; may be the first of the terms.
        payload: uint8 buffer to write to; a new one unless given.

    Returns:
        The payload, or ``None`` if the residual is not finite or too close to the ends of float32. ``out`` may have
        been written to then, unless it is one of the terms.
    """
    plan = plan_for(codec, view)
    assert plan is not None  # supports() said so
    layout = plan.layout
    if payload is None:
        payload = torch.empty(layout.total_nbytes, dtype=torch.uint8)
    written = bits_of(payload, torch.uint8)
    _clear_padding(written, layout)
    codes = written[: layout.codes_nbytes]
    packed = np.empty(layout.elements, np.uint8) if plan.apart else codes
    source = bits_of(x, x.dtype), *expectation(terms, x.dtype)
    in_place = out is not None and bool(terms) and out.data_ptr() == terms[0].data_ptr()
    streams = not in_place and _streams(out), not plan.apart and _streams(payload)
    call = _Call(codec, plan, source, packed, written, bits_of(out, x.dtype), streams)
    if not (_encode_blocks(call, in_place) if layout.rows == 1 else _encode_rows(call)):
        return None
    if plan.apart:
        pack_apart(codec, packed, codes)
    if layout.rows == 1 and in_place and out is not None:
        decode_residual(codec, payload, terms, view, out)
    return payload


def _streams(out: Tensor | None) -> bool:
    """Whether to write a new base, or codes, past the caches. They are read in the next step, or by whoever sends them,
    and a line that is written without having been read need not be fetched.
    """
    return out is not None and out.nbytes >= STREAMED_NBYTES and out.data_ptr() % CACHE_LINE == 0


def _clear_padding(written: NDArray[np.uint8], layout: Layout) -> None:
    written[layout.codes_nbytes : layout.row_scales_at] = 0
    written[layout.row_scales_at + layout.row_scale_count : layout.channel_scales_at] = 0
    written[layout.channel_scales_at + 2 * layout.groups * layout.channel_scales_per_group :] = 0


def _encode_blocks(call: _Call, in_place: bool) -> bool:
    """Fill in codes and scales and, unless in place, the receiver's values; false to decline."""
    codec, plan, bad = call.codec, call.plan, np.zeros(1, np.uint8)
    # the base must be whole if a later block turns out not to be finite
    out = call.out[:0] if in_place else call.out
    given, one = (call.source, plan.place, call.packed, call.stored, bad, out, call.streams), call.source[3] == 1

    def blocks(loop: Callable[..., None], *after: Any) -> None:
        def some(parts: NDArray[np.int64]) -> None:
            kept = torch.empty(cpu_blocks.kept_for(plan.layout.channels)).numpy()
            loop(parts, kept, *given, *after)

        spread(some, plan.row_count, plan.layout.elements)

    if plan.kind == SIGN:
        blocks(cpu_blocks.block_signs(one))
    elif plan.kind >= LINEAR:
        blocks(cpu_blocks.block_reaching(one, plan.kind), plan.bound)
    else:
        levels = plan.grain, plan.borders, plan.table
        blocks(cpu_blocks.block_nearest(one, plan.bits), *levels, codec.widening, plan.bound)
    return not bad[0]


def _encode_rows(call: _Call) -> bool:
    """Fill in codes, scales and the receiver's values; false to decline."""
    codec, plan = call.codec, call.plan
    layout, place = plan.layout, plan.place
    groups, rows, channels, one = layout.groups, layout.rows, layout.channels, call.source[3] == 1
    tiles = -(-rows // reference.TILE_ROWS)
    stat, weighted = np.empty(groups * rows, np.float32), bool(layout.row_scale_count)
    # arrays of torch begin a cache line, those of NumPy need not
    first = torch.empty(groups * tiles * channels).numpy()
    second = torch.empty(first.size if plan.kind in (NEAREST, TRITS) else 0).numpy()

    def survey(loop: Callable[..., None], *after: Any) -> None:
        def some_tiles(parts: NDArray[np.int64]) -> None:
            row = torch.empty(channels + reference.LANES).numpy()
            loop(parts, call.source, place, weighted, row, stat, *after)

        spread(some_tiles, groups * tiles, layout.elements)

    if plan.kind == SIGN:
        survey(surveys.survey_signs, first, call.packed)
    elif plan.kind >= LINEAR:
        survey(surveys.survey_reach, first)
    else:
        survey(surveys.survey_moments, first, second)
    t, inverse_t = np.ones(groups * rows, np.float32), np.ones(groups * rows, np.float32)
    norms, stored = np.empty(groups, np.float32), call.stored
    row_bytes = call.written[layout.row_scales_at : layout.row_scales_at + layout.row_scale_count]
    if not settle_rows(stat, weighted, rows, row_bytes, t, inverse_t, norms):
        return False
    runs, largest = -(-channels // reference.LANES), plan.kind >= LINEAR
    spread(lambda parts: fold_tiles(parts, first, second, tiles, channels, largest), groups * runs, first.size)
    c, inverse_c = torch.empty(2, groups * channels).numpy()
    sums, shared = (norms, first, second, plan.bound, codec.widening), layout.channel_scales_per_group == 1
    settle_channels(plan.kind, stat, weighted, rows, channels, *sums, shared, c, inverse_c, stored)
    again = functools.partial(call.spread, backwards=True)
    given = call.source, place, call.packed, call.out, call.streams, t, inverse_t, c, inverse_c
    if plan.kind >= LINEAR:
        again(loops.code_reaching(one, plan.kind), *given)
    elif plan.kind != SIGN:
        inverse_t *= plan.grain
        again(loops.code_nearest(one, plan.bits, plan.kind == TRITS), *given, plan.borders, plan.table)
    elif call.out.size:
        source = call.source[1], *call.source[1:]
        again(loops.apply_codes(one, SIGN, 1), source, *given[1:5], t, c, plan.table)
    return True
