"""Fused steps of the scalar quantizers as Triton kernels: from x and base to payload and new base, and from payload and
base to new base, without a residual in memory and without a look at any value from the host.

The bytes are those of ``quantized.py`` on top of ``reference.py``. With scales by row and channel, encoding reads x and
base three times: row sums and maxima (``row_statistics``), sums by channel (``tile_sums``, then ``settle`` on their
small results), codes and new base (``encode_codes``). With scales by block it reads them once. Decoding is one pass.

Kernels run on the current stream of the tensors' device. With ``TRITON_INTERPRET=1`` set before Triton is imported they
run on CPU tensors, in numpy, slowly: that is how they are tested where there is no GPU.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from compactdist.kernels import gpu_apply, gpu_blocks, gpu_scales, gpu_settle
from compactdist.kernels.gpu_plan import INTERPRETED, UNITS_OF_TILE, Plan, Scratch, plan_of, scratch_of

if TYPE_CHECKING:
    from compactdist.codecs.scalar.quantized import ScalarQuantizer
    from compactdist.kernels.spec import MatrixView

__all__ = ["CHECKS_OPTIONS", "INTERPRETED", "decode_residual", "encode_residual", "supports"]

CHECKS_OPTIONS = True
"""``supports`` looks at a codec's options; callers need not."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_EXACT = {"enable_fp_fusion": False}
# Sizes for 16-byte loads of bfloat16 on a GPU; the interpreter wants few programs of large blocks.
_ROWS, _TILES, _UNROLL, _UNITS, _WIDTH, _BLOCKS, _FLAT = (
    (128, 16, 1, 2048, 512, 128, 8192) if INTERPRETED else (4, 1, 8, 512, 32, 16, 4096)
)


def supports(codec: ScalarQuantizer, view: MatrixView, *tensors: Tensor | None) -> bool:
    """Whether there are kernels for this codec, its options and these tensors (one device, one dtype)."""
    given = [tensor for tensor in tensors if tensor is not None]
    device, dtype = given[0].device, given[0].dtype
    if device.type != ("cpu" if INTERPRETED else "cuda") or dtype not in _DTYPES:
        return False
    if any(tensor.device != device or tensor.dtype != dtype for tensor in given):
        return False
    return plan_of(codec, view, device) is not None


def _bits(x: Tensor) -> Tensor:
    """What the kernels take: contiguous; bfloat16 as int16."""
    x = x.detach().contiguous()
    return x.view(torch.int16) if x.dtype == torch.bfloat16 else x


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        return torch.cuda.device(device)
    return nullcontext()


def _plan(codec: ScalarQuantizer, view: MatrixView, device: torch.device) -> Plan:
    plan = plan_of(codec, view, device)
    if plan is None:
        raise ValueError(f"no Triton kernels for {codec!r} and {view!r}; ask supports() before")
    return plan


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
    def place(self) -> tuple[Tensor, Tensor]:
        return self.plan.place.row_at, self.plan.place.column_at


def _source(x: Tensor, terms: tuple[Tensor, ...]) -> tuple[tuple[Tensor, Tensor, Tensor], int]:
    """``(x, base, velocity)`` as kernels take them, and how many terms count. A missing term repeats ``x``."""
    given = [_bits(tensor) for tensor in (x, *terms)]
    first, second, third = (given + 2 * given[:1])[:3]
    return (first, second, third), len(given) - 1


@torch.no_grad()
def encode_residual(
    codec: ScalarQuantizer,
    x: Tensor,
    terms: tuple[Tensor, ...],
    view: MatrixView,
    out: Tensor | None,
    payload_out: Tensor | None = None,
    *,
    flag: Tensor | None = None,
) -> Tensor | None:
    """Encode ``x`` less the sum of ``terms`` and, if ``out`` is given, write there what the receiver will hold.

    Args:
        codec: Any that ``supports`` has agreed to, as the rest.
        x: Flat.
        terms: What is expected, each flat.
        view: How the buffer becomes a matrix.
        out: Flat, contiguous; may be the first of the terms.
        payload_out: uint8, gets the payload; in place if it is aligned to 16 bytes. New memory unless given.
        flag: int32 of one element, set to 1 if the residual is not finite, else left as it is. With it nothing waits
            for the device. What is then sent decodes to no change: a payload of zeros; where a scale covers one row or
            a block, a zero scale for each one concerned. ``out`` gets what the receiver makes of it, so that both ends
            stay equal.

    Returns:
        The payload; ``None`` if the residual is not finite and there is no flag, and then ``out`` is as it was.

    Raises:
        ValueError: There are no kernels for this codec and view.
    """
    plan = _plan(codec, view, x.device)
    payload = payload_out
    if payload is None or payload.data_ptr() % 16 or not payload.is_contiguous():
        payload = torch.empty(plan.layout.total_nbytes, dtype=torch.uint8, device=x.device)
    source, count = _source(x, terms)
    with _on(x.device):
        scratch = scratch_of(plan, x.device)
        scratch.zeroed.zero_()
        target, reported = source[0] if out is None else _bits(out), scratch.flag if flag is None else flag
        call = _Call(plan, scratch, source, count, target, payload, reported)
        writes = {"WRITES": out is not None, "LOCKSTEP": flag is not None}
        if plan.by_block:
            in_place = out is not None and bool(terms) and out.data_ptr() == terms[0].data_ptr()
            if in_place and flag is None:  # the base must be whole if a later block turns out not to be finite
                _find_not_finite(call)
            _encode_blocks(call, writes)
        else:
            _settle_scales(call)
        if not plan.by_block or not plan.whole:
            _encode_codes(call, writes)
    if flag is None and int(scratch.flag):
        return None
    return payload if payload_out is None or payload is payload_out else payload_out.copy_(payload)


def _settle_scales(call: _Call) -> None:
    plan, scratch, at = call.plan, call.scratch, call.plan.layout
    rows = scratch.statistic, scratch.low, scratch.largest, scratch.flag
    size = at.rows, at.channels, plan.numel
    common = {"KIND": plan.kind, "PLACE": plan.place.kind, "WHOLE": plan.whole_rows, "TERMS": call.terms}
    common.update(UNROLL=_UNROLL, **_EXACT)
    gpu_scales.row_statistics[(at.groups * -(-at.rows // _ROWS),)](
        *call.source, *call.place, *rows, call.reported, *size, ROWS=_ROWS, num_warps=1, **common
    )
    sums = scratch.first, scratch.energy, scratch.weight
    scaled = {"ROW_SCALES": at.row_scale_count > 0}
    gpu_scales.tile_sums[(at.groups * -(-plan.tiles // _TILES) * plan.channel_blocks,)](
        *call.source, *call.place, *rows, call.payload, scratch.row_weights, *sums, at.row_scales_at, *size, plan.tiles,
        TILES=_TILES, UNITS=UNITS_OF_TILE, num_warps=1, **scaled, **common,
    )  # fmt: skip
    if plan.tiles > 64:
        gpu_settle.fold_many_tiles[(at.groups * plan.channel_blocks * 64,)](
            *sums, at.channels, plan.tiles, 1 << ((plan.tiles - 1).bit_length() - 1),
            KIND=plan.kind, UNITS=UNITS_OF_TILE, num_warps=1, **_EXACT,
        )  # fmt: skip
    per_group = at.channel_scales_per_group == 1
    scales_end = at.channel_scales_at + 2 * at.groups * at.channel_scales_per_group
    gpu_settle.settle[(at.groups * (1 if per_group else -(-at.channels // _WIDTH)),)](
        *sums, scratch.largest, scratch.flag, call.payload, scratch.inverse, scratch.wire, scratch.factors,
        at.channels, plan.tiles, plan.channel_blocks, 8 * UNITS_OF_TILE,
        at.row_scales_at + at.row_scale_count, at.channel_scales_at, scales_end, at.total_nbytes, plan.constant,
        KIND=plan.kind, WIDENING=plan.widening, PER_GROUP=per_group, WIDTH=_WIDTH, num_warps=4, **scaled, **_EXACT,
    )  # fmt: skip


def _find_not_finite(call: _Call) -> None:
    numel = call.plan.numel
    gpu_blocks.find_not_finite[(-(-numel // _FLAT),)](
        *call.source, call.scratch.flag, numel, TERMS=call.terms, WIDTH=_FLAT, num_warps=8, **_EXACT
    )


def _encode_blocks(call: _Call, writes: dict[str, bool]) -> None:
    """Scales, and where units do not run over the ends of blocks everything else."""
    plan, scratch, at = call.plan, call.scratch, call.plan.layout
    gpu_blocks.encode_blocks[(-(-at.groups // _BLOCKS),)](
        *call.source, call.target, call.payload, scratch.inverse, scratch.wire, scratch.factors, scratch.flag,
        call.reported, plan.table, *call.place, at.groups, at.channels,
        at.codes_nbytes, at.row_scales_at, at.channel_scales_at + 2 * at.groups, at.total_nbytes,
        plan.blocks, plan.pad, plan.matrix_channels, plan.numel, plan.constant,
        WIDENING=plan.widening, TERMS=call.terms, CODES=plan.whole, BLOCKS=_BLOCKS, num_warps=4,
        **plan.codec_flags, **plan.place_flags, **writes, **_EXACT,
    )  # fmt: skip


def _encode_codes(call: _Call, writes: dict[str, bool]) -> None:
    plan, scratch, at = call.plan, call.scratch, call.plan.layout
    gpu_apply.encode_codes[(-(-plan.units // _UNITS),)](
        *call.source, call.target, call.payload, scratch.inverse, scratch.wire, scratch.factors, scratch.flag,
        plan.table, *call.place, at.rows, at.channels, at.elements, at.row_scales_at,
        plan.blocks, plan.pad, plan.matrix_channels, plan.numel,
        TERMS=call.terms, BY_BLOCK=plan.by_block, UNITS=_UNITS, num_warps=8, **_units(plan), **writes, **_EXACT,
    )  # fmt: skip


def _units(plan: Plan) -> dict[str, Any]:
    at = plan.layout
    rows, groups = at.row_scale_count > 0, at.channel_scales_per_group == 1
    return {**plan.codec_flags, **plan.place_flags, "PER": plan.per, "ROW_SCALES": rows, "PER_GROUP": groups}


@torch.no_grad()
def decode_residual(
    codec: ScalarQuantizer,
    payload: Tensor,
    terms: tuple[Tensor, ...],
    view: MatrixView,
    out: Tensor,
) -> bool:
    """Write the sum of ``terms`` plus the decoded payload to ``out``, kept finite and rounded to its dtype.

    Never waits for the device; ``out`` may be the first of the terms.

    Returns:
        True: it was done.

    Raises:
        ValueError: There are no kernels for this codec and view.
    """
    plan = _plan(codec, view, out.device)
    at = plan.layout
    if payload.data_ptr() % 16:  # the middle of someone's buffer
        payload = payload.clone()
    target = _bits(out)
    (_, *source), count = _source(out, terms)
    with _on(out.device):
        gpu_apply.decode_codes[(-(-plan.units // _UNITS),)](
            *source, target, payload, plan.table, plan.place.row_at, plan.place.column_at,
            at.rows, at.channels, at.elements, at.row_scales_at, at.channel_scales_at,
            plan.blocks, plan.pad, plan.matrix_channels, plan.numel,
            TERMS=count, UNITS=_UNITS, num_warps=8, **_units(plan), **_EXACT,
        )  # fmt: skip
    return True
