"""Fused steps of the scalar quantizers as Triton kernels: from x and terms to payload and new base, and from payload
and terms to new base, without a residual in memory and without a look at any value from the host.

The bytes are those of ``reference/steps.py``. With scales by row and channel, encoding reads x and base three times:
row sums and maxima (``row_statistics``), sums by channel (``tile_sums``, then ``settle`` on their small results),
codes and new base (``encode_codes``). With scales by block it reads them once. Decoding is one pass.

What a step launches is prepared when it first comes: ``encoding_of`` and ``decoding_of`` list it, and a step gives the
addresses. Kernels run on the current stream of the tensors' device. With ``TRITON_INTERPRET=1`` set before Triton is
imported they run on CPU tensors, in numpy, slowly: that is how they are tested where there is no GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compactdist.kernels.gpu import blocks, codes, launched, rows, scales
from compactdist.kernels.gpu.elements import DTYPES
from compactdist.kernels.gpu.launch import Launch, Slot
from compactdist.kernels.gpu.launched import DECODING, TO_DECODE, TO_ENCODE, LaunchedSteps, Own
from compactdist.kernels.gpu.plan import DEVICE_TYPE, INTERPRETED, UNITS_OF_TILE, Plan, Scratch, plan_of, scratch_of
from compactdist.kernels.spec import MatrixView, QuantizerSpec

__all__ = [
    "DECODING",
    "DEVICE_TYPE",
    "ENCODING",
    "EXACT",
    "INTERPRETED",
    "PAYLOAD",
    "REPORTED",
    "ROWS",
    "SCRATCH",
    "SOURCE",
    "UNROLL",
    "WIDTH",
    "TritonSteps",
    "can_run",
    "decoding_of",
    "encode_codes_launch",
    "encoding_of",
    "steps_of",
    "tiles_of",
]

EXACT = {"enable_fp_fusion": False}
# Sizes for 16-byte loads of bfloat16 on a GPU; the interpreter wants few programs of large blocks.
ROWS, _TILES, UNROLL, _UNITS, WIDTH, _BLOCKS = (128, 16, 1, 2048, 512, 128) if INTERPRETED else (4, 1, 8, 512, 32, 16)


def tiles_of(plan: Plan) -> int:
    """Tiles that a program sums up: no more than there are, as a power of two."""
    return min(_TILES, 1 << (plan.tiles - 1).bit_length())


def steps_of(spec: QuantizerSpec, view: MatrixView, dtype: torch.dtype, device: torch.device) -> TritonSteps | None:
    """The steps of one stream; ``None`` where there are no kernels for its device, dtype, or so many elements."""
    if not can_run(dtype, device):
        return None
    plan = plan_of(spec, view, device)
    return None if plan is None else TritonSteps(plan, dtype, device)


def can_run(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether there are kernels for tensors of a dtype on a device."""
    return device.type == DEVICE_TYPE and dtype in DTYPES


# Blocks of a program that are held in registers: four threads have one, and a program is one warp.
_HELD = 128 if INTERPRETED else 8

# What an encoding gives to its launches: these and then the parts of the scratch memory.
PAYLOAD, REPORTED, _OUT, _COPY = TO_ENCODE.payload, TO_ENCODE.flag, TO_ENCODE.out, TO_ENCODE.copy
SOURCE = TO_ENCODE.x, *TO_ENCODE.terms
ENCODING = launched.ENCODING + len(Scratch._fields)
"""How much that is."""
SCRATCH: Any = Scratch(*map(Slot, range(launched.ENCODING, ENCODING)))  # type: ignore[arg-type]


class TritonSteps(LaunchedSteps):
    """The steps of one stream of a quantizer, see ``kernels.DeviceSteps``.

    Attributes:
        plan: what the kernels are told.
    """

    __slots__ = ("plan",)

    def __init__(self, plan: Plan, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(dtype, device, plan.sections.total_nbytes)
        self.plan = plan

    def encoding(self, terms: int, writes: bool, copies: bool, lockstep: bool) -> list[Launch]:
        return encoding_of(self.plan, terms, writes, copies, lockstep)

    def decoding(self, terms: int, checked: bool, copies: bool) -> list[Launch]:
        return [decoding_of(self.plan, terms, checked, copies)]

    def to_encode(self, stream: int | None, lockstep: bool) -> Own:
        memory = scratch_of(self.plan, self._device, stream)
        if not (lockstep and self.plan.by_block):  # blocks need the flag alone, and only to write nothing
            memory.scratch.zeroed.zero_()
        return Own(memory.scratch, memory.pointers)

    def flag_in(self, own: Own) -> Tensor:
        flag: Tensor = own.tensors[Scratch._fields.index("flag")]
        return flag


def _units(plan: Plan) -> dict[str, Any]:
    """The constants of the kernels that write codes and reconstructions."""
    at = plan.sections
    row_scales = codes.WIDE.value if at.wide_rows else at.row_scale_count > 0
    scaled = {"ROW_SCALES": row_scales, "PER_GROUP": at.channel_scales_per_group == 1}
    return {**plan.codec_flags, **plan.offsets_flags, "PER": plan.per, **scaled, "UNITS": _UNITS, "num_warps": 8}


def decoding_of(
    plan: Plan, terms: int, checked: bool, copies: bool, *, held: Slot | None = None, given: int = DECODING
) -> Launch:
    """Of what every decoding gives.

    ``held``: where channel scales are, if not in the payload.
    """
    at = plan.sections
    arguments = (
        *TO_DECODE.terms, *TO_DECODE[1:], TO_DECODE.payload if held is None else held,
        plan.table, plan.offsets.row_at, plan.offsets.column_at,
        at.rows, at.channels, at.elements, at.row_scales_at, at.channel_scales_at,
        plan.blocks, plan.pad, plan.matrix_channels, plan.numel,
    )  # fmt: skip
    constants = {"TERMS": terms, "CHECKED": checked, "COPIES": copies, "HELD": held is not None}
    constants.update(**_units(plan), **EXACT)
    return Launch(codes.decode_codes, -(-plan.units // _UNITS), arguments, given, constants)


def encoding_of(plan: Plan, terms: int, writes: bool, copies: bool, lockstep: bool) -> list[Launch]:
    """All launches of an encoding, in order."""
    written = {"WRITES": writes, "COPIES": copies, "LOCKSTEP": lockstep}
    launches = [_encode_blocks(plan, terms, written)] if plan.by_block else _settle_scales(plan, terms)
    if not plan.by_block or not plan.whole:
        launches.append(encode_codes_launch(plan, terms, written))
    return launches


def _settle_scales(plan: Plan, terms: int) -> list[Launch]:
    at, scratch, offsets = plan.sections, SCRATCH, (plan.offsets.row_at, plan.offsets.column_at)
    statistics = scratch.statistic, scratch.low, scratch.largest, scratch.flag
    size = at.rows, at.channels, plan.numel
    common = {"KIND": plan.kind, "PLACE": plan.offsets.kind, "WHOLE": plan.whole_rows, "TERMS": terms}
    common.update(UNROLL=UNROLL, num_warps=1, **EXACT)
    sums = scratch.first, scratch.energy, scratch.weight
    scaled, tiles = {"ROW_SCALES": at.row_scale_count > 0}, tiles_of(plan)
    launches = [
        Launch(
            rows.row_statistics, at.groups * -(-at.rows // ROWS),
            (*SOURCE, *offsets, *statistics, REPORTED, *size), ENCODING, {"ROWS": ROWS, **common},
        ),
        Launch(
            rows.tile_sums, at.groups * -(-plan.tiles // tiles) * plan.channel_blocks,
            (
                *SOURCE, *offsets, *statistics, PAYLOAD, scratch.row_weights, *sums, at.row_scales_at, *size,
                plan.tiles,
            ),
            ENCODING, {"TILES": tiles, "UNITS": UNITS_OF_TILE, **scaled, **common},
        ),
    ]  # fmt: skip
    if plan.tiles > 64:
        half_of_all = 1 << ((plan.tiles - 1).bit_length() - 1)
        constants = {"KIND": plan.kind, "UNITS": UNITS_OF_TILE, "num_warps": 1, **EXACT}
        folded = (*sums, at.channels, plan.tiles, half_of_all)
        folding = at.groups * plan.channel_blocks * 64
        launches.append(Launch(scales.fold_many_tiles, folding, folded, ENCODING, constants))
    # rows of one channel have one scale in a group, too, and as many tiles as rows of several
    per_group = at.channel_scales_per_group == 1 and plan.tiles == 1
    scales_end = at.channel_scales_at + 2 * at.groups * at.channel_scales_per_group
    arguments = (
        *sums, scratch.largest, scratch.flag, PAYLOAD, scratch.inverse, scratch.wire, scratch.factors,
        at.channels, plan.tiles, plan.channel_blocks, 8 * UNITS_OF_TILE,
        at.row_scales_at + at.row_scale_count, at.channel_scales_at, scales_end, at.total_nbytes, plan.constant,
    )  # fmt: skip
    constants = {"KIND": plan.kind, "WIDENING": plan.widening, "PER_GROUP": per_group, "WIDTH": WIDTH, "num_warps": 4}
    settling = at.groups * (1 if per_group else -(-at.channels // WIDTH))
    launches.append(Launch(scales.settle, settling, arguments, ENCODING, {**constants, **scaled, **EXACT}))
    return launches


def _encode_blocks(plan: Plan, terms: int, written: dict[str, bool]) -> Launch:
    """Scales, and where units do not run over the ends of blocks everything else."""
    at, scratch = plan.sections, SCRATCH
    if plan.whole and at.channels in (64, 128):
        return _encode_held_blocks(plan, terms, written)
    arguments = (
        *SOURCE, _OUT, _COPY, PAYLOAD, scratch.inverse, scratch.wire, scratch.factors, scratch.flag,
        REPORTED, plan.table, plan.offsets.row_at, plan.offsets.column_at, at.groups, at.channels, *_ends(plan),
        plan.blocks, plan.pad, plan.matrix_channels, plan.numel, plan.constant,
    )  # fmt: skip
    constants = {"WIDENING": plan.widening, "TERMS": terms, "CODES": plan.whole, "BLOCKS": _BLOCKS, "num_warps": 4}
    constants.update(**plan.codec_flags, **plan.offsets_flags, **written, **EXACT)
    return Launch(blocks.encode_blocks, -(-at.groups // _BLOCKS), arguments, ENCODING, constants)


def _encode_held_blocks(plan: Plan, terms: int, written: dict[str, bool]) -> Launch:
    """All of an encoding whose blocks are short enough to be held in registers."""
    at, scratch = plan.sections, SCRATCH
    arguments = (
        *SOURCE, _OUT, _COPY, PAYLOAD, scratch.flag, REPORTED, plan.table, plan.offsets.row_at, plan.offsets.column_at,
        at.groups, *_ends(plan), plan.blocks, plan.pad, plan.matrix_channels, plan.numel, plan.constant,
    )  # fmt: skip
    constants = {"WIDENING": plan.widening, "TERMS": terms, "PADDED": plan.padded, "PLACE": plan.offsets.kind}
    constants.update(CHUNKS=at.channels // 64, BLOCKS=_HELD, num_warps=1, **plan.codec_flags, **written, **EXACT)
    return Launch(blocks.encode_held_blocks, -(-at.groups // _HELD), arguments, ENCODING, constants)


def _ends(plan: Plan) -> tuple[int, int, int, int]:
    """Where codes and scales of blocks end in the payload, without and with alignment."""
    at = plan.sections
    return at.codes_nbytes, at.row_scales_at, at.channel_scales_at + 2 * at.groups, at.total_nbytes


def encode_codes_launch(
    plan: Plan, terms: int, written: dict[str, bool], *, wire: Slot = SCRATCH.wire, given: int = ENCODING
) -> Launch:
    """Codes and what the receiver makes of them; ``wire``: where the channel scales are, as the receiver has them."""
    at, scratch = plan.sections, SCRATCH
    arguments = (
        *SOURCE, _OUT, _COPY, PAYLOAD, scratch.inverse, wire, scratch.factors, scratch.flag,
        plan.table, plan.offsets.row_at, plan.offsets.column_at, at.rows, at.channels, at.elements, at.row_scales_at,
        plan.blocks, plan.pad, plan.matrix_channels, plan.numel,
    )  # fmt: skip
    constants = {"TERMS": terms, "BY_BLOCK": plan.by_block, **_units(plan), **written, **EXACT}
    return Launch(codes.encode_codes, -(-plan.units // _UNITS), arguments, given, constants)
