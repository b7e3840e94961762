"""Fused steps of the scalar quantizers as Triton kernels: from x and terms to payload and new base, and from payload
and terms to new base, without a residual in memory and without a look at any value from the host.

The bytes are those of ``reference/steps.py``. With scales by row and channel, encoding reads x and base three times:
row sums and maxima (``row_statistics``), sums by channel (``tile_sums``, then ``settle`` on their small results),
codes and new base (``encode_codes``). With scales by block it reads them once. Decoding is one pass.

What a step launches is prepared when it first comes: ``_encoding`` and ``_decoding`` list it, and a step gives the
addresses. Kernels run on the current stream of the tensors' device. With ``TRITON_INTERPRET=1`` set before Triton is
imported they run on CPU tensors, in numpy, slowly: that is how they are tested where there is no GPU.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from compactdist.kernels.gpu import blocks, codes, rows, scales
from compactdist.kernels.gpu.launch import Launch, Slot, alignment_of, on, stream_getter
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


# Blocks of a program that are held in registers: four threads have one, and a program is one warp.
_HELD = 128 if INTERPRETED else 8

# What an encoding gives to its launches: these and then the parts of the scratch memory. A missing term repeats ``x``.
_X, _BASE, _VELOCITY, _OUT, _PAYLOAD, _REPORTED = map(Slot, range(6))
_SOURCE = _X, _BASE, _VELOCITY
_SCRATCH: Any = Scratch(*map(Slot, range(6, 6 + len(Scratch._fields))))  # type: ignore[arg-type]
_ENCODING = 6 + len(Scratch._fields)


class TritonSteps:
    """The steps of one stream, see ``kernels.Steps``.

    Attributes:
        plan: what the kernels are told.
    """

    __slots__ = ("_decodings", "_device", "_dtype", "_encodings", "_stream_of", "checksum", "plan", "sums")

    def __init__(self, plan: Plan, dtype: torch.dtype, device: torch.device) -> None:
        self.plan = plan
        self.checksum: int | None = None
        self.sums = False  # ``frames.py`` sums up payloads
        self._dtype = dtype
        self._stream_of = stream_getter(device)
        index: int | None = device.index
        if self._stream_of is not None and index is None:
            device = torch.device(device.type, torch.cuda.current_device())
        self._device = device
        self._encodings: dict[tuple[int, bool, bool], list[Launch]] = {}
        self._decodings: dict[tuple[int, bool], Launch] = {}

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
        if not self._takes((x, *terms) if out is None else (x, *terms, out)):
            return False
        if payload.dtype != torch.uint8 or not (flag is None or flag.dtype == torch.int32):
            return False
        plan, device = self.plan, self._device
        written = payload
        if payload.data_ptr() % 16 or not payload.is_contiguous():
            written = torch.empty(plan.sections.total_nbytes, dtype=torch.uint8, device=device)
        source = _source(x, terms)
        key = len(terms), out is not None, flag is not None
        launches = self._encodings.get(key)
        if launches is None:
            launches = self._encodings[key] = _encoding(plan, *key)
        with on(device):
            stream = None if self._stream_of is None else self._stream_of(device.index)
            scratch, scratch_pointers = scratch_of(plan, device, stream)
            scratch.zeroed.zero_()
            target, reported = source[0] if out is None else out, scratch.flag if flag is None else flag
            given = (*source, target, written, reported)
            pointers = (*[tensor.data_ptr() for tensor in given], *scratch_pointers)
            aligned, tensors = alignment_of(pointers), given + scratch
            for launch in launches:
                launch(tensors, pointers, aligned, stream)
        if flag is None and int(scratch.flag):
            return False
        if written is not payload:
            payload.copy_(written)
        return True

    def decode(
        self,
        payload: Tensor,
        terms: tuple[Tensor, ...],
        out: Tensor,
        *,
        sums: bool = False,
        accepted: Tensor | None = None,
    ) -> bool:
        """Write the sum of ``terms`` plus the decoded payload to ``out``, kept finite and rounded to its dtype.

        Never waits for the device; ``out`` may be the first of the terms. With ``accepted``, uint8, ``out`` stays as it
        was where the first of it is 0.

        Returns:
            Whether it was done; not if tensors are of another dtype or device, or the payload of another length.
        """
        plan = self.plan
        at = plan.sections
        if not self._takes((out, *terms)) or payload.dtype != torch.uint8 or payload.shape != (at.total_nbytes,):
            return False
        if payload.data_ptr() % 16 or not payload.is_contiguous():  # the middle of someone's buffer
            payload = payload.clone(memory_format=torch.contiguous_format)
        _, base, velocity = _source(out, terms)
        key = len(terms), accepted is not None
        launch = self._decodings.get(key)
        if launch is None:
            launch = self._decodings[key] = _decoding(plan, *key)
        given = base, velocity, out, payload, payload if accepted is None else accepted
        pointers = tuple([tensor.data_ptr() for tensor in given])
        with on(self._device):
            stream = None if self._stream_of is None else self._stream_of(self._device.index)
            launch(given, pointers, alignment_of(pointers), stream)
        return True

    def _takes(self, tensors: Iterable[Tensor]) -> bool:
        kind = self._device.type
        for tensor in tensors:  # noqa: SIM110 - a generator costs a call for each tensor
            if tensor.dtype != self._dtype or tensor.device.type != kind:
                return False
        return True


def _source(x: Tensor, terms: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """``(x, base, velocity)``, contiguous. A missing term repeats ``x``."""
    first, *rest = [part if part.is_contiguous() else part.detach().contiguous() for part in (x, *terms)]
    second, third, *_ = (*rest, first, first)
    return first, second, third


def _units(plan: Plan) -> dict[str, Any]:
    """The constants of the kernels that write codes and reconstructions."""
    at = plan.sections
    scaled = {"ROW_SCALES": at.row_scale_count > 0, "PER_GROUP": at.channel_scales_per_group == 1}
    return {**plan.codec_flags, **plan.offsets_flags, "PER": plan.per, **scaled, "UNITS": _UNITS, "num_warps": 8}


def _decoding(plan: Plan, terms: int, checked: bool) -> Launch:
    """Of ``(base, velocity, out, payload, accepted)``."""
    at = plan.sections
    arguments = (
        *map(Slot, range(5)), plan.table, plan.offsets.row_at, plan.offsets.column_at,
        at.rows, at.channels, at.elements, at.row_scales_at, at.channel_scales_at,
        plan.blocks, plan.pad, plan.matrix_channels, plan.numel,
    )  # fmt: skip
    constants = {"TERMS": terms, "CHECKED": checked, **_units(plan), **_EXACT}
    return Launch(codes.decode_codes, -(-plan.units // _UNITS), arguments, 5, constants)


def _encoding(plan: Plan, terms: int, writes: bool, lockstep: bool) -> list[Launch]:
    """All launches of an encoding, in order."""
    written = {"WRITES": writes, "LOCKSTEP": lockstep}
    launches = [_encode_blocks(plan, terms, written)] if plan.by_block else _settle_scales(plan, terms)
    if not plan.by_block or not plan.whole:
        launches.append(_encode_codes(plan, terms, written))
    return launches


def _settle_scales(plan: Plan, terms: int) -> list[Launch]:
    at, scratch, offsets = plan.sections, _SCRATCH, (plan.offsets.row_at, plan.offsets.column_at)
    statistics = scratch.statistic, scratch.low, scratch.largest, scratch.flag
    size = at.rows, at.channels, plan.numel
    common = {"KIND": plan.kind, "PLACE": plan.offsets.kind, "WHOLE": plan.whole_rows, "TERMS": terms}
    common.update(UNROLL=_UNROLL, num_warps=1, **_EXACT)
    sums = scratch.first, scratch.energy, scratch.weight
    scaled = {"ROW_SCALES": at.row_scale_count > 0}
    launches = [
        Launch(
            rows.row_statistics, at.groups * -(-at.rows // _ROWS),
            (*_SOURCE, *offsets, *statistics, _REPORTED, *size), _ENCODING, {"ROWS": _ROWS, **common},
        ),
        Launch(
            rows.tile_sums, at.groups * -(-plan.tiles // _TILES) * plan.channel_blocks,
            (
                *_SOURCE, *offsets, *statistics, _PAYLOAD, scratch.row_weights, *sums, at.row_scales_at, *size,
                plan.tiles,
            ),
            _ENCODING, {"TILES": _TILES, "UNITS": UNITS_OF_TILE, **scaled, **common},
        ),
    ]  # fmt: skip
    if plan.tiles > 64:
        half_of_all = 1 << ((plan.tiles - 1).bit_length() - 1)
        constants = {"KIND": plan.kind, "UNITS": UNITS_OF_TILE, "num_warps": 1, **_EXACT}
        folded = (*sums, at.channels, plan.tiles, half_of_all)
        folding = at.groups * plan.channel_blocks * 64
        launches.append(Launch(scales.fold_many_tiles, folding, folded, _ENCODING, constants))
    per_group = at.channel_scales_per_group == 1
    scales_end = at.channel_scales_at + 2 * at.groups * at.channel_scales_per_group
    arguments = (
        *sums, scratch.largest, scratch.flag, _PAYLOAD, scratch.inverse, scratch.wire, scratch.factors,
        at.channels, plan.tiles, plan.channel_blocks, 8 * UNITS_OF_TILE,
        at.row_scales_at + at.row_scale_count, at.channel_scales_at, scales_end, at.total_nbytes, plan.constant,
    )  # fmt: skip
    constants = {"KIND": plan.kind, "WIDENING": plan.widening, "PER_GROUP": per_group, "WIDTH": _WIDTH, "num_warps": 4}
    settling = at.groups * (1 if per_group else -(-at.channels // _WIDTH))
    launches.append(Launch(scales.settle, settling, arguments, _ENCODING, {**constants, **scaled, **_EXACT}))
    return launches


def _encode_blocks(plan: Plan, terms: int, written: dict[str, bool]) -> Launch:
    """Scales, and where units do not run over the ends of blocks everything else."""
    at, scratch = plan.sections, _SCRATCH
    if plan.whole and at.channels in (64, 128):
        return _encode_held_blocks(plan, terms, written)
    arguments = (
        *_SOURCE, _OUT, _PAYLOAD, scratch.inverse, scratch.wire, scratch.factors, scratch.flag,
        _REPORTED, plan.table, plan.offsets.row_at, plan.offsets.column_at, at.groups, at.channels, *_ends(plan),
        plan.blocks, plan.pad, plan.matrix_channels, plan.numel, plan.constant,
    )  # fmt: skip
    constants = {"WIDENING": plan.widening, "TERMS": terms, "CODES": plan.whole, "BLOCKS": _BLOCKS, "num_warps": 4}
    constants.update(**plan.codec_flags, **plan.offsets_flags, **written, **_EXACT)
    return Launch(blocks.encode_blocks, -(-at.groups // _BLOCKS), arguments, _ENCODING, constants)


def _encode_held_blocks(plan: Plan, terms: int, written: dict[str, bool]) -> Launch:
    """All of an encoding whose blocks are short enough to be held in registers."""
    at, scratch = plan.sections, _SCRATCH
    arguments = (
        *_SOURCE, _OUT, _PAYLOAD, scratch.flag, _REPORTED, plan.table, plan.offsets.row_at, plan.offsets.column_at,
        at.groups, *_ends(plan), plan.blocks, plan.pad, plan.matrix_channels, plan.numel, plan.constant,
    )  # fmt: skip
    constants = {"WIDENING": plan.widening, "TERMS": terms, "PADDED": plan.padded, "PLACE": plan.offsets.kind}
    constants.update(CHUNKS=at.channels // 64, BLOCKS=_HELD, num_warps=1, **plan.codec_flags, **written, **_EXACT)
    return Launch(blocks.encode_held_blocks, -(-at.groups // _HELD), arguments, _ENCODING, constants)


def _ends(plan: Plan) -> tuple[int, int, int, int]:
    """Where codes and scales of blocks end in the payload, without and with alignment."""
    at = plan.sections
    return at.codes_nbytes, at.row_scales_at, at.channel_scales_at + 2 * at.groups, at.total_nbytes


def _encode_codes(plan: Plan, terms: int, written: dict[str, bool]) -> Launch:
    at, scratch = plan.sections, _SCRATCH
    arguments = (
        *_SOURCE, _OUT, _PAYLOAD, scratch.inverse, scratch.wire, scratch.factors, scratch.flag,
        plan.table, plan.offsets.row_at, plan.offsets.column_at, at.rows, at.channels, at.elements, at.row_scales_at,
        plan.blocks, plan.pad, plan.matrix_channels, plan.numel,
    )  # fmt: skip
    constants = {"TERMS": terms, "BY_BLOCK": plan.by_block, **_units(plan), **written, **_EXACT}
    return Launch(codes.encode_codes, -(-plan.units // _UNITS), arguments, _ENCODING, constants)
