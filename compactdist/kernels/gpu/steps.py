"""Fused steps of the scalar quantizers as Triton kernels: from x and terms to payload and new base, and from payload
and terms to new base, without a residual in memory and without a look at any value from the host.

The bytes are those of ``reference/steps.py``. With scales by row and channel, encoding reads x and base three times:
row sums and maxima (``row_statistics``), sums by channel (``tile_sums``, then ``settle`` on their small results),
codes and new base (``encode_codes``). With scales by block it reads them once. Decoding is one pass.

Kernels run on the current stream of the tensors' device. With ``TRITON_INTERPRET=1`` set before Triton is imported they
run on CPU tensors, in numpy, slowly: that is how they are tested where there is no GPU.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compactdist.kernels.gpu import blocks, codes, rows, scales
from compactdist.kernels.gpu.plan import INTERPRETED, UNITS_OF_TILE, Plan, Scratch, plan_of, scratch_of
from compactdist.kernels.spec import MatrixView, QuantizerSpec

__all__ = ["INTERPRETED", "TritonSteps", "steps_of"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_EXACT = {"enable_fp_fusion": False}
# Sizes for 16-byte loads of bfloat16 on a GPU; the interpreter wants few programs of large blocks.
_ROWS, _TILES, _UNROLL, _UNITS, _WIDTH, _BLOCKS = (
    (128, 16, 1, 2048, 512, 128) if INTERPRETED else (4, 1, 8, 512, 32, 16)
)


def steps_of(spec: QuantizerSpec, view: MatrixView, dtype: torch.dtype, device: torch.device) -> TritonSteps | None:
    """The steps of one stream; ``None`` where there are no kernels for its device, dtype, or so many elements."""
    if device.type != ("cpu" if INTERPRETED else "cuda") or dtype not in _DTYPES:
        return None
    plan = plan_of(spec, view, device)
    return None if plan is None else TritonSteps(plan, dtype, device)


def _bits(x: Tensor) -> Tensor:
    """What the kernels take: contiguous; bfloat16 as int16."""
    x = x.detach().contiguous()
    return x.view(torch.int16) if x.dtype == torch.bfloat16 else x


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        return torch.cuda.device(device)
    return nullcontext()


class _Call(NamedTuple):
    """What the parts of an encoding share. ``source`` = (x, base, velocity); a missing term repeats ``x``, and
    ``terms`` says how many of the last two count.
    """

    plan: Plan
    scratch: Scratch
    source: tuple[Tensor, Tensor, Tensor]
    terms: int
    target: Tensor
    payload: Tensor
    reported: Tensor

    @property
    def offsets(self) -> tuple[Tensor, Tensor]:
        return self.plan.offsets.row_at, self.plan.offsets.column_at


class TritonSteps:
    """The steps of one stream, see ``kernels.Steps``.

    Attributes:
        plan: what the kernels are told.
    """

    __slots__ = ("_device", "_dtype", "_units", "checksum", "plan")

    def __init__(self, plan: Plan, dtype: torch.dtype, device: torch.device) -> None:
        self.plan = plan
        self.checksum: int | None = None
        self._dtype = dtype
        self._device = device
        at = plan.sections
        scaled = {"ROW_SCALES": at.row_scale_count > 0, "PER_GROUP": at.channel_scales_per_group == 1}
        self._units = {**plan.codec_flags, **plan.offsets_flags, "PER": plan.per, **scaled}

    @torch.no_grad()
    def encode(
        self,
        x: Tensor,
        terms: tuple[Tensor, ...],
        out: Tensor | None,
        payload: Tensor,
        *,
        flag: Tensor | None = None,
    ) -> bool:
        """Encode ``x`` less the sum of ``terms`` and, if ``out`` is given, write there what the receiver will hold.

        Args:
            x: flat.
            terms: what is expected, each flat.
            out: flat, contiguous, none of the terms.
            payload: uint8, gets the payload; directly if it is aligned to 16 bytes.
            flag: int32 of one element, set to 1 if the residual is not finite, else left as it is. With it nothing
                waits for the device. What is then sent decodes to no change: a payload of zeros; where a scale covers
                one row or a block, a zero scale for each one concerned. ``out`` gets what the receiver makes of it, so
                that both ends stay equal.

        Returns:
            Whether it was done; not if tensors are of another dtype or device, or if the residual is not finite and
            there is no flag; ``out`` and ``payload`` hold anything then.
        """
        if not self._takes(x, *terms) or not (out is None or self._takes(out)):
            return False
        plan, device = self.plan, self._device
        written = payload
        if payload.data_ptr() % 16 or not payload.is_contiguous():
            written = torch.empty(plan.sections.total_nbytes, dtype=torch.uint8, device=device)
        source, count = _source(x, terms)
        with _on(device):
            scratch = scratch_of(plan, device)
            scratch.zeroed.zero_()
            target, reported = source[0] if out is None else _bits(out), scratch.flag if flag is None else flag
            call = _Call(plan, scratch, source, count, target, written, reported)
            writes = {"WRITES": out is not None, "LOCKSTEP": flag is not None}
            if plan.by_block:
                _encode_blocks(call, writes)
            else:
                _settle_scales(call)
            if not plan.by_block or not plan.whole:
                _encode_codes(call, {**self._units, **writes})
        if flag is None and int(scratch.flag):
            return False
        if written is not payload:
            payload.copy_(written)
        return True

    @torch.no_grad()
    def decode(
        self, payload: Tensor, terms: tuple[Tensor, ...], out: Tensor, *, accepted: Tensor | None = None
    ) -> bool:
        """Write the sum of ``terms`` plus the decoded payload to ``out``, kept finite and rounded to its dtype.

        Never waits for the device; ``out`` may be the first of the terms. With ``accepted``, uint8, ``out`` stays as it
        was where the first of it is 0.

        Returns:
            Whether it was done; not if tensors are of another dtype or device, or the payload of another length.
        """
        plan = self.plan
        at = plan.sections
        if not self._takes(out, *terms) or payload.dtype != torch.uint8 or payload.shape != (at.total_nbytes,):
            return False
        if payload.data_ptr() % 16 or not payload.is_contiguous():  # the middle of someone's buffer
            payload = payload.clone(memory_format=torch.contiguous_format)
        target = _bits(out)
        (_, *source), count = _source(out, terms)
        with _on(self._device):
            codes.decode_codes[(-(-plan.units // _UNITS),)](
                *source, target, payload, payload if accepted is None else accepted, plan.table,
                plan.offsets.row_at, plan.offsets.column_at,
                at.rows, at.channels, at.elements, at.row_scales_at, at.channel_scales_at,
                plan.blocks, plan.pad, plan.matrix_channels, plan.numel,
                TERMS=count, CHECKED=accepted is not None, UNITS=_UNITS, num_warps=8, **self._units, **_EXACT,
            )  # fmt: skip
        return True

    def _takes(self, *tensors: Tensor) -> bool:
        return all(tensor.dtype == self._dtype and tensor.device.type == self._device.type for tensor in tensors)


def _source(x: Tensor, terms: tuple[Tensor, ...]) -> tuple[tuple[Tensor, Tensor, Tensor], int]:
    """``(x, base, velocity)`` as kernels take them, and how many terms count. A missing term repeats ``x``."""
    given = [_bits(tensor) for tensor in (x, *terms)]
    first, second, third = (given + 2 * given[:1])[:3]
    return (first, second, third), len(given) - 1


def _settle_scales(call: _Call) -> None:
    plan, scratch, at = call.plan, call.scratch, call.plan.sections
    statistics = scratch.statistic, scratch.low, scratch.largest, scratch.flag
    size = at.rows, at.channels, plan.numel
    common = {"KIND": plan.kind, "PLACE": plan.offsets.kind, "WHOLE": plan.whole_rows, "TERMS": call.terms}
    common.update(UNROLL=_UNROLL, **_EXACT)
    rows.row_statistics[(at.groups * -(-at.rows // _ROWS),)](
        *call.source, *call.offsets, *statistics, call.reported, *size, ROWS=_ROWS, num_warps=1, **common
    )
    sums = scratch.first, scratch.energy, scratch.weight
    scaled = {"ROW_SCALES": at.row_scale_count > 0}
    rows.tile_sums[(at.groups * -(-plan.tiles // _TILES) * plan.channel_blocks,)](
        *call.source, *call.offsets, *statistics, call.payload, scratch.row_weights, *sums, at.row_scales_at, *size,
        plan.tiles, TILES=_TILES, UNITS=UNITS_OF_TILE, num_warps=1, **scaled, **common,
    )  # fmt: skip
    if plan.tiles > 64:
        scales.fold_many_tiles[(at.groups * plan.channel_blocks * 64,)](
            *sums, at.channels, plan.tiles, 1 << ((plan.tiles - 1).bit_length() - 1),
            KIND=plan.kind, UNITS=UNITS_OF_TILE, num_warps=1, **_EXACT,
        )  # fmt: skip
    per_group = at.channel_scales_per_group == 1
    scales_end = at.channel_scales_at + 2 * at.groups * at.channel_scales_per_group
    scales.settle[(at.groups * (1 if per_group else -(-at.channels // _WIDTH)),)](
        *sums, scratch.largest, scratch.flag, call.payload, scratch.inverse, scratch.wire, scratch.factors,
        at.channels, plan.tiles, plan.channel_blocks, 8 * UNITS_OF_TILE,
        at.row_scales_at + at.row_scale_count, at.channel_scales_at, scales_end, at.total_nbytes, plan.constant,
        KIND=plan.kind, WIDENING=plan.widening, PER_GROUP=per_group, WIDTH=_WIDTH, num_warps=4, **scaled, **_EXACT,
    )  # fmt: skip


def _encode_blocks(call: _Call, writes: dict[str, bool]) -> None:
    """Scales, and where units do not run over the ends of blocks everything else."""
    plan, scratch, at = call.plan, call.scratch, call.plan.sections
    blocks.encode_blocks[(-(-at.groups // _BLOCKS),)](
        *call.source, call.target, call.payload, scratch.inverse, scratch.wire, scratch.factors, scratch.flag,
        call.reported, plan.table, *call.offsets, at.groups, at.channels,
        at.codes_nbytes, at.row_scales_at, at.channel_scales_at + 2 * at.groups, at.total_nbytes,
        plan.blocks, plan.pad, plan.matrix_channels, plan.numel, plan.constant,
        WIDENING=plan.widening, TERMS=call.terms, CODES=plan.whole, BLOCKS=_BLOCKS, num_warps=4,
        **plan.codec_flags, **plan.offsets_flags, **writes, **_EXACT,
    )  # fmt: skip


def _encode_codes(call: _Call, constants: dict[str, Any]) -> None:
    plan, scratch, at = call.plan, call.scratch, call.plan.sections
    codes.encode_codes[(-(-plan.units // _UNITS),)](
        *call.source, call.target, call.payload, scratch.inverse, scratch.wire, scratch.factors, scratch.flag,
        plan.table, *call.offsets, at.rows, at.channels, at.elements, at.row_scales_at,
        plan.blocks, plan.pad, plan.matrix_channels, plan.numel,
        TERMS=call.terms, BY_BLOCK=plan.by_block, UNITS=_UNITS, num_warps=8, **constants, **_EXACT,
    )  # fmt: skip
