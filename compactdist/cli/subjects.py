"""What ``compactdist bench codecs`` times: the library's codecs, and alternatives outside the library."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from compactdist import kernels
from compactdist.codecs import Codec
from compactdist.codecs.shapes import whole_view
from compactdist.wire import HEADER_NBYTES

__all__ = ["Subject", "of_codecs", "peers"]

_SCALE_NBYTES = 4


@dataclass
class Subject:
    """One row of the table.

    Attributes:
        name: shown to the user.
        encode: makes a message of a tensor.
        decode: makes a tensor of the message and the original tensor (of which it uses shape and dtype only).
        wire_nbytes: bytes of the message, with everything that the receiver needs.
        touched: bytes that encoding and decoding read and write beside the message, as multiples of the tensor's.
        around: context for every use of ``encode`` and ``decode``.
        missing: why the subject cannot run here; ``None`` if it can.
    """

    name: str
    encode: Callable[[Tensor], Any]
    decode: Callable[[Any, Tensor], Tensor]
    wire_nbytes: Callable[[Any], int]
    touched: tuple[int, int] = (1, 1)
    around: Callable[[], AbstractContextManager[None]] = nullcontext
    missing: str | None = None


def _nothing(*_: Any) -> Any:
    raise RuntimeError("this row cannot run here")


def _missing(name: str, why: str) -> Subject:
    return Subject(name, _nothing, _nothing, _nothing, missing=why)


class _Stream:
    """A step of a stream, at both ends, each in memory of its own; what is known of the tensor are zeros."""

    def __init__(self, codec: Codec) -> None:
        self._codec = codec
        self._of: Tensor | None = None

    def encode(self, x: Tensor) -> Tensor:
        """Make payload and new base of tensor and base."""
        if self._of is not x:
            self._of, self._view = x, whole_view(x.shape, in_blocks=False)
            self._base, self._new = torch.zeros_like(x).view(-1), torch.empty_like(x).view(-1)
            self._held = torch.zeros_like(self._base)
            self._session = self._codec.open(self._view, x.dtype, x.device)
            self._payload = torch.empty(self._session.payload_nbytes, dtype=torch.uint8, device="cpu")
            self._session.encode(x.view(-1), (self._base,), self._new, self._payload)
            self._session.commit()  # a codec with a memory is timed once it has one
            self._session.prepare()
        self._session.encode(x.view(-1), (self._base,), self._new, self._payload)
        self._session.rollback()
        return self._payload

    def decode(self, payload: Tensor, like: Tensor) -> Tensor:
        """Make the new base of payload and base, in place."""
        self._session.decode(payload, (self._held,), self._held)
        return self._held.view(like.shape)


def _of_codec(name: str, codec: Codec, around: Callable[[], AbstractContextManager[None]]) -> Subject:
    if codec.lossless:  # a stream sends the tensor itself
        return Subject(
            name,
            codec.encode,
            lambda payload, like: codec.decode(payload, like.shape, like.dtype),
            lambda payload: HEADER_NBYTES + payload.numel(),
            around=around,
        )
    stream = _Stream(codec)
    return Subject(
        name,
        stream.encode,
        stream.decode,
        lambda payload: HEADER_NBYTES + payload.numel(),
        (3, 2),
        around,
    )


@contextmanager
def _reference_kernels() -> Iterator[None]:
    """Run codecs on torch's own operations inside, even where the library has faster kernels."""
    with kernels.use("reference"):
        yield


def of_codecs(codecs: Mapping[str, Codec]) -> list[Subject]:
    """One step of a stream for each codec, as the library runs it; the header of a frame is counted."""
    return [_of_codec(name, codec, nullcontext) for name, codec in codecs.items()]


def peers(codecs: Mapping[str, Codec]) -> list[Subject]:
    """The lossy ``codecs`` in eager torch (headers counted), and torch's quantization, numpy's bits and zstandard."""
    eager = [
        _of_codec(f"{name}, eager torch", codec, _reference_kernels)
        for name, codec in codecs.items()
        if not codec.lossless
    ]
    return [*eager, _torch_quantization(), _numpy_signs(), _zstandard()]


@contextmanager
def _without_deprecation() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _torch_quantization() -> Subject:
    """Eight bits with one scale: quantize_per_tensor, or where torch has dropped it the decomposed operator."""
    quantize = getattr(torch, "quantize_per_tensor", None)
    if quantize is not None:

        def encode(x: Tensor) -> Tensor:
            wide = x.float()
            return cast("Tensor", quantize(wide, float(wide.abs().amax()) / 127 or 1.0, 0, torch.qint8))

        return Subject(
            "torch.quantize_per_tensor",
            encode,
            lambda q, like: q.dequantize().to(like.dtype),
            lambda q: q.numel() + _SCALE_NBYTES,
            around=_without_deprecation,
        )
    name = "quantized_decomposed"
    try:
        importlib.import_module("torch.ao.quantization.fx._decomposed")
        operators = torch.ops.quantized_decomposed
        forward, backward = operators.quantize_per_tensor.default, operators.dequantize_per_tensor.default
    except (ImportError, AttributeError):
        return _missing(name, "not in this torch")

    def encode_decomposed(x: Tensor) -> tuple[Tensor, float]:
        wide = x.float()
        scale = float(wide.abs().amax()) / 127 or 1.0
        return forward(wide, scale, 0, -127, 127, torch.int8), scale

    return Subject(
        name,
        encode_decomposed,
        lambda q, like: backward(q[0], q[1], 0, -127, 127, torch.int8).to(like.dtype),
        lambda q: q[0].numel() + _SCALE_NBYTES,
        around=_without_deprecation,
    )


def _numpy_signs() -> Subject:
    """One bit with one scale, the mean magnitude."""

    def encode(x: Tensor) -> tuple[Any, float]:
        values = x.float().numpy().reshape(-1)
        return np.packbits(values >= 0), float(np.abs(values).mean())

    def decode(sent: tuple[Any, float], like: Tensor) -> Tensor:
        bits = np.unpackbits(sent[0], count=like.numel())
        values = bits.astype(np.float32) * np.float32(2 * sent[1]) - np.float32(sent[1])
        return torch.from_numpy(values).to(like.dtype).view(like.shape)

    return Subject("numpy sign + packbits", encode, decode, lambda sent: int(sent[0].nbytes) + _SCALE_NBYTES)


def _zstandard() -> Subject:
    """A general lossless compressor at its fastest regular level."""
    name = "zstandard, level 1"
    if importlib.util.find_spec("zstandard") is None:
        return _missing(name, "not installed")
    zstandard: Any = importlib.import_module("zstandard")
    packer, unpacker = zstandard.ZstdCompressor(level=1), zstandard.ZstdDecompressor()

    def encode(x: Tensor) -> Any:
        return packer.compress(x.reshape(-1).view(torch.uint8).numpy())

    def decode(sent: Any, like: Tensor) -> Tensor:
        flat = torch.frombuffer(bytearray(unpacker.decompress(sent)), dtype=torch.uint8)
        return flat.view(like.dtype).view(like.shape)

    return Subject(name, encode, decode, len)
