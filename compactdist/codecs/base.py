"""The codec contract: a pure function pair between a tensor and a flat run of bytes.

A codec holds no state. Everything that the two ends must agree on is its ``codec_id`` and its configuration:
equal ids with equal configurations can decode each other's payloads, in this version of the library and in
every later one.

Four promises hold for every codec, and the shared test kit checks each of them:

* ``payload_nbytes`` depends on shape and dtype only, so both ends know the size before a byte moves;
* ``decode`` gives the same bits on every machine: it uses elementwise operations in a fixed order, nothing
  else;
* the error energy of one round trip never exceeds the input energy, so a residual loop cannot diverge;
* ``encode`` refuses NaN and infinity (unless the codec is lossless) instead of spreading them into the base.
"""

from __future__ import annotations

import inspect
import json
import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from compactdist.errors import CodecConfigError, PayloadError
from compactdist.kernels.spec import MatrixView

if TYPE_CHECKING:
    from typing_extensions import Self


class About(NamedTuple):
    """What the page of codecs says of one (``tools/codecs_page.py``).

    Attributes:
        sends: what travels.
        use: when to choose it.
        source: where method and formulas come from.
    """

    sends: str
    use: str
    source: str


class Codec(ABC):
    """Base class of all codecs.

    Subclasses set ``codec_id``, implement the three abstract methods, and, if they take options, accept them
    as keyword arguments of ``__init__`` and report them in ``get_config``.
    """

    codec_id: ClassVar[str]
    lossless: ClassVar[bool] = False
    about: ClassVar[About | None] = None
    takes_row_weights: ClassVar[bool] = False
    """``encode`` and ``encode_residual`` take ``row_weights``, float ``(R,)`` or ``(G, R)``."""

    @abstractmethod
    def payload_nbytes(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        """Return the exact payload size in bytes for a tensor of this shape and dtype.

        Raises:
            CodecConfigError: The codec does not take this dtype.
        """

    @abstractmethod
    def encode(self, x: Tensor) -> Tensor:
        """Encode a tensor of any shape, strided as it likes.

        Returns:
            Contiguous uint8 tensor ``(payload_nbytes(x.shape, x.dtype),)`` on the device of ``x``.

        Raises:
            CodecConfigError: The codec does not take the dtype of ``x``.
            NonFiniteError: A lossy codec was given NaN or infinity.
        """

    @abstractmethod
    def decode(self, payload: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Decode a payload into a new contiguous tensor of the given shape and dtype.

        Raises:
            CodecConfigError: The codec does not take this dtype.
            PayloadError: The payload is not a flat uint8 tensor of exactly the expected length.
        """

    def encode_residual(
        self,
        x: Tensor,
        base: Tensor | None,
        view: MatrixView,
        out: Tensor | None = None,
        *,
        velocity: Tensor | None = None,
        payload_out: Tensor | None = None,
        memory: dict[str, Any] | None = None,
    ) -> Tensor:
        """Encode ``x - (base + velocity)``, in float32, as the matrix that ``view`` says.

        Args:
            x: flat, ``view.numel`` elements.
            base: what both ends expect, flat, finite, the dtype of ``x``; ``None`` for no expectation.
            view: how the flat buffer becomes a matrix.
            out: flat, contiguous, the dtype of ``x``; gets what :meth:`decode_residual` will give. May be ``base``.
            velocity: added to ``base``, of the same form; ``None`` for none.
            payload_out: uint8, as long as the payload, where the payload is written; new memory unless given.
            memory: what the encoder wants to know again at the stream's next call; empty at first. It is opaque,
                belongs to one directed stream, codec and view, and lives on the sending side only: what it holds may
                change which payload is chosen, never how one is decoded. A codec replaces entries and does not write
                to tensors it finds there, for the caller may go back to an earlier copy of the dict; most codecs
                leave it empty. ``None``: this call stands alone.

        Returns:
            The payload, as ``encode`` of that matrix would return it.

        Raises:
            NonFiniteError: The difference is not finite; ``out`` and ``payload_out`` hold anything, but ``base`` is as
                it was.
        """
        payload = self.encode(view.to_matrix(residual_of(x, base, velocity)))
        if out is not None:
            self.decode_residual(payload, base, view, out, velocity=velocity)
        return payload if payload_out is None else payload_out.copy_(payload)

    def decode_residual(
        self, payload: Tensor, base: Tensor | None, view: MatrixView, out: Tensor, *, velocity: Tensor | None = None
    ) -> None:
        """Write what was expected plus the decoded payload, kept finite and rounded once, to ``out``.

        Args:
            payload: what ``encode_residual`` returned.
            base: what both ends expect, flat, the dtype of ``out``; ``None`` for no expectation.
            view: how the flat buffer becomes a matrix.
            out: flat, contiguous; may be ``base``.
            velocity: added to ``base`` in float32; ``None`` for none.
        """
        decoded = view.to_flat(self.decode(payload, view.shape, torch.float32))
        total = decoded + (0.0 if base is None else _sum(base, velocity))  # without a base, no -0 either
        limit = torch.finfo(out.dtype).max
        with torch.inference_mode():  # lets an inference tensor be written to, wherever this is called
            out.copy_(total.clamp(-limit, limit))

    def get_config(self) -> dict[str, Any]:
        """Return the options of this codec as a JSON-able dict, without the id."""
        return {}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Build a codec from what ``get_config`` returned.

        Raises:
            CodecConfigError: An option is unknown to this codec.
        """
        known = sorted(inspect.signature(cls).parameters)
        unknown = sorted(set(config) - set(known))
        if unknown:
            raise CodecConfigError(
                f"codec {cls.codec_id!r} has no option {', '.join(map(repr, unknown))}; "
                f"it takes {', '.join(map(repr, known)) if known else 'no options'}"
            )
        return cls(**config)

    def fingerprint(self) -> int:
        """Return a 32-bit checksum of id and configuration, the same in every process."""
        described = {**self.get_config(), "id": self.codec_id}
        return zlib.crc32(json.dumps(described, sort_keys=True, separators=(",", ":")).encode())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Codec):
            return NotImplemented
        return self.codec_id == other.codec_id and self.get_config() == other.get_config()

    def __hash__(self) -> int:
        return self.fingerprint()

    def __repr__(self) -> str:
        options = ", ".join(f"{key}={value!r}" for key, value in sorted(self.get_config().items()))
        return f"{type(self).__name__}({options})"


def residual_of(x: Tensor, base: Tensor | None, velocity: Tensor | None) -> Tensor:
    """``x - (base + velocity)`` in float32; it may be ``x`` itself if there is no base."""
    return x.float() if base is None else x.float() - _sum(base, velocity)


def _sum(base: Tensor, velocity: Tensor | None) -> Tensor:
    return base.float() if velocity is None else base.float() + velocity.float()


def check_payload(payload: Tensor, expected_nbytes: int, codec_id: str) -> Tensor:
    """Return ``payload`` as a contiguous tensor once its form is known to be right.

    Raises:
        PayloadError: It is not a one-dimensional uint8 tensor of ``expected_nbytes`` elements.
    """
    expected = f"codec {codec_id!r} expected a uint8 payload of shape ({expected_nbytes},)"
    if not isinstance(payload, Tensor):
        raise PayloadError(f"{expected}, got {type(payload).__name__}")
    if payload.dtype != torch.uint8 or payload.dim() != 1 or payload.numel() != expected_nbytes:
        raise PayloadError(f"{expected}, got {payload.dtype} of shape {tuple(payload.shape)}")
    return payload.contiguous()
