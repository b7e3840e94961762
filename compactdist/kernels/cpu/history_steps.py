"""Fused steps on CPU tensors for ``scales="token_history"``: one pass over x and terms for each of both ends."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from compactdist.kernels.cpu import call
from compactdist.kernels.cpu.call import LINEAR, SIGN, TRITS, Work
from compactdist.kernels.cpu.native import address_of
from compactdist.kernels.cpu.steps import DTYPES, Block, CpuSteps, Plan, plan_of
from compactdist.kernels.reference import LANES
from compactdist.kernels.reference.history import rows_apart
from compactdist.kernels.spec import MatrixView, MovingTerm, QuantizerSpec

__all__ = ["CpuHistorySteps", "steps_of"]


class HistoryPlan(Plan):
    """As ``Plan``, for sections with wide rows."""

    def encoder(self, terms: int) -> Block:
        at, dtype = self.sections, self.dtype
        if self.kind == SIGN:
            body = address_of("history.code_signs", dtype, terms)
        elif self.kind >= LINEAR:
            body = address_of("history.code_reaching", dtype, terms, self.kind)
        else:
            body = address_of("history.code_nearest", dtype, terms, self.bits, self.borders, self.kind == TRITS)
        tiles, runs = self.slots[call.TILES], -(-at.channels // LANES)
        works = {
            call.FIRST_PASS: Work(at.groups * tiles, at.elements, body),
            call.FOLD: Work(at.groups * runs, at.groups * tiles * at.channels, address_of("history.fold_squares")),
        }
        if self.apart:
            works[call.APART_PASS] = self._apart("pack")
        return Block(address_of("history.encode"), self.slots | {call.ROW_WORDS: self.row_words}, works)

    @property
    def decoding(self) -> str:
        return "history.decode"


def steps_of(spec: QuantizerSpec, view: MatrixView, dtype: torch.dtype, device: torch.device) -> CpuHistorySteps | None:
    """The steps of one stream; ``None`` where the loops do not apply: as for ``steps.steps_of``."""
    sections = spec.sections_of(view.shape)
    if device.type != "cpu" or dtype not in DTYPES or not sections.wide_rows:
        return None
    narrow = plan_of(replace(spec, scales="token_channel"), view, DTYPES[dtype])
    return None if narrow is None else CpuHistorySteps(narrow, spec, view, dtype)


class CpuHistorySteps:
    """The steps of one stream, see ``kernels.HistorySteps``. One thread at a time may take one."""

    __slots__ = ("_addresses", "_steps", "checksum")

    def __init__(self, narrow: Plan, spec: QuantizerSpec, view: MatrixView, dtype: torch.dtype) -> None:
        at = spec.sections_of(view.shape)
        self._addresses = np.zeros(2, np.int64)
        slots = narrow.slots | {
            call.HISTORY: self._addresses.ctypes.data,
            call.ROWS_APART: rows_apart(at.rows),
            call.ROW_SCALE_COUNT: 2 * at.row_scale_count,
            call.CHANNEL_SCALES_AT: at.channel_scales_at,
            call.TOTAL_NBYTES: at.total_nbytes,
        }
        plan = HistoryPlan(*narrow._replace(sections=at, slots=slots))
        self._steps = CpuSteps(plan, view.numel, dtype)
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
        addresses, steps = self._addresses, self._steps
        addresses[0], addresses[1] = scales[0].data_ptr(), scales[1].data_ptr()
        done = steps.encode(x, terms, out, payload, copy=copy)
        self.checksum = steps.checksum
        return done

    def decode(
        self,
        payload: Tensor,
        terms: tuple[MovingTerm, ...],
        out: Tensor,
        scales: tuple[Tensor, Tensor],
        *,
        copy: Tensor | None = None,
    ) -> bool:
        addresses = self._addresses
        addresses[0], addresses[1] = scales[0].data_ptr(), scales[1].data_ptr()
        return self._steps.decode(payload, terms, out, copy=copy)
