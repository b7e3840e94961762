"""The frame: a fixed 128-byte header, an optional shape block, and the payload.

:data:`FIELDS` is the header, little endian, version 2: packing, unpacking and ``docs/wire_format.md`` read that table.
The header and the shape block (eight 8-byte sizes) are multiples of 16 bytes, so a payload may be viewed as any dtype.
A frame made for a group carries no shape block: both ends know the shape.

Checksums are sums of 32-bit words, each times an odd number that depends on its position, modulo 2**64
(:func:`weight`). Another word always gives another sum. The order of summing does not matter, so that kernels may add
up words while they pack them.
"""

from __future__ import annotations

import ctypes
import hashlib
import struct
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compactdist.errors import ConfigError, FrameError
from compactdist.kernels.spec import CHECKSUM_WEIGHT, HeadPlaces

__all__ = [
    "ANNOUNCED_PLACE",
    "CHECKSUM_PLACE",
    "COEFFICIENT_PLACE",
    "CHECKSUM_WEIGHTED_SUM",
    "DTYPES",
    "FIELDS",
    "Field",
    "HEADER_NBYTES",
    "HEAD_PLACES",
    "HeadTemplate",
    "Header",
    "KEYFRAME",
    "MASK64",
    "MAX_DIMS",
    "NONFINITE",
    "NO_STATE",
    "RESTART",
    "SHAPE",
    "SHAPE_NBYTES",
    "STAND_IN",
    "STATELESS",
    "bytes_at",
    "coefficient_in",
    "differences",
    "empty_frame",
    "explain",
    "flags_in",
    "flags_of",
    "frame_in",
    "hash64",
    "pack",
    "seal",
    "step_in",
    "stream_fingerprint",
    "table",
    "unpack",
    "unpack_head",
    "weight",
    "write_head",
]

MAGIC = b"CDF2"
VERSION = 2
CHECKSUM_WEIGHTED_SUM = 1
MASK64 = (1 << 64) - 1
_MASK32 = (1 << 32) - 1


class Field(NamedTuple):
    """One field of the header.

    Attributes:
        name: of the :class:`Header`'s attribute, or of what only the wire knows.
        code: of :mod:`struct`.
        about: what the field says, for the documentation.
    """

    name: str
    code: str
    about: str

    @property
    def nbytes(self) -> int:
        """Bytes on the wire."""
        return struct.calcsize("<" + self.code)


FIELDS = (
    Field("magic", "4s", "`CDF2`"),
    Field("version", "B", "2"),
    Field("flags", "B", "1 keyframe, 2 shape block, 4 non-finite, 8 stateless, 16 no state, 32 restart, 64 stand-in"),
    Field("dtype", "B", "0 float32, 1 float16, 2 bfloat16, 3 float64, then integers, bool, complex (`wire.DTYPES`)"),
    Field("dims", "B", "dimensions in the shape block, 0 without one"),
    Field("step", "i", "step of the call since the last reset, from 0; -1 outside of steps"),
    Field("epoch", "I", "resets so far"),
    Field("sequence", "I", "frames sent on this stream before, in this epoch"),
    Field("part", "H", "number of this frame among the parts of one tensor, from 0"),
    Field("parts", "H", "frames that make up one tensor, 1 or more"),
    Field("stream", "Q", "blake2b-64 of group name, site key and stream configuration"),
    Field("numel", "Q", "elements"),
    Field(
        "payload_nbytes", "Q", "payload bytes, padding to a common frame size not counted; of a stand-in: what follows"
    ),
    Field("groups", "I", "groups of the payload's matrix view"),
    Field("rows", "I", "rows of it"),
    Field("channels", "I", "channels of it"),
    Field("layout", "I", "crc32 of the layout hint behind the matrix view, 0 without one"),
    Field("next_groups", "I", "groups of the view announced for the next frame, 0: no change"),
    Field("next_channels", "I", "channels of it, 0: no change"),
    Field("rate", "B", "rate of this payload, 0 where the codec has just one"),
    Field("next_rate", "B", "rate announced for the next frame, 0: no change"),
    Field("next_kind", "B", "1: the next frame is a keyframe, 0: not announced"),
    Field("predictor", "B", "prediction: 0 none, 1 last value, 2 damped velocity, 3 adaptive velocity"),
    Field("checksum_kind", "B", "1: weighted sum"),
    Field("reserved", "3s", "zero"),
    Field("codec", "I", "crc32 of id and configuration of the codec of residuals"),
    Field("keyframe_codec", "I", "the same of the codec of keyframes, 0: the tensor's own bytes"),
    Field(
        "coefficient",
        "f",
        "of the predictor: damping of 2; of 3, this frame's multiple of 1/16 in [-1, 1]",
    ),
    Field("coefficient_2", "f", "second coefficient"),
    Field("checksum", "Q", "weighted sum of the payload"),
    Field("digest", "Q", "of all payloads that made the history which this one was made against; 0: none"),
    Field("reserved_2", "8s", "zero"),
    Field("header_checksum", "Q", "weighted sum of header and shape block, this field left out"),
)
"""The header. A field's offset is the sum of the bytes before it."""

_STRUCT = struct.Struct("<" + "".join(field.code for field in FIELDS))
_OFFSETS = dict(
    zip((field.name for field in FIELDS), accumulate((field.nbytes for field in FIELDS), initial=0), strict=False)
)
_PLAIN = tuple(
    field.name
    for field in FIELDS
    if field.name not in ("magic", "version", "flags", "dtype", "dims", "reserved", "reserved_2", "header_checksum")
)
_SHAPE_STRUCT = struct.Struct("<8Q")
HEADER_NBYTES = _STRUCT.size
SHAPE_NBYTES = _SHAPE_STRUCT.size
MAX_DIMS = 8

_CALL, _CALL_AT = struct.Struct("<iII"), _OFFSETS["step"]
_SUMS, _SUMS_AT = struct.Struct("<QQ8xQ"), _OFFSETS["checksum"]
CHECKSUM_PLACE = slice(_OFFSETS["checksum"], _OFFSETS["checksum"] + 8)
"""Where a header says the payload's checksum, little endian."""
COEFFICIENT_PLACE = slice(_OFFSETS["coefficient"], _OFFSETS["coefficient"] + 4)
"""Where it says the predictor's coefficient, a float32."""
ANNOUNCED_PLACE = slice(_OFFSETS["next_rate"], _OFFSETS["next_rate"] + 2)
"""Where it announces rate and kind of the next frame, a byte each."""

KEYFRAME = 1
"""The payload is the tensor itself and starts (or restarts) the stream's history."""
SHAPE = 2
"""A shape block follows the header."""
NONFINITE = 4
"""The sender's tensor held NaN or Inf. Without KEYFRAME, or with a coded keyframe, there is nothing to decode; with a
raw keyframe the data is exact. Either way both ends forget the stream's history. A GPU does not know it before the
frame is made: a residual or a coded keyframe then has its payload, which both ends apply, and its values are not handed
out; a raw keyframe has no flag, and both ends remember zero in place of NaN and Inf."""
STATELESS = 8
"""The payload is the tensor itself and must not touch the history (a pass-through the receiver could not foresee)."""
NO_STATE = 16
"""The sender has no memory budget for this site: from the next call on it passes through."""
RESTART = 32
"""The payload codes the tensor itself, as a residual with a prediction of zero; the history starts anew from it."""
STAND_IN = 64
"""The frame is larger than the size that was agreed and follows in a message of its own; here is its header only."""

HEAD_PLACES = HeadPlaces(
    FLAGS=_OFFSETS["flags"] // 4,
    CALL=_CALL_AT // 4,
    SUMS=_SUMS_AT // 4,
    TOTAL=_OFFSETS["header_checksum"] // 4,
    NONFINITE=NONFINITE << 8 * (_OFFSETS["flags"] % 4),
)
"""Where kernels write what differs between the headers of a stream."""

_FLAG_NAMES = {
    KEYFRAME: "keyframe",
    SHAPE: "shape",
    NONFINITE: "nonfinite",
    STATELESS: "stateless",
    NO_STATE: "no-state",
    RESTART: "restart",
    STAND_IN: "stand-in",
}

_KNOWN_FLAGS = sum(_FLAG_NAMES)

DTYPES: tuple[torch.dtype, ...] = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.bool,
    torch.complex64,
    torch.complex128,
)


@dataclass(frozen=True, slots=True)
class Header:
    """What a frame says about itself; :data:`FIELDS` gives sizes and meanings."""

    stream: int
    codec: int
    step: int
    epoch: int
    sequence: int
    payload_nbytes: int
    numel: int
    dtype: torch.dtype
    flags: int = 0
    part: int = 0
    parts: int = 1
    layout: int = 0
    groups: int = 0
    rows: int = 0
    channels: int = 0
    next_groups: int = 0
    next_channels: int = 0
    rate: int = 0
    next_rate: int = 0
    next_kind: int = 0
    predictor: int = 0
    checksum_kind: int = CHECKSUM_WEIGHTED_SUM
    keyframe_codec: int = 0
    coefficient: float = 0.0
    coefficient_2: float = 0.0
    checksum: int = 0
    digest: int = 0
    shape: tuple[int, ...] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes before the payload: header and, if there is one, shape block."""
        return HEADER_NBYTES + (SHAPE_NBYTES if self.shape is not None else 0)

    @property
    def is_keyframe(self) -> bool:
        """Whether the payload is a keyframe."""
        return bool(self.flags & KEYFRAME)

    @property
    def is_raw_keyframe(self) -> bool:
        """Whether the payload is a tensor's own bytes, which make its history."""
        return self.is_keyframe and not self.keyframe_codec

    def describe(self) -> str:
        """One line for error messages and ``explain``."""
        names = [name for bit, name in _FLAG_NAMES.items() if self.flags & bit] or ["residual"]
        of_parts = f", part {self.part + 1} of {self.parts}" if (self.part, self.parts) != (0, 1) else ""
        return (
            f"{'+'.join(names)} frame {self.sequence} of epoch {self.epoch}, step {self.step}{of_parts}, stream "
            f"{self.stream:016x}, codec {self.codec:08x}, {self.numel} elements of "
            f"{str(self.dtype).removeprefix('torch.')} as ({self.groups}, {self.rows}, {self.channels}), payload "
            f"{self.payload_nbytes} bytes"
        )


def weight(position: int) -> int:
    """The odd 32-bit number that the word at a position is multiplied with."""
    return (2 * position + 1) * CHECKSUM_WEIGHT & _MASK32


_CHECKED = struct.Struct(f"<{(HEADER_NBYTES - 8) // 4}I8x{SHAPE_NBYTES // 4}I")
_CHECKED_WEIGHTS = [weight(at // 4) for at in range(0, HEADER_NBYTES + SHAPE_NBYTES, 4) if not 120 <= at < 128]


RESET = "call reset() on all ranks to start again from keyframes"


def _header_sum(raw: bytes) -> int:
    """The checksum of a header, with or without a shape block behind it."""
    words = _CHECKED.unpack(raw.ljust(_CHECKED.size, b"\0"))
    return sum(map(int.__mul__, words, _CHECKED_WEIGHTS)) & MASK64


def header_bytes(header: Header) -> bytes:
    """The bytes before the payload.

    Raises:
        ConfigError: the shape has more than eight dimensions or the dtype has no code.
    """
    shape = header.shape
    if shape is not None and len(shape) > MAX_DIMS:
        raise ConfigError(f"a frame carries shapes of at most {MAX_DIMS} dimensions, got {len(shape)}: flatten some")
    try:
        dtype = DTYPES.index(header.dtype)
    except ValueError:
        raise ConfigError(f"{header.dtype} cannot travel in a frame") from None
    values = {name: getattr(header, name) for name in _PLAIN}
    values |= {
        "magic": MAGIC,
        "version": VERSION,
        "flags": header.flags | (SHAPE if shape is not None else 0),
        "dtype": dtype,
        "dims": 0 if shape is None else len(shape),
        "reserved": bytes(3),
        "reserved_2": bytes(8),
        "header_checksum": 0,
    }
    block = b"" if shape is None else _SHAPE_STRUCT.pack(*shape, *([0] * (MAX_DIMS - len(shape))))
    head = _STRUCT.pack(*(values[field.name] for field in FIELDS))
    return head[:-8] + _header_sum(head + block).to_bytes(8, "little") + block


class HeadTemplate:
    """The bytes before the payload that all frames of one kind on a stream share.

    Args:
        header: of any frame of that kind, without a shape. Its step, epoch, sequence, checksum and digest are ignored.
    """

    __slots__ = ("_raw", "_total", "header")

    def __init__(self, header: Header) -> None:
        self.header = replace(header, step=0, epoch=0, sequence=0, checksum=0, digest=0)
        self._raw = header_bytes(self.header)
        self._total = _header_sum(self._raw)

    @property
    def raw(self) -> bytes:
        """The bytes, with zeros where something is filled in; the header's own checksum is none of them."""
        return self._raw

    def filled(self, step: int, epoch: int, sequence: int, checksum: int, digest: int) -> bytes:
        """The bytes before the payload of one frame."""
        raw = bytearray(self._raw)
        _CALL.pack_into(raw, _CALL_AT, step, epoch, sequence)
        total = self._total + (step & _MASK32) * _STEP_WEIGHT + epoch * _EPOCH_WEIGHT + sequence * _SEQUENCE_WEIGHT
        total += (checksum & _MASK32) * _CHECKSUM_WEIGHTS[0] + (checksum >> 32) * _CHECKSUM_WEIGHTS[1]
        total += (digest & _MASK32) * _DIGEST_WEIGHTS[0] + (digest >> 32) * _DIGEST_WEIGHTS[1]
        _SUMS.pack_into(raw, _SUMS_AT, checksum, digest, total & MASK64)
        return bytes(raw)


_COEFFICIENT, _COEFFICIENT_AT = struct.Struct("<f"), _OFFSETS["coefficient"]


def coefficient_in(head: bytes) -> float:
    """The predictor's coefficient that a header says; any float32."""
    return float(_COEFFICIENT.unpack_from(head, _COEFFICIENT_AT)[0])


def _weights_of(name: str) -> tuple[int, int]:
    return weight(_OFFSETS[name] // 4), weight(_OFFSETS[name] // 4 + 1)


_STEP_WEIGHT, _EPOCH_WEIGHT, _SEQUENCE_WEIGHT = (_weights_of(name)[0] for name in ("step", "epoch", "sequence"))
_CHECKSUM_WEIGHTS, _DIGEST_WEIGHTS = _weights_of("checksum"), _weights_of("digest")


bytes_at: Any = (ctypes.c_char * HEADER_NBYTES).from_address
"""A header's bytes at an address: ``bytes_at(address).raw`` reads and writes them, at a third of a call of C."""


def write_head(frame: Tensor, head: bytes) -> Tensor:
    """Write the bytes before the payload into a frame, and return the frame."""
    if frame.is_cpu:
        if len(head) == HEADER_NBYTES:
            bytes_at(frame.data_ptr()).raw = head
        else:
            ctypes.memmove(frame.data_ptr(), head, len(head))
    else:
        frame[: len(head)].copy_(torch.frombuffer(bytearray(head), dtype=torch.uint8))
    return frame


def pack(header: Header, payload: Tensor, frame_nbytes: int | None = None) -> Tensor:
    """Put header and payload into one frame.

    Args:
        header: its ``payload_nbytes`` must be the payload's length, its ``checksum`` the payload's.
        payload: 1-D uint8.
        frame_nbytes: total length; the frame is padded with zeros up to it. ``None``: no padding.

    Returns:
        1-D uint8 tensor on the payload's device.

    Raises:
        ConfigError: the shape has more than eight dimensions or the dtype has no code.
    """
    frame, room = empty_frame(header.nbytes, header.payload_nbytes, frame_nbytes, payload.device)
    room.copy_(payload)
    return seal(frame, header)


def empty_frame(
    head_nbytes: int, payload_nbytes: int, frame_nbytes: int | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Memory for a frame whose header and payload are yet to be written.

    Args:
        head_nbytes: ``Header.nbytes``: a multiple of 16, so that the payload is aligned to 16 bytes.
        payload_nbytes: length of the payload.
        frame_nbytes: total length; ``None`` for no padding.
        device: of the frame.

    Returns:
        The frame, 1-D uint8, its padding zero, and the view of it that will hold the payload.
    """
    end = head_nbytes + payload_nbytes
    frame = torch.empty(frame_nbytes or end, dtype=torch.uint8, device=device)
    if frame_nbytes is not None and frame_nbytes > end:
        frame[end:].zero_()
    return frame, frame[head_nbytes:end]


def seal(frame: Tensor, header: Header) -> Tensor:
    """Write the header into a frame, and return the frame."""
    return write_head(frame, header_bytes(header))


def frame_in(data: Tensor) -> Header | None:
    """The header that bytes on the CPU begin with; ``None`` if they begin with none, which 12 bytes of it show."""
    raw = bytes(data.detach().reshape(-1).view(torch.uint8)[: HEADER_NBYTES + SHAPE_NBYTES].numpy())
    if len(raw) < HEADER_NBYTES or raw[: len(MAGIC)] != MAGIC:
        return None
    try:
        return _parsed(raw, "")
    except FrameError:
        return None


def unpack(frame: Tensor, where: str) -> Header:
    """Read and check a frame's header. The payload's checksum is not looked at.

    Args:
        frame: 1-D uint8.
        where: the call site, for the error message.

    Raises:
        FrameError: too short, not a frame, another version, a damaged header, or a payload that does not fit.
    """
    if not isinstance(frame, Tensor):
        raise FrameError(f"{where}: a frame is a 1-D uint8 tensor, got {type(frame).__name__}")
    if frame.dtype != torch.uint8 or frame.dim() != 1:
        raise FrameError(f"{where}: a frame is a 1-D uint8 tensor, got {frame.dtype} of shape {tuple(frame.shape)}")
    if frame.numel() < HEADER_NBYTES:
        raise FrameError(f"{where}: {frame.numel()} bytes are too few for a frame ({HEADER_NBYTES}-byte header)")
    header = _parsed(bytes(frame[: HEADER_NBYTES + SHAPE_NBYTES].cpu().numpy()), where)
    if header.nbytes + header.payload_nbytes > frame.numel() and not header.flags & STAND_IN:
        raise FrameError(
            f"{where}: the frame is cut short: {frame.numel()} bytes for a payload of {header.payload_nbytes} bytes. "
            f"Nothing was applied; {RESET}"
        )
    return header


def unpack_head(head: Tensor, where: str) -> Header:
    """As :func:`unpack`, of the first ``HEADER_NBYTES`` of a frame without a shape."""
    return _parsed(bytes(head.cpu().numpy()), where)


def _parsed(raw: bytes, where: str) -> Header:
    """The header at the beginning of these bytes, at least ``HEADER_NBYTES``."""
    values = dict(zip((field.name for field in FIELDS), _STRUCT.unpack_from(raw), strict=True))
    if values["magic"] != MAGIC:
        raise FrameError(
            f"{where}: what arrived is not a compactdist frame (it starts with {values['magic']!r}); the peer probably "
            f"sent it uncompressed. Use the same wrapped group and policy on both ends, then {RESET}"
        )
    if values["version"] != VERSION:
        raise FrameError(
            f"{where}: the peer speaks frame version {values['version']}, this is {VERSION}: install one version"
        )
    flags, dims, has_shape = values["flags"], values["dims"], bool(values["flags"] & SHAPE)
    block = raw[HEADER_NBYTES:] if has_shape else b""
    intact = _header_sum(raw[:HEADER_NBYTES] + block) == values["header_checksum"]
    if not intact or (has_shape and len(block) < SHAPE_NBYTES):
        raise FrameError(
            f"{where}: the frame's header is damaged (its checksum does not match). Nothing was applied; {RESET}"
        )
    unknown = flags & ~_KNOWN_FLAGS or any(values["reserved"]) or any(values["reserved_2"])
    if unknown or values["dtype"] >= len(DTYPES) or dims > (MAX_DIMS if has_shape else 0):
        raise FrameError(
            f"{where}: the frame's header is well formed but says what this version does not know (flags "
            f"{flags:#04x}, dtype {values['dtype']}, {dims} dimensions); nothing was applied. Install one version on "
            "all ranks"
        )
    return Header(
        flags=flags & ~SHAPE,
        dtype=DTYPES[values["dtype"]],
        shape=tuple(_SHAPE_STRUCT.unpack(block)[:dims]) if has_shape else None,
        **{name: values[name] for name in _PLAIN},
    )


def is_intact(head: bytes) -> bool:
    """Whether these bytes begin with a header without a shape whose checksum is right."""
    checksum = dict(zip((field.name for field in FIELDS), _STRUCT.unpack_from(head), strict=True))["header_checksum"]
    return bool(_header_sum(head[:HEADER_NBYTES]) == checksum)


def differences(got: bytes, expected: bytes) -> list[tuple[str, object, object]]:
    """The fields in which two headers differ, and what each says; in the order of :data:`FIELDS`, sums last."""
    both = zip(FIELDS, _STRUCT.unpack(got), _STRUCT.unpack(expected), strict=True)
    wrong = [(field, theirs, ours) for field, theirs, ours in both if theirs != ours]
    wrong.sort(key=lambda one: one[0].name in ("checksum", "digest", "header_checksum"))

    def shown(field: Field, value: object) -> object:
        return f"{value:016x}" if field.code == "Q" else value

    return [(field.name, shown(field, theirs), shown(field, ours)) for field, theirs, ours in wrong]


def step_in(head: bytes) -> int:
    """The step that a header says."""
    return int(_CALL.unpack_from(head, _CALL_AT)[0])


def flags_in(head: bytes) -> int:
    """The flags that a header says."""
    return head[_OFFSETS["flags"]]


def flags_of(frame: Tensor) -> Tensor:
    """The flags that a frame says, uint8 ``[]``, without a look at them."""
    return frame[_OFFSETS["flags"]]


def table() -> str:
    """The header as a Markdown table, as ``docs/wire_format.md`` shows it."""
    lines = ["| offset | bytes | field |", "|---:|---:|---|"]
    for field in FIELDS:
        lines.append(f"| {_OFFSETS[field.name]} | {field.nbytes} | `{field.name}`: {field.about} |")
    return "\n".join(lines) + "\n"


def stream_fingerprint(group: str, site: str, config: str) -> int:
    """64 bits that name a stream in frames, the same in every process.

    Args:
        group: name of the group, which differs between two wraps of one inner group.
        site: the site key.
        config: the stream's configuration as text.
    """
    return hash64(group, site, config)


def hash64(*texts: str) -> int:
    """64 bits of some texts, the same in every process."""
    return int.from_bytes(hashlib.blake2b("\0".join(texts).encode(), digest_size=8).digest(), "little")


def explain(frame: Tensor) -> str:
    """Say in one line what a frame holds (for people; raises FrameError like ``unpack``)."""
    return unpack(frame, "explain").describe()


def payload_of(frame: Tensor, header: Header) -> Tensor:
    """The payload bytes of a frame, 1-D uint8: a view where they are aligned to 16 bytes, else an aligned copy."""
    payload = frame[header.nbytes : header.nbytes + header.payload_nbytes]
    return payload if payload.storage_offset() % 16 == 0 else payload.clone()


def raw_payload(x: Tensor) -> Tensor:
    """The bytes of a tensor, zero-padded to a multiple of 16: 1-D uint8."""
    flat = x.detach().resolve_conj().resolve_neg().reshape(-1)
    if flat.stride(0) != 1:  # contiguous() leaves the strides of tensors with at most one element as they are
        flat = torch.empty(flat.shape, dtype=flat.dtype, device=flat.device).copy_(flat)
    flat = flat.view(torch.uint8)
    pad = -flat.numel() % 16
    return flat if pad == 0 else torch.nn.functional.pad(flat, (0, pad))


def raw_nbytes(numel: int, dtype: torch.dtype) -> int:
    """Bytes of ``raw_payload`` for this many elements."""
    return (numel * dtype.itemsize + 15) // 16 * 16


def from_raw(payload: Tensor, numel: int, dtype: torch.dtype) -> Tensor:
    """Undo ``raw_payload``: 1-D tensor of ``numel`` elements, a view of an aligned payload."""
    part = payload[: numel * dtype.itemsize]
    return (part if part.storage_offset() % dtype.itemsize == 0 else part.clone()).view(dtype)
