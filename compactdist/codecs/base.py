"""The codec contract: a pure function pair between a tensor and a flat run of bytes, and sessions for streams of them.

A codec is a value. Everything that the two ends must agree on is its ``codec_id`` and its configuration: equal ids
with equal configurations can decode each other's payloads, in this version of the library and in every later one. What
one end of a stream remembers lies in a :class:`Session`, which ``Codec.open`` makes.

Four promises hold for every codec, and the shared test kit checks each of them:

* ``payload_nbytes`` depends on shape and dtype only, so both ends know the size before a byte moves;
* ``decode`` gives the same bits on every machine: it uses nothing but elementwise operations in a fixed order;
* the error energy of one round trip never exceeds the input energy, so a residual loop cannot diverge;
* ``encode`` refuses NaN and infinity (unless the codec is lossless), so that they never reach the history.
"""

from __future__ import annotations

import functools
import inspect
import json
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from compactdist.errors import CodecConfigError, PayloadError
from compactdist.kernels import DeviceSteps, restored
from compactdist.kernels.spec import MatrixView, MovingTerm

if TYPE_CHECKING:
    from typing_extensions import Self

P = ParamSpec("P")
T = TypeVar("T")


def undisturbed(function: Callable[P, T]) -> Callable[P, T]:
    """Let a function compute without gradients and in the dtypes it asks for, whatever its caller has switched on.

    Models run under autocast, which would do a codec's products in bfloat16.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        with torch.no_grad(), torch._C._DisableAutocast():
            return function(*args, **kwargs)

    return call


class About(NamedTuple):
    """What the page of codecs says of one codec (``tools/codecs_page.py``).

    Attributes:
        sends: what travels.
        use: when to choose the codec.
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
    """``encode`` and its sessions' ``encode`` take ``row_weights``, float ``(R,)`` or ``(G, R)``."""

    needs_shared_history: ClassVar[bool] = False
    """Sessions learn from the prediction and from what was decoded, which must be the same at both ends: streams
    without error feedback, whose sender predicts from values of its own, cannot use this codec."""

    rates: int = 0
    """Rates that a stream can change between, numbered from 1; 0: the codec has just one."""

    start_rate: int = 0
    """The rate before any is announced; 0 where there is just one."""

    @property
    def velocity_share(self) -> float:
        """Of the velocity that leaves the smallest residual, how much suits the codec best (order "auto"), in (0, 1].

        Less than all of it where the codec lives on the residual's structure: a velocity takes structure away, and adds
        noise of the last two frames.
        """
        return 1.0

    @abstractmethod
    def payload_nbytes(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        """Return the exact payload size in bytes for a tensor of this shape and dtype.

        Raises:
            CodecConfigError: The codec does not take this dtype.
        """

    @abstractmethod
    def encode(self, x: Tensor) -> Tensor:
        """Encode a tensor of any shape and strides.

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

    def at(self, rate: int) -> Codec:
        """The codec whose payloads have the size of that rate; this one, where there is just one rate."""
        return self

    def open(self, view: MatrixView, dtype: torch.dtype, device: torch.device) -> Session:
        """Open one end of one directed stream of tensors.

        Args:
            view: matrix view of the stream's flat tensors.
            dtype: of the tensors.
            device: of the tensors.

        Raises:
            CodecConfigError: The codec does not take this dtype.
        """
        return Session(self, view, dtype, device)

    def memory_nbytes(self, view: MatrixView) -> int:
        """Return the bytes of what each end of a stream learns; 0 where that is a few hundredths of the history."""
        return 0

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


Terms = tuple[Tensor, ...]
"""A prediction, as flat tensors to be added up in float32: ``()``, ``(base,)`` or ``(base, velocity)``."""


class Session:
    """One end of one directed stream under a codec: what does not change between two steps, and the codec's memory.

    Both ends use the same class. This base class suits every codec without memory; a codec with fused steps or a memory
    returns a class of its own from ``Codec.open``.

    ``encode`` changes nothing that a later ``encode`` or ``decode`` can see until ``commit`` is called; ``rollback``
    forgets what the last ``encode`` would have changed.

    Attributes:
        codec, view, dtype, device: as given to ``Codec.open``.
        payload_nbytes: bytes of every payload of this stream, at the rate in use.
        checksum: of the payload that the last ``encode`` wrote, if it was summed up on the way, else ``None``.
    """

    __slots__ = ("checksum", "codec", "device", "dtype", "payload_nbytes", "view")

    remembers: ClassVar[bool] = False
    """Whether ``commit`` and ``rollback`` do anything; if not, callers may leave these calls out."""

    takes_velocity: bool = False
    """Whether the second of two terms may be a ``kernels.spec.Velocity``, and ``out`` its ``previous``.

    Where a session also :attr:`takes_rounded`, all tensors of two terms may be in eight bits.
    """

    prepares: ClassVar[bool] = False
    """Whether ``prepare`` does anything; if not, callers may leave it out."""

    def __init__(self, codec: Codec, view: MatrixView, dtype: torch.dtype, device: torch.device) -> None:
        self.codec = codec
        self.view = view
        self.dtype = dtype
        self.device = device
        self.payload_nbytes = codec.payload_nbytes(view.shape, torch.float32)
        self.checksum: int | None = None

    @property
    def takes_rounded(self) -> bool:
        """Whether ``terms`` may be one tensor in eight bits (``kernels.spec.Rounded``), which then stands alone."""
        return False

    @undisturbed
    def encode(
        self, x: Tensor, terms: Terms, out: Tensor | None, payload: Tensor, *, row_weights: Tensor | None = None
    ) -> None:
        """Encode ``x`` less the sum of ``terms``, in float32, as the matrix that ``view`` says.

        Args:
            x: flat, ``view.numel`` elements of ``dtype``.
            terms: terms of the prediction, each flat, finite, of ``dtype``.
            out: flat, contiguous, of ``dtype``, none of the terms; receives what :meth:`decode` will write. ``None``:
                the reconstruction is not needed.
            payload: contiguous uint8, ``payload_nbytes`` long, aligned to 16 bytes; receives the payload.
            row_weights: how much errors in each row matter, float ``(R,)`` or ``(G, R)``; for codecs that take them.

        Raises:
            NonFiniteError: The difference is not finite; the contents of ``out`` and ``payload`` are then undefined,
                the terms unchanged.
            CodecConfigError: This codec takes no row weights.
        """
        if row_weights is not None:
            raise CodecConfigError(f"codec {self.codec.codec_id!r} has no use for row_weights")
        payload.copy_(self.codec.encode(self.view.to_matrix(residual_of(x, terms))))
        if out is not None:
            self.decode(payload, terms, out)

    def encode_twice(self, x: Tensor, terms: Terms, out: Tensor, copy: Tensor, payload: Tensor) -> None:
        """As ``encode``, and write what ``out`` receives to ``copy`` too; in one pass where a codec's kernels can.

        Args:
            x: flat, ``view.numel`` elements of ``dtype``.
            terms: terms of the prediction, as for ``encode``.
            out: as for ``encode``.
            copy: contiguous, as many elements as ``out``, of ``dtype``; shares no memory with the other tensors.
            payload: as for ``encode``.

        Raises:
            NonFiniteError: As for ``encode``; the contents of ``copy`` are undefined, too.
        """
        self.encode(x, terms, out, payload)
        copy.copy_(out.view(copy.shape))

    @undisturbed
    def decode(self, payload: Tensor, terms: Terms, out: Tensor) -> None:
        """Write the sum of ``terms`` plus the decoded payload, kept finite and rounded once, to ``out``.

        Args:
            payload: what ``encode`` wrote at the other end.
            terms: terms of the prediction, as for ``encode``.
            out: flat, contiguous, of ``dtype``; may be the first of the terms, or the ``previous`` of a velocity.

        Raises:
            PayloadError: The payload is not uint8 of the expected length.
        """
        add_up(terms, self.view.to_flat(self.codec.decode(payload, self.view.shape, torch.float32)), out)

    def decode_twice(self, payload: Tensor, terms: Terms, out: Tensor, copy: Tensor) -> None:
        """As ``decode``, and write the same values to ``copy``; in one pass where a codec's kernels can.

        Args:
            payload: what ``encode`` wrote at the other end.
            terms: terms of the prediction, as for ``encode``.
            out: flat, contiguous, of ``dtype``; may be the first of the terms.
            copy: contiguous, as many elements as ``out``, of ``dtype``; shares no memory with the other tensors.

        Raises:
            PayloadError: The payload is not uint8 of the expected length.
        """
        self.decode(payload, terms, out)
        copy.copy_(out.view(copy.shape))

    def set_rate(self, rate: int) -> None:
        """Code the frames from the next on at another rate of the codec; ``payload_nbytes`` follows.

        Raises:
            CodecConfigError: The codec has just one rate.
        """
        raise CodecConfigError(f"codec {self.codec.codec_id!r} has just one rate, and {rate} was asked for")

    @property
    def device_steps(self) -> DeviceSteps | None:
        """Steps on a device that the host does not wait for; ``None`` where :meth:`encode` has to look at values."""
        return None

    def commit(self) -> None:
        """Keep the changes of the last ``encode``, whose frame is on its way, or of the last ``decode``."""

    def rollback(self) -> None:
        """Forget the changes of the last ``encode``, whose frame will not be sent."""

    def learn(self, payload: Tensor, terms: Terms) -> None:
        """Change the memory as :meth:`decode` does, for a payload of another stream that goes on in this one.

        Nothing is decoded; :meth:`commit` follows.
        """

    def forget(self) -> None:
        """Forget what decoding depends on: a keyframe was sent, or arrived."""

    @property
    def shared_memory(self) -> tuple[Tensor, ...]:
        """What decoding depends on beside payload and terms; equal on both ends of a stream. Not to be written to."""
        return ()

    def move(self, to: Callable[[Tensor], Tensor]) -> None:
        """Keep what ``to`` makes of each tensor that ``held_bytes`` counts: the same bytes, on another device.

        Called between two frames, several times in a row, and each time ``to`` gets the tensors in the same order: to
        take the memory of a site that is not in use to the host, and to bring it back (``state_offload``). A session
        that does not override it keeps its memory where it is.
        """

    def copy_memory(self) -> Any:
        """What this session remembers, copied, so that :meth:`take_memory` of others may have it. ``None``: nothing.

        Called between two frames. A session that remembers anything overrides both.

        Raises:
            CodecConfigError: It does not, so that no snapshot of a group with such a stream can be made.
        """
        if self.remembers:
            raise CodecConfigError(
                f"codec {self.codec.codec_id!r}: {type(self).__name__} remembers something and has no copy_memory() "
                "and take_memory(), which a snapshot needs"
            )
        return None

    def take_memory(self, memory: Any) -> None:
        """Remember what :meth:`copy_memory` of another session gave, which had the same codec, view, dtype and rate.

        The session is new, but for its rate. ``memory`` stays as it is: it may be taken again.
        """

    def prepare(self) -> None:
        """Do work that the next frame needs, once it is known: after a commit, where a message is waited for.

        Whoever has the session may leave this out, or do it in another thread while the next frame arrives. The session
        does the work itself when it codes the next frame, so no payload and no value may depend on this call. On a GPU
        it is called on the stream of the frame that was committed.
        """

    @property
    def held_bytes(self) -> int:
        """Bytes of tensors that this session keeps between two steps; the predictor's are not among them."""
        return 0


def tensors_in(move: Callable[[Callable[[Tensor], Tensor]], None]) -> list[Tensor]:
    """The tensors that a ``move`` as :meth:`Session.move` goes through, in its order; all stay where they are."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    move(note)
    return found


def residual_of(x: Tensor, terms: tuple[MovingTerm, ...]) -> Tensor:
    """``x`` less the sum of ``terms`` in float32; it may be ``x`` itself if there are no terms."""
    return x.float() - sum_of(terms) if terms else x.float()


def sum_of(terms: tuple[MovingTerm, ...]) -> Tensor:
    """The sum of one or two terms in float32."""
    first = restored(terms[0]).float()
    return first if len(terms) == 1 else first + restored(terms[1]).float()


def add_up(terms: Terms, decoded: Tensor, out: Tensor) -> None:
    """Write the sum of ``terms`` plus ``decoded``, flat float32, both kept finite and rounded once, to ``out``."""
    largest = torch.finfo(torch.float32).max
    total = decoded.clamp(-largest, largest) + (sum_of(terms) if terms else 0.0)  # without terms -0 becomes 0
    limit = min(torch.finfo(out.dtype).max, largest)
    with torch.inference_mode():  # ``out`` may be an inference tensor, which can be written to in this mode only
        out.copy_(total.clamp(-limit, limit))


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
