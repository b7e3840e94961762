"""Fused steps as Triton kernels for ``scales="token_history"``: all frames of a stream but the first.

Encoding reads x and base twice, and of many rows some a third time: row scales (``settle_rows``), sums of squares
(``sum_squares``), codes and new base (``codes.encode_codes``). The host waits to hear whether all sums are safe.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from compactdist.kernels.gpu import codes, history, scales
from compactdist.kernels.gpu.launch import Launch, Slot
from compactdist.kernels.gpu.launched import DECODING, TO_DECODE, Own
from compactdist.kernels.gpu.plan import UNITS_OF_TILE, Plan, plan_of
from compactdist.kernels.gpu.steps import (
    ENCODING,
    EXACT,
    PAYLOAD,
    REPORTED,
    ROWS,
    SCRATCH,
    SOURCE,
    UNROLL,
    WIDTH,
    TritonSteps,
    can_run,
    decoding_of,
    encode_codes_launch,
    tiles_of,
)
from compactdist.kernels.reference.history import FLOOR, rows_apart
from compactdist.kernels.spec import MatrixView, MovingTerm, QuantizerSpec

__all__ = ["TritonHistorySteps", "steps_of"]

# Behind what every encoding and decoding gives: the channel scales of this frame and of the next.
_ENCODING, _DECODING = ENCODING + 2, DECODING + 2
_C, _AFTER = Slot(ENCODING), Slot(ENCODING + 1)


def steps_of(
    spec: QuantizerSpec, view: MatrixView, dtype: torch.dtype, device: torch.device
) -> TritonHistorySteps | None:
    """The steps of one stream; ``None`` where there are no kernels, as for ``steps.steps_of``."""
    if not can_run(dtype, device) or not spec.sections_of(view.shape).wide_rows:
        return None
    plan = plan_of(spec, view, device)
    return None if plan is None else TritonHistorySteps(plan, dtype, device)


class TritonHistorySteps:
    """The steps of one stream, see ``kernels.HistorySteps``."""

    __slots__ = ("_steps", "checksum")

    def __init__(self, plan: Plan, dtype: torch.dtype, device: torch.device) -> None:
        self._steps = _Steps(plan, dtype, device)
        self.checksum: int | None = None

    def encode(
        self,
        x: Tensor,
        terms: tuple[MovingTerm, ...],
        out: Tensor | None,
        payload: Tensor,
        scales: tuple[Tensor, Tensor],
        *,
        copy: Tensor | None = None,
    ) -> bool:
        self._steps.scales = scales
        return self._steps.encode(x, terms, out, payload, copy=copy)

    def decode(
        self,
        payload: Tensor,
        terms: tuple[MovingTerm, ...],
        out: Tensor,
        scales: tuple[Tensor, Tensor],
        *,
        copy: Tensor | None = None,
    ) -> bool:
        self._steps.scales = scales
        return self._steps.decode(payload, terms, out, copy=copy)


class _Steps(TritonSteps):
    """As ``TritonSteps``, with ``scales`` given to every launch: those of this frame and those of the next."""

    __slots__ = ("scales",)

    scales: tuple[Tensor, Tensor]

    def to_encode(self, stream: int | None, lockstep: bool) -> Own:
        own, scales = super().to_encode(stream, lockstep), self.to_decode(stream)
        return Own((*own.tensors, *scales.tensors), own.pointers + scales.pointers)

    def to_decode(self, stream: int | None) -> Own:
        return Own(self.scales, tuple([tensor.data_ptr() for tensor in self.scales]))

    def encoding(self, terms: int, writes: bool, copies: bool, lockstep: bool) -> list[Launch]:
        plan = self.plan
        written = {"WRITES": writes, "COPIES": copies, "LOCKSTEP": lockstep}
        return [
            *_settle(plan, terms),
            encode_codes_launch(plan, terms, written, wire=_C, given=_ENCODING),
            _next_scales(plan, PAYLOAD, _C, _AFTER, _ENCODING),
        ]

    def decoding(self, terms: int, checked: bool, copies: bool) -> list[Launch]:
        plan, c, after = self.plan, Slot(DECODING), Slot(DECODING + 1)
        return [
            decoding_of(plan, terms, checked, copies, held=c, given=_DECODING),
            _next_scales(plan, TO_DECODE.payload, c, after, _DECODING),
        ]


def _settle(plan: Plan, terms: int) -> list[Launch]:
    """Row scales and the roots of the sums of squares. ``scratch.low`` holds the sum of ``c * c`` of each group."""
    at, scratch, offsets = plan.sections, SCRATCH, (plan.offsets.row_at, plan.offsets.column_at)
    place = {"PLACE": plan.offsets.kind, "WHOLE": plan.whole_rows, "TERMS": terms, "num_warps": 1, **EXACT}
    size, weights, apart = (at.rows, at.channels, plan.numel), scratch.low, rows_apart(at.rows)
    tiles = tiles_of(plan)
    launches = [
        Launch(
            history.take_scales, at.groups, (_C, scratch.inverse, weights, scratch.factors, at.channels),
            _ENCODING, {"num_warps": 1, **EXACT},
        ),
        Launch(
            history.settle_rows, at.groups * -(-at.rows // ROWS),
            (
                *SOURCE, *offsets, _C, scratch.inverse, weights, scratch.largest, PAYLOAD, at.row_scales_at, *size,
                plan.constant,
            ),
            _ENCODING, {"KIND": plan.kind, "WIDENING": plan.widening, "ROWS": ROWS, "UNROLL": UNROLL, **place},
        ),
        Launch(
            history.sum_squares, at.groups * -(-plan.tiles // tiles) * plan.channel_blocks,
            (*SOURCE, *offsets, scratch.first, *size, plan.tiles), _ENCODING,
            {"TILES": tiles, "UNITS": UNITS_OF_TILE, "APART": apart, "UNROLL": min(UNROLL, 64 // apart), **place},
        ),
    ]  # fmt: skip
    if plan.tiles > 64:
        half_of_all = 1 << ((plan.tiles - 1).bit_length() - 1)
        constants = {"KIND": codes.SIGN.value, "UNITS": UNITS_OF_TILE, "num_warps": 1, **EXACT}
        folded = (scratch.first, scratch.energy, scratch.weight, at.channels, plan.tiles, half_of_all)
        folding = at.groups * plan.channel_blocks * 64
        launches.append(Launch(scales.fold_many_tiles, folding, folded, _ENCODING, constants))
    arguments = (
        scratch.first, scratch.largest, scratch.flag, REPORTED, PAYLOAD, at.channels, plan.tiles,
        at.row_scales_at + 2 * at.row_scale_count, at.channel_scales_at,
        at.channel_scales_at + 2 * at.groups * at.channels, at.total_nbytes,
    )  # fmt: skip
    grid = at.groups * -(-at.channels // WIDTH)
    return [
        *launches,
        Launch(history.settle_roots, grid, arguments, _ENCODING, {"WIDTH": WIDTH, "num_warps": 4, **EXACT}),
    ]


def _next_scales(plan: Plan, payload: Slot, c: Slot, after: Slot, given: int) -> Launch:
    at = plan.sections
    arguments = (payload, c, after, at.channel_scales_at, at.channels, float(np.float32(FLOOR / at.channels)))
    return Launch(history.next_scales, at.groups, arguments, given, {"num_warps": 1, **EXACT})
