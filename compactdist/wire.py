"""The frame: a fixed 80-byte header, an optional shape block, and the payload.

Layout of the header (little endian, version 1)::

    offset  size  field
         0     4  magic  b"CDF1"
         4     1  version
         5     1  flags   (KEY, SHAPE, NONFINITE, STATELESS, NO_STATE)
         6     1  dtype   index into DTYPES
         7     1  number of dimensions in the shape block (0 without one)
         8     4  codec   crc32 of the codec's id and configuration
        12     4  epoch   resets so far
        16     8  key     hash of the site key
        24     4  sequence  frames sent on this stream before, in this epoch
        28     4  layout  crc32 of the layout hint behind the matrix view, 0 without one
        32     8  payload bytes, padding to a common frame size excluded
        40     8  elements
        48    12  groups, rows, channels of the payload's matrix view
        60     8  groups, channels announced for the next frame (0, 0: no change)
        68     4  crc32 of the header with this field zero
        72     8  digest of the history that the payload was made against (reserved, 0)

The header and the shape block (eight 8-byte sizes) are multiples of 16 bytes, so a payload may be viewed as any dtype.
A frame made for a group carries no shape block: both ends know the shape.
"""

from __future__ import annotations

import ctypes
import hashlib
import struct
import zlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compactdist.errors import ConfigError, FrameError

__all__ = [
    "DTYPES",
    "HEADER_NBYTES",
    "KEY",
    "MAX_DIMS",
    "NONFINITE",
    "NO_STATE",
    "SHAPE",
    "SHAPE_NBYTES",
    "STATELESS",
    "HeadTemplate",
    "Header",
    "empty_frame",
    "explain",
    "key_hash",
    "pack",
    "seal",
    "starts_with",
    "unpack",
    "write_head",
]

MAGIC = b"CDF1"
VERSION = 1
_STRUCT = struct.Struct("<4sBBBBIIQIIQQIIIIIIQ")
_SHAPE_STRUCT = struct.Struct("<8Q")
_WORD = struct.Struct("<I")
_EPOCH_OFFSET, _SEQUENCE_OFFSET, _CRC_OFFSET = 12, 24, 68
HEADER_NBYTES = _STRUCT.size
SHAPE_NBYTES = _SHAPE_STRUCT.size
MAX_DIMS = 8

KEY = 1
"""The payload is the tensor itself and starts (or restarts) the stream's history."""
SHAPE = 2
"""A shape block follows the header."""
NONFINITE = 4
"""The sender's tensor held NaN or Inf. Without KEY there is nothing to decode; with KEY the data is exact. Either way
both ends forget the stream's history."""
STATELESS = 8
"""The payload is the tensor itself and must not touch the history (a pass-through the receiver could not foresee)."""
NO_STATE = 16
"""The sender has no memory budget for this site: from the next call on it passes through."""

_FLAG_NAMES = {KEY: "key", SHAPE: "shape", NONFINITE: "nonfinite", STATELESS: "stateless", NO_STATE: "no-state"}

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
    """What a frame says about itself. See the module docstring for sizes and meanings."""

    codec: int
    key: int
    epoch: int
    sequence: int
    payload_nbytes: int
    numel: int
    dtype: torch.dtype
    flags: int = 0
    layout: int = 0
    groups: int = 0
    rows: int = 0
    channels: int = 0
    next_groups: int = 0
    next_channels: int = 0
    digest: int = 0
    shape: tuple[int, ...] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes before the payload: header and, if there is one, shape block."""
        return HEADER_NBYTES + (SHAPE_NBYTES if self.shape is not None else 0)

    @property
    def is_key(self) -> bool:
        """Whether the payload is a keyframe."""
        return bool(self.flags & KEY)

    def describe(self) -> str:
        """One line for error messages and ``explain``."""
        names = [name for bit, name in _FLAG_NAMES.items() if self.flags & bit] or ["residual"]
        return (
            f"{'+'.join(names)} frame {self.sequence} of epoch {self.epoch}, key {self.key:016x}, "
            f"codec {self.codec:08x}, {self.numel} elements of {str(self.dtype).removeprefix('torch.')} as "
            f"({self.groups}, {self.rows}, {self.channels}), payload {self.payload_nbytes} bytes"
        )


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
    flags = header.flags | (SHAPE if shape is not None else 0)
    fields = [
        MAGIC,
        VERSION,
        flags,
        dtype,
        0 if shape is None else len(shape),
        header.codec,
        header.epoch,
        header.key,
        header.sequence,
        header.layout,
        header.payload_nbytes,
        header.numel,
        header.groups,
        header.rows,
        header.channels,
        header.next_groups,
        header.next_channels,
        0,
        header.digest,
    ]
    block = b"" if shape is None else _SHAPE_STRUCT.pack(*shape, *([0] * (MAX_DIMS - len(shape))))
    fields[-2] = zlib.crc32(block, zlib.crc32(_STRUCT.pack(*fields)))
    return _STRUCT.pack(*fields) + block


class HeadTemplate:
    """The bytes before the payload that all frames of one kind on a stream share; only epoch and sequence differ.

    Args:
        header: of any frame of that kind; its epoch and sequence are ignored.
    """

    __slots__ = ("_raw", "header")

    def __init__(self, header: Header) -> None:
        self.header = header
        self._raw = header_bytes(header)

    def filled(self, epoch: int, sequence: int) -> bytes:
        """The bytes before the payload of one frame."""
        raw = bytearray(self._raw)
        _WORD.pack_into(raw, _EPOCH_OFFSET, epoch)
        _WORD.pack_into(raw, _SEQUENCE_OFFSET, sequence)
        _WORD.pack_into(raw, _CRC_OFFSET, 0)
        _WORD.pack_into(raw, _CRC_OFFSET, zlib.crc32(raw))
        return bytes(raw)


def write_head(frame: Tensor, head: bytes) -> Tensor:
    """Write the bytes before the payload into a frame, and return the frame."""
    if frame.is_cpu:
        ctypes.memmove(frame.data_ptr(), head, len(head))
    else:
        frame[: len(head)].copy_(torch.frombuffer(bytearray(head), dtype=torch.uint8))
    return frame


def starts_with(frame: Tensor, head: bytes) -> bool:
    """Whether a frame, contiguous and at least as long, begins with these bytes."""
    if frame.is_cpu:
        return bool((ctypes.c_char * len(head)).from_address(frame.data_ptr()).raw == head)
    return frame[: len(head)].cpu().numpy().tobytes() == head


def pack(header: Header, payload: Tensor | None, frame_nbytes: int | None = None) -> Tensor:
    """Put header and payload into one frame.

    Args:
        header: its ``payload_nbytes`` must be the payload's length.
        payload: 1-D uint8, or ``None`` for a frame whose payload is all zeros.
        frame_nbytes: total length; the frame is padded with zeros up to it. ``None``: no padding.

    Returns:
        1-D uint8 tensor on the payload's device (CPU without a payload).

    Raises:
        ConfigError: the shape has more than eight dimensions or the dtype has no code.
    """
    device = torch.device("cpu") if payload is None else payload.device
    frame, room = empty_frame(header.nbytes, header.payload_nbytes, frame_nbytes, device)
    if payload is None:
        room.zero_()
    else:
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
    frame = torch.empty(end if frame_nbytes is None else frame_nbytes, dtype=torch.uint8, device=device)
    frame[end:].zero_()
    return frame, frame[head_nbytes:end]


def seal(frame: Tensor, header: Header) -> Tensor:
    """Write the header into a frame, and return the frame."""
    return write_head(frame, header_bytes(header))


def unpack(frame: Tensor, where: str) -> Header:
    """Read and check a frame's header.

    Args:
        frame: 1-D uint8.
        where: the call site, for the error message.

    Raises:
        FrameError: too short, not a frame, another version, a damaged header, or a payload that does not fit.
    """
    if frame.dtype != torch.uint8 or frame.dim() != 1:
        raise FrameError(f"{where}: a frame is a 1-D uint8 tensor, got {frame.dtype} of shape {tuple(frame.shape)}")
    if frame.numel() < HEADER_NBYTES:
        raise FrameError(f"{where}: {frame.numel()} bytes are too few for a frame ({HEADER_NBYTES}-byte header)")
    raw = bytes(frame[: min(HEADER_NBYTES + SHAPE_NBYTES, frame.numel())].cpu().numpy())
    fields = _STRUCT.unpack_from(raw)
    magic, version, flags, dtype, ndim = fields[:5]
    if magic != MAGIC:
        raise FrameError(
            f"{where}: what arrived is not a compactdist frame (it starts with {magic!r}); the peer probably sent it "
            "uncompressed. Use the same wrapped group and policy on both ends"
        )
    if version != VERSION:
        raise FrameError(f"{where}: the peer speaks frame version {version}, this is {VERSION}: install one version")
    has_shape = bool(flags & SHAPE)
    block = raw[HEADER_NBYTES:] if has_shape else b""
    head = bytearray(raw[:HEADER_NBYTES])
    head[_CRC_OFFSET : _CRC_OFFSET + 4] = bytes(4)
    intact = zlib.crc32(block, zlib.crc32(bytes(head))) == fields[17]
    if not intact or dtype >= len(DTYPES) or ndim > MAX_DIMS or (has_shape and len(block) < SHAPE_NBYTES):
        raise FrameError(f"{where}: the frame's header is damaged (its checksum does not match); nothing was applied")
    if flags & ~_KNOWN_FLAGS:
        raise FrameError(
            f"{where}: the frame has flags {flags & ~_KNOWN_FLAGS:#04x} that this version does not know; nothing was "
            "applied. Install one version on all ranks"
        )
    header = Header(
        flags=flags & ~SHAPE,
        dtype=DTYPES[dtype],
        codec=fields[5],
        epoch=fields[6],
        key=fields[7],
        sequence=fields[8],
        layout=fields[9],
        payload_nbytes=fields[10],
        numel=fields[11],
        groups=fields[12],
        rows=fields[13],
        channels=fields[14],
        next_groups=fields[15],
        next_channels=fields[16],
        digest=fields[18],
    )
    if has_shape:
        header = replace(header, shape=tuple(_SHAPE_STRUCT.unpack(block)[:ndim]))
    if header.nbytes + header.payload_nbytes > frame.numel():
        raise FrameError(
            f"{where}: the frame is cut short: {frame.numel()} bytes for a payload of {header.payload_nbytes} bytes"
        )
    return header


def key_hash(key: str) -> int:
    """64-bit hash of a site key, the same in every process."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


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
