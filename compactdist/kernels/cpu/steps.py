"""Fused steps of the scalar quantizers on CPU tensors: from x and terms to payload and new base, and from payload and
terms to new base, without a residual in memory.

The bytes are those of ``reference/steps.py``. Everything that does not change between two steps of a stream lies in a
block of numbers (``call.py``); a step writes the addresses of its tensors there and calls one compiled function
(``entries.py``). Where values come near the ends of float32 the steps decline, and the reference does the work.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from functools import cache, lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compactdist.kernels.cpu import call
from compactdist.kernels.cpu.call import (
    LINEAR,
    LITTLE,
    MANY_TERMS,
    MUCH,
    NEAREST,
    ONE_TERM,
    RUN,
    SIGN,
    TERM_IN_FP8,
    TERM_IN_INT8,
    TRITS,
    TWO_IN_FP8,
    TWO_IN_INT8,
    Work,
)
from compactdist.kernels.cpu.native import address_of
from compactdist.kernels.offsets import Offsets, offsets_of, offsets_of_blocks
from compactdist.kernels.reference import LANES, TILE_ROWS, samples
from compactdist.kernels.reference.scales import LARGEST_OF_MEAN
from compactdist.kernels.sections import Sections
from compactdist.kernels.spec import KINDS, MatrixView, MovingTerm, QuantizerSpec, Rounded, Velocity
from compactdist.kernels.threads import team

__all__ = [
    "DTYPES",
    "Block",
    "CpuSteps",
    "Samples",
    "loops_for",
    "loops_of",
    "scratch",
    "second_rounded",
    "second_term",
    "steps_of",
    "weighted_sum",
]

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
"""What the loops take."""

STREAMED_NBYTES = 1 << 21
"""What is smaller, and written, may still lie in a cache when it is read again. What is larger is written past the
caches if it begins a cache line: a line that is written without having been read need not be fetched.
"""

CACHE_LINE = 64
"""Bytes."""

_MASK64 = (1 << 64) - 1
_DYNAMIC = struct.Struct(f"={call.DYNAMIC}q")
_FLOAT32 = struct.Struct("<f")
_Entry = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p)


class Scratch(threading.local):
    """Memory for one step, of each thread that takes steps; kept, for fresh pages cost more than the work.

    Attributes:
        address: where it begins, a cache line.
        size: float32 there are.
    """

    address = 0
    size = 0
    _memory: Tensor | None = None

    def grow(self, size: int) -> None:
        """Hold at least ``size`` float32."""
        self._memory = torch.empty(size, dtype=torch.float32, device="cpu")
        self.address, self.size = self._memory.data_ptr(), size


scratch = Scratch()


class Block:
    """A block in memory, and the compiled function that it is for.

    Attributes:
        slots: see ``call.py``.
        buffer: the same memory.
        address: of the slots.
        run: calls the function; 0 if it declines.
    """

    __slots__ = ("_memory", "address", "buffer", "run", "slots")

    def __init__(self, entry: int, slots: dict[int, int], works: dict[int, Work]) -> None:
        self._memory = torch.zeros(
            call.SIZE, dtype=torch.int64, device="cpu"
        )  # torch's begin a cache line, NumPy's need not
        self.slots: NDArray[np.int64] = self._memory.numpy()
        self.buffer = self.slots.data
        self.address = self._memory.data_ptr()
        self.run: Any = _Entry(entry)
        for slot, value in slots.items():
            self.slots[slot] = value
        for at, work in works.items():
            self.slots[at : at + 8] = work.slots()


class Plan(NamedTuple):
    """What the loops need to know of a quantizer, a matrix view and a dtype.

    Attributes:
        sections: of the payload.
        offsets: of the elements; rows are blocks where a scale covers one row or less.
        by_block: they are.
        kind: of codes, see ``call.py``.
        dtype: its name.
        bits: width of the codes that the loops write: their own where they fill the bytes of every chunk, else 8.
        apart: codes are packed in a loop of its own.
        borders: how many there are between the magnitudes.
        table: sixteen float32 each: the level of every code of a table codec, zero past the last one; the border from
            each whole number of grains to the next, infinity where there is none; and how many borders there are below
            that number, the bits of an int32. Then the bound, the grain and the borders, see ``call.py``.
        slots: of a block, but for addresses of tensors.
        scratch_size, own_size: float32 of the scratch memory, and those that each worker adds.
        apart_at: where in it, in bytes, codes that are packed apart lie.
    """

    sections: Sections
    offsets: Offsets
    by_block: bool
    kind: int
    dtype: str
    bits: int
    apart: bool
    borders: int
    table: NDArray[np.float32]
    slots: dict[int, int]
    scratch_size: int
    own_size: int
    apart_at: int

    def encoder(self, terms: int) -> Block:
        """A block for encoding with terms of a kind, see ``call.py``."""
        at, dtype, sign = self.sections, self.dtype, self.kind == SIGN
        slots, works = self.slots | {call.ROW_WORDS: 0 if self.by_block and sign else self.row_words}, {}
        if self.by_block:
            if sign:
                body = address_of("blocks.block_signs", dtype, terms)
            elif self.kind >= LINEAR:
                body = address_of("blocks.block_reaching", dtype, terms, self.kind)
            else:
                body = address_of("blocks.block_nearest", dtype, terms, self.bits, self.borders)
            works[call.FIRST_PASS] = Work(self.offsets.row_at.size, at.elements, body)
        else:
            tiles = -(-at.rows // TILE_ROWS)
            survey = "signs" if sign else "reach" if self.kind >= LINEAR else "moments"
            body = address_of(f"rows.survey_{survey}", dtype, MANY_TERMS if terms == ONE_TERM else terms)
            works[call.FIRST_PASS] = Work(at.groups * tiles, at.elements, body)
            runs, sums = -(-at.channels // LANES), at.groups * tiles * at.channels
            works[call.FOLD] = Work(at.groups * runs, sums, address_of("scales.fold_tiles"))
            if sign:
                body = self._apply(terms)
            elif self.kind >= LINEAR:
                body = address_of("rows.code_reaching", dtype, terms, self.kind)
            else:
                body = address_of("rows.code_nearest", dtype, terms, self.bits, self.borders, self.kind == TRITS)
            # backwards: the end is in a cache still
            works[call.SECOND_PASS] = Work(self.offsets.row_at.size, at.elements, body, True)
        if self.apart:
            works[call.APART_PASS] = self._apart("pack")
        return Block(address_of("entries.encode_blocks" if self.by_block else "entries.encode_rows"), slots, works)

    @property
    def row_words(self) -> int:
        """Words of the codes of a row or block; 0 where loops cannot sum them up: rows may end within words, and codes
        that are packed apart pass through other loops.
        """
        row_bits = self.sections.channels * self.bits
        return 0 if self.apart or row_bits % 32 else row_bits // 32

    def decoder(self, terms: int) -> Block:
        """A block for decoding with terms of a kind."""
        # backwards: the checksum has just read the payload, whose end is in a cache still
        work = Work(self.offsets.row_at.size, self.sections.elements, self._apply(terms), True)
        works = {call.SECOND_PASS: work}
        if self.apart:
            works[call.APART_PASS] = self._apart("unpack")
        return Block(address_of(self.decoding), self.slots, works)

    @property
    def decoding(self) -> str:
        """The unit that decodes."""
        return "entries.decode_blocks" if self.by_block else "entries.decode_rows"

    def _apply(self, terms: int) -> int:
        return address_of(
            "rows.apply_codes", self.dtype, terms, NEAREST if self.kind == TRITS else self.kind, self.bits
        )

    def _apart(self, what: str) -> Work:
        at = self.sections
        if at.base3:
            return Work(at.codes_nbytes, at.elements, address_of(f"codes.{what}_trits"))
        return Work(-(-at.elements // 8), at.elements, address_of(f"codes.{what}_eights"))


def steps_of(spec: QuantizerSpec, view: MatrixView, dtype: torch.dtype, device: torch.device) -> CpuSteps | None:
    """The steps of one stream; ``None`` where the loops do not apply: another dtype, blocks that are not consecutive in
    memory, trits with a scale for each block, signs that do not fill their bytes, or levels too uneven to be looked up.
    """
    if view.numel == 0 or device.type != "cpu" or dtype not in DTYPES:
        return None
    plan = plan_of(spec, view, DTYPES[dtype])
    return None if plan is None else CpuSteps(plan, view.numel, dtype)


@lru_cache(maxsize=256)
def plan_of(spec: QuantizerSpec, view: MatrixView, dtype: str) -> Plan | None:
    """The plan, or ``None`` where the loops do not apply."""
    sections, kind = spec.sections_of(view.shape), KINDS.index(spec.kind)
    by_block = sections.rows == 1
    offsets = offsets_of_blocks(view, sections.groups, sections.channels) if by_block else offsets_of(view)
    table = _table_of(spec)
    if offsets is None or table is None or (by_block and sections.base3):
        return None
    apart = sections.base3 or sections.bits == 3 or bool(((offsets.chunk_len * sections.bits) % 8).any())
    if kind == SIGN and apart:
        return None  # signs are packed as they are found
    bits = 8 if apart else sections.bits
    sizes = _rooms(sections, by_block, apart)
    starts = np.concatenate([[0], np.cumsum([-(-size // 16) * 16 for size in sizes.values()])]).tolist()
    slots = dict(zip(sizes, starts, strict=False))
    apart_at = 4 * slots.pop(call.CODES)
    block = max(LITTLE if kind == SIGN or kind >= LINEAR else MUCH, -(-sections.channels // LANES) * LANES)
    own = 3 * block if by_block else -(-sections.channels // LANES) * LANES + LANES
    slots |= {
        call.ROW_AT: offsets.row_at.ctypes.data,
        call.CHUNK_AT: offsets.chunk_at.ctypes.data,
        call.CHUNK_FROM: offsets.chunk_from.ctypes.data,
        call.CHUNK_LEN: offsets.chunk_len.ctypes.data,
        call.CHUNKS: offsets.chunk_at.size,
        call.GROUPS: 1 if by_block else sections.groups,
        call.ROWS: offsets.rows,
        call.CHANNELS: offsets.channels,
        call.NUMEL: offsets.numel,
        call.ROW_COUNT: offsets.row_at.size,
        call.ELEMENTS: sections.elements,
        call.TILES: -(-sections.rows // TILE_ROWS),
        call.KIND: kind,
        call.APART: int(apart),
        call.WEIGHTED: int(sections.row_scale_count > 0),
        call.SHARED: int(sections.channel_scales_per_group == 1),
        call.WIDENING: spec.roots,
        call.TABLE: table.ctypes.data,
        call.CODES_NBYTES: sections.codes_nbytes,
        call.ROW_SCALES_AT: sections.row_scales_at,
        call.ROW_SCALE_COUNT: sections.row_scale_count,
        call.CHANNEL_SCALES_AT: sections.channel_scales_at,
        call.SCALE_COUNT: sections.groups * sections.channel_scales_per_group,
        call.TOTAL_NBYTES: sections.total_nbytes,
        call.BITS: sections.bits,
        call.OWN_EACH: own,
    }
    borders = len(spec.magnitudes) - 1 if kind == NEAREST else 1
    return Plan(sections, offsets, by_block, kind, dtype, bits, apart, borders, table, slots, starts[-1], own, apart_at)


def _rooms(sections: Sections, by_block: bool, apart: bool) -> dict[int, int]:
    """Float32 of each part of the scratch memory; what each worker has comes last."""
    rows = sections.groups * sections.rows
    scales = sections.channels if by_block else sections.groups * sections.channels
    tiles = -(-sections.rows // TILE_ROWS)
    sums = 0 if by_block else sections.groups * tiles * sections.channels
    return {
        call.STAT_ROOM: rows,
        call.T_ROOM: rows,
        call.INVERSE_T_ROOM: rows,
        call.NORMS_ROOM: sections.groups,
        call.WEIGHTS_ROOM: tiles,
        call.FIRST_ROOM: sums,
        call.SECOND_ROOM: sums,
        call.C_ROOM: scales,
        call.INVERSE_C_ROOM: scales,
        call.CODES: -(-sections.elements // 4) if apart else 0,
        call.OWN_ROOM: 0,
    }


def _table_of(spec: QuantizerSpec) -> NDArray[np.float32] | None:
    """The table, see ``Plan``; ``None`` for levels that the loops cannot look up."""
    magnitudes = (0.0, 1.0) if spec.kind == "trits" else spec.magnitudes if spec.kind == "nearest" else ()
    table, count, levels = np.zeros(call.TABLE_SIZE, np.float32), len(magnitudes), np.array(magnitudes, np.float32)
    grain, borders = _in_grains([np.float32((low + high) / 2) for low, high in pairwise(magnitudes)])
    if spec.kind == "trits":
        table[:3] = levels[0], levels[1], -levels[1]
    else:
        table[:count], table[count : 2 * count] = levels, -levels
    whole = np.array(borders).astype(int)
    if len(set(whole.tolist())) < whole.size:  # two borders in one place of the table: no levels of ours
        return None
    table[16:32] = np.inf
    table[16 + whole] = borders
    table[32:48] = (whole[:, None] < np.arange(16)).sum(0, dtype=np.int32).view(np.float32)
    table[call.BOUND] = LARGEST_OF_MEAN / magnitudes[0] if spec.roots else spec.reach
    table[call.GRAIN] = grain
    table[call.BORDERS : call.BORDERS + len(borders)] = borders
    return table


def _in_grains(borders: list[np.float32]) -> tuple[np.float32, tuple[np.float32, ...]]:
    """The smallest grains of which no border is sixteen, and the borders in them."""
    if not borders:
        return np.float32(1), ()
    grain = np.exp2(np.floor(np.log2(np.nextafter(np.float32(16), np.float32(0)) / borders[-1])), dtype=np.float32)
    return grain, tuple(border * grain for border in borders)


def loops_for(codes: Tensor, count: int = 1) -> int:
    """What loops are compiled for that read or write the codes of one ``spec.Rounded``, or read two: ``call.py``."""
    if count > 1:
        return TWO_IN_INT8 if codes.dtype == torch.int8 else TWO_IN_FP8
    return TERM_IN_INT8 if codes.dtype == torch.int8 else TERM_IN_FP8


def loops_of(terms: tuple[MovingTerm, ...]) -> int:
    """What loops are compiled for that read these terms, see ``call.py``."""
    if terms and isinstance(terms[0], Rounded):
        return loops_for(terms[0].codes, len(terms))
    return ONE_TERM if len(terms) == 1 else MANY_TERMS


def second_term(term: MovingTerm) -> tuple[int, int, int]:
    """The slots of the second of two terms, see ``call.py``: what ``VELOCITY``, ``TERMS`` and ``FACTOR`` are."""
    if isinstance(term, Velocity):
        assert isinstance(term.coefficient, float)
        return term.data_ptr(), 3, int.from_bytes(_FLOAT32.pack(term.coefficient), "little")
    assert isinstance(term, Tensor)
    return term.data_ptr(), 2, 0


def second_rounded(term: MovingTerm) -> tuple[int, int, int, int]:
    """The slots of a second term in eight bits: what ``TERMS``, ``FACTOR``, ``SECOND`` and ``SECOND_SCALES`` are."""
    _, number, factor = second_term(term) if isinstance(term, Velocity) else (0, 2, 0)
    kept = term.previous if isinstance(term, Velocity) else term
    assert isinstance(kept, Rounded)
    return number, factor, kept.codes.data_ptr(), kept.scales.data_ptr()


class CpuSteps:
    """The steps of one stream, see ``kernels.Steps``. One thread at a time may take one."""

    __slots__ = (
        "_decoders",
        "_dtype",
        "_encoders",
        "_numel",
        "_out_streams",
        "_signs",
        "_sums",
        "_total_nbytes",
        "checksum",
        "plan",
    )

    def __init__(self, plan: Plan, numel: int, dtype: torch.dtype) -> None:
        team.prepare()
        self.plan = plan
        self._numel = numel
        self._dtype = dtype
        self._total_nbytes = plan.sections.total_nbytes
        self._out_streams = numel * dtype.itemsize >= STREAMED_NBYTES
        self._sums = plan.row_words > 0
        self._signs = plan.kind == SIGN
        self.checksum: int | None = None
        # compiled, or read from disk, when first needed; by the kind of terms
        self._encoders: list[Block | None] = [None] * 6
        self._decoders: list[Block | None] = [None] * 6

    def encode(
        self,
        x: Tensor,
        terms: tuple[MovingTerm, ...],
        out: Tensor | None,
        payload: Tensor,
        *,
        copy: Tensor | None = None,
    ) -> bool:
        numel, dtype, count = self._numel, self._dtype, len(terms)
        for one in (x, *terms):
            if one.dtype is not dtype or not one.is_cpu or one.numel() != numel:
                return False
            if not one.is_contiguous():
                return self.encode(
                    x.contiguous(), tuple([term.contiguous() for term in terms]), out, payload, copy=copy
                )
        if payload.dtype is not torch.uint8 or payload.numel() != self._total_nbytes or not payload.is_contiguous():
            return False
        out_at = copy_at = 0
        if out is not None:
            if out.dtype is not dtype or not out.is_cpu or out.numel() != numel or not out.is_contiguous():
                return False
            out_at = out.data_ptr()
        if copy is not None:
            if copy.dtype is not dtype or not copy.is_cpu or copy.numel() != numel or not copy.is_contiguous():
                return False
            copy_at = copy.data_ptr()
        kind, second_at, factor, codes_at, scales_at = ONE_TERM if count == 1 else MANY_TERMS, 0, 0, 0, 0
        if count and isinstance(terms[0], Rounded):
            kind, second_at = loops_for(terms[0].codes, count), terms[0].scales.data_ptr()
            if count > 1:
                count, factor, codes_at, scales_at = second_rounded(terms[1])
        elif count > 1:
            second_at, count, factor = second_term(terms[1])
        block = self._encoders[kind]
        if block is None:
            block = self._encoders[kind] = self.plan.encoder(kind)
        threads, plan, payload_at = torch.get_num_threads(), self.plan, payload.data_ptr()
        needed = plan.scratch_size + threads * plan.own_size
        if scratch.size < needed:
            scratch.grow(needed)
        _DYNAMIC.pack_into(
            block.buffer,
            0,
            x.data_ptr(),
            terms[0].data_ptr() if terms else 0,
            second_at,
            count,
            out_at,
            payload_at,
            scratch.address + plan.apart_at if plan.apart else payload_at,
            self._out_streams and out_at % CACHE_LINE == 0,
            threads,
            team.address,
            scratch.address,
            copy_at,
            self._out_streams and copy_at % CACHE_LINE == 0,
            factor,
            codes_at,
            scales_at,
        )
        done = bool(block.run(block.address))
        # signs are summed up by the pass that writes ``out``, where scales belong to rows and channels
        sums = self._sums and (not self._signs or (out_at and not plan.by_block))
        self.checksum = int(block.slots[call.SUM]) & _MASK64 if done and sums else None
        return done

    def decode(
        self,
        payload: Tensor,
        terms: tuple[MovingTerm, ...],
        out: Tensor,
        *,
        copy: Tensor | None = None,
    ) -> bool:
        numel, dtype, count = self._numel, self._dtype, len(terms)
        copy_at = 0
        if copy is not None:
            if copy.dtype is not dtype or not copy.is_cpu or copy.numel() != numel or not copy.is_contiguous():
                return False
            copy_at = copy.data_ptr()
        for one in (out, *terms):
            if one.dtype is not dtype or not one.is_cpu or one.numel() != numel:
                return False
            if not one.is_contiguous():
                return False
        if payload.dtype is not torch.uint8 or payload.numel() != self._total_nbytes or not payload.is_contiguous():
            return False
        kind, second_at, factor, codes_at, scales_at = ONE_TERM if count == 1 else MANY_TERMS, 0, 0, 0, 0
        if count and isinstance(terms[0], Rounded):
            kind, second_at = loops_for(terms[0].codes, count), terms[0].scales.data_ptr()
            if count > 1:
                count, factor, codes_at, scales_at = second_rounded(terms[1])
        elif count > 1:
            second_at, count, factor = second_term(terms[1])
        block = self._decoders[kind]
        if block is None:
            block = self._decoders[kind] = self.plan.decoder(kind)
        threads, plan, payload_at = torch.get_num_threads(), self.plan, payload.data_ptr()
        needed = plan.scratch_size + threads * plan.own_size
        if scratch.size < needed:
            scratch.grow(needed)
        out_at = out.data_ptr()
        _DYNAMIC.pack_into(
            block.buffer,
            0,
            out_at,
            terms[0].data_ptr() if terms else 0,
            second_at,
            count,
            out_at,
            payload_at,
            scratch.address + plan.apart_at if plan.apart else payload_at,
            0,
            threads,
            team.address,
            scratch.address,
            copy_at,
            self._out_streams and copy_at % CACHE_LINE == 0,
            factor,
            codes_at,
            scales_at,
        )
        return bool(block.run(block.address))


class _Sums(threading.local):
    """Blocks for checksums, of each thread, by how the copy is written: not at all, into the caches, past them."""

    def __init__(self) -> None:
        team.prepare()
        self.blocks: list[Block | None] = [None, None, None]

    def make(self, how: int) -> Block:
        """Make the block for a way of copying."""
        work = Work(0, 0, address_of("checksum.sum_runs", how > 0, how > 1))
        made = self.blocks[how] = Block(address_of("checksum.sum_all"), {}, {call.FIRST_PASS: work})
        return made


_sums = cache(_Sums)

_RUNS, _WORK_WORDS = call.FIRST_PASS + call.COUNT, call.FIRST_PASS + call.WORK_ELEMENTS


def weighted_sum(data: Tensor, copy: Tensor | None = None) -> int:
    """As ``reference/checksum.py``, of a whole number of words on the CPU that begin on 4 bytes and are contiguous."""
    nbytes = data.numel()
    copy_at = 0 if copy is None else copy.data_ptr()
    streams = copy is not None and nbytes >= STREAMED_NBYTES and copy_at % CACHE_LINE == 0
    sums, how = _sums(), (copy is not None) + streams
    block = sums.blocks[how] or sums.make(how)
    slots, words, threads = block.slots, nbytes >> 2, torch.get_num_threads()
    _DYNAMIC.pack_into(
        block.buffer, 0, 0, 0, 0, 0, copy_at, data.data_ptr(), 0, streams, threads, team.address, 0, 0, 0, 0, 0, 0
    )
    slots[call.WORDS], slots[_RUNS], slots[_WORK_WORDS] = words, -(-words // RUN), words
    return int(block.run(block.address)) & _MASK64


class Samples:
    """Tells whether residuals of a stream are far larger than their tensors, see ``reference/samples.py``."""

    __slots__ = ("_blocks", "_dtype", "_numel")

    def __init__(self, numel: int, dtype: torch.dtype) -> None:
        self._numel = numel
        self._dtype = dtype
        self._blocks: dict[int, Block] = {}  # made when first needed: only a sender asks

    def __call__(self, x: Tensor, terms: tuple[MovingTerm, ...]) -> bool:
        for one in (x, *terms):
            if one.dtype is not self._dtype or not one.is_cpu or one.numel() != self._numel or not one.is_contiguous():
                return samples.is_far_larger(x, terms)
        kind, count, second, factor, codes_at, scales_at = MANY_TERMS, len(terms), 0, 0, 0, 0
        if isinstance(terms[0], Rounded):
            kind, second = loops_for(terms[0].codes, count), terms[0].scales.data_ptr()
            if count > 1:
                count, factor, codes_at, scales_at = second_rounded(terms[1])
        elif count > 1:
            second, count, factor = second_term(terms[1])
        block = self._blocks.get(kind)
        if block is None:
            unit = address_of("samples.far_larger", DTYPES[self._dtype], kind)
            block = self._blocks[kind] = Block(unit, {call.NUMEL: self._numel}, {})
        given = x.data_ptr(), terms[0].data_ptr(), second, count
        _DYNAMIC.pack_into(block.buffer, 0, *given, 0, 0, 0, 0, 1, 0, 0, 0, 0, factor, codes_at, scales_at)
        return bool(block.run(block.address))
