"""What a kernel is told: how a flat buffer is a matrix, and what a scalar quantizer makes of a matrix.

A codec describes itself by a :class:`QuantizerSpec`. Kernels know nothing else of it, so any class that does so gets
all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from compactdist.kernels.sections import Sections

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "BOARD_WORDS",
    "CHECKSUM_WEIGHT",
    "CLOCK_WORDS",
    "DIGEST_FACTOR",
    "ENDED",
    "ENDED_CLOCK",
    "FLOAT8",
    "FROM_CLOCK",
    "FROM_HOST",
    "HEAD_WORDS",
    "KINDS",
    "LARGEST_LEVEL",
    "NOT_FINITE",
    "REFUSED",
    "ROUNDED",
    "ROUNDED_BLOCK",
    "SCALE_FORMS",
    "STEP_WORD",
    "TURN_WORD",
    "Allotment",
    "ComponentSpec",
    "EightBits",
    "FactorSpec",
    "Float8",
    "HeadPlaces",
    "MatrixView",
    "MovingTerm",
    "QuantizerSpec",
    "Rounded",
    "RoundedForm",
    "ScaleForm",
    "Term",
    "Velocity",
]

CHECKSUM_WEIGHT = 0x9E3779B1
"""Odd. In a checksum, word ``n`` of 32 bits counts ``(2 * n + 1) * CHECKSUM_WEIGHT`` modulo 2**32 times."""

DIGEST_FACTOR = 0x9E3779B97F4A7C15
"""Odd. A frame with checksum ``c`` makes ``((digest ^ c) * DIGEST_FACTOR + 1) % 2**64`` of a digest: both steps can be
undone, so digests that differ once differ for good."""


HEAD_WORDS = 32
"""32-bit words of a header."""

CLOCK_WORDS, STEP_WORD, TURN_WORD = 4, 2, 3
"""The clock of one end of a stream is int64 on its device. Words 0 and 1 are digests: a frame is made against one of
them, its source, and writes the other. The other two say of the stream's next frame, each in its lower and its upper 32
bits: step and epoch (``STEP_WORD``); sequence number and source, 0 or 1 (``TURN_WORD``). Every kernel that seals or
checks a frame writes them, whatever it was told the frame is by."""

FROM_HOST, FROM_CLOCK = 2, 3
"""What a launch is told in place of a source: it is told the digest, too; or the clock says all of the frame."""

ENDED = 4
"""A clock's source while no frame can be made by it: a CUDA graph that was captured before must not go on."""

NOT_FINITE, REFUSED, ENDED_CLOCK = 1, 2, 3
"""Codes on a board: the sender's residual was not finite; a frame was not the expected one; a CUDA graph was replayed
whose clock has ended."""

BOARD_WORDS = 2 + 2 * HEAD_WORDS
"""A board is int32: a code, 0 for none; a stream's number; the header that arrived; the one that was expected."""


class HeadPlaces(NamedTuple):
    """Where in a header stands what differs from frame to frame, in 32-bit words.

    Attributes:
        FLAGS: The word that holds the flags.
        CALL: The first of three: step, epoch, sequence.
        SUMS: The first of four: the payload's checksum, the digest.
        TOTAL: The first of two: the header's checksum, which counts all words but these.
        NONFINITE: The flag of a residual that was not finite, in its word.
    """

    FLAGS: int
    CALL: int
    SUMS: int
    TOTAL: int
    NONFINITE: int


Kind = Literal["sign", "nearest", "trits", "linear", "e4m3", "e5m2"]
KINDS: tuple[Kind, ...] = ("sign", "nearest", "trits", "linear", "e4m3", "e5m2")
ScaleForm = Literal["token_channel", "token_history", "block"]
SCALE_FORMS: tuple[ScaleForm, ...] = ("token_channel", "token_history", "block")


class Float8(NamedTuple):
    """A format of the value ``1.mantissa * 2**(exponent - bias)``, and where its finite codes end."""

    mantissa_bits: int
    bias: int
    largest_code: int

    def level(self, code: int) -> float:
        """Value of a code without sign, in units of the smallest subnormal: an integer."""
        exponent, mantissa = divmod(min(code, self.largest_code), 1 << self.mantissa_bits)
        return float(mantissa if exponent == 0 else ((1 << self.mantissa_bits) + mantissa) << (exponent - 1))

    @property
    def units(self) -> float:
        """The largest value, in units of the smallest subnormal."""
        return self.level(self.largest_code)


FLOAT8 = {"e4m3": Float8(3, 7, 0x7E), "e5m2": Float8(2, 15, 0x7B)}
"""The OCP 8-bit formats."""


EightBits = Literal["int8", "fp8"]

ROUNDED_BLOCK = 128
"""Consecutive elements that share a scale: one outlier spoils the resolution of few neighbours, for 1/64 byte each."""


class RoundedForm(NamedTuple):
    """How a tensor is rounded to eight bits for each element.

    Attributes:
        codes: int8, whose level is the integer; or uint8, the bits of an E4M3 float8, whose level is its value in units
            of its smallest subnormal, 2**-9.
        largest: level that the largest magnitude of a block takes.
    """

    codes: torch.dtype
    largest: float


ROUNDED: dict[EightBits, RoundedForm] = {
    "int8": RoundedForm(torch.int8, 127.0),
    "fp8": RoundedForm(torch.uint8, FLOAT8["e4m3"].units),
}
LARGEST_LEVEL = {form.codes: form.largest for form in ROUNDED.values()}
"""By the dtype of codes."""


class _InPlaceOfATensor:
    """What callers ask of a term that is none, as of a tensor: it lies together, and has no gradient."""

    __slots__ = ()

    def is_contiguous(self) -> bool:
        """As of a tensor."""
        return True

    def contiguous(self) -> Self:
        """As of a tensor."""
        return self

    def detach(self) -> Self:
        """As of a tensor."""
        return self


@dataclass(frozen=True, slots=True)
class Rounded(_InPlaceOfATensor):
    """A flat tensor in eight bits for each element.

    Element i is ``level(codes[i]) * scales[i // 128]`` in float32, rounded once to ``dtype`` and kept finite.

    Attributes:
        codes: ``[numel]``, contiguous; see :class:`RoundedForm`.
        scales: bfloat16 ``[ceil(numel / 128)]``, >= 0, contiguous.
        dtype: of the tensor.
    """

    codes: Tensor
    scales: Tensor
    dtype: torch.dtype

    @property
    def device(self) -> torch.device:
        """Where codes and scales are."""
        return self.codes.device

    @property
    def is_cpu(self) -> bool:
        """As of a tensor."""
        return self.codes.is_cpu

    def numel(self) -> int:
        """As of a tensor."""
        return self.codes.numel()

    def data_ptr(self) -> int:
        """Of the codes."""
        return self.codes.data_ptr()


Term = Tensor | Rounded


@dataclass(frozen=True, slots=True, eq=False)
class Velocity(_InPlaceOfATensor):
    """What a tensor changed by since the one before it, times a coefficient: the second term of a prediction.

    ``coefficient * clamp(base - previous)`` in float32, rounded once to ``dtype``; ``clamp`` keeps a difference within
    what ``dtype`` holds. Where the coefficient is a tensor and 0, all is -0, which leaves a -0 that it is added to as
    it is.

    Attributes:
        base, previous: flat ``[numel]``, contiguous, finite, of one dtype; ``base`` is the first term. Both may be in
            eight bits.
        coefficient: in [-1, 1]. On a device also float32 ``[]``, where the host does not know it.
    """

    base: Term
    previous: Term
    coefficient: float | Tensor

    @property
    def dtype(self) -> torch.dtype:
        """As of a tensor."""
        return self.base.dtype

    @property
    def device(self) -> torch.device:
        """As of a tensor."""
        return self.base.device

    @property
    def is_cpu(self) -> bool:
        """As of a tensor."""
        return self.base.is_cpu

    def numel(self) -> int:
        """As of a tensor."""
        return self.base.numel()

    def data_ptr(self) -> int:
        """Where ``previous`` is."""
        return self.previous.data_ptr()


MovingTerm = Tensor | Rounded | Velocity
"""What is expected, or one of two terms whose sum is. One in eight bits stands alone, beside another such, or beside a
velocity between two such.
"""


@dataclass(frozen=True)
class QuantizerSpec:
    """How a scalar quantizer codes the elements of matrices.

    Attributes:
        kind: ``"sign"``: one bit, the sign. ``"nearest"``: the sign and the nearest of ``magnitudes``. ``"trits"``:
            zero or a sign, five elements to a byte. ``"linear"``: the nearest integer, in two's complement.
            ``"e4m3"``, ``"e5m2"``: the nearest float8.
        bits: of a code; trits have 2, which are not used.
        magnitudes: for ``"nearest"``: ``2 ** (bits - 1)`` levels in units of sigma, ascending. One of them may be 0.
        reach: for ``"linear"`` and float8: the level of the largest code, which the largest value takes.
        widening: for ``"nearest"``: how wide the scale is for tails heavier than those of a Gaussian; see
            ``reference.scales.gaussian_scale``.
        scales: ``"token_channel"``: a scale for each row and each channel. ``"token_history"``: one for each row, and
            for each channel one that both ends know from the frame before. ``"block"``: one for each run of elements.
        block: elements to a block, at most.
    """

    kind: Kind
    bits: int
    magnitudes: tuple[float, ...] = ()
    reach: float = 0.0
    widening: int = 1
    scales: ScaleForm = "token_channel"
    block: int = 128

    def __post_init__(self) -> None:
        levels = self.magnitudes
        if self.kind not in KINDS or self.scales not in SCALE_FORMS:
            raise ValueError(f"no kernels for kind={self.kind!r} with scales={self.scales!r}; kinds: {KINDS}")
        wanted = {"sign": (1,), "nearest": (2, 3, 4), "trits": (2,)}.get(self.kind, (8,))
        if self.bits not in wanted:
            raise ValueError(f"kind={self.kind!r} takes bits of {wanted}, got {self.bits}")
        if self.kind == "nearest" and (
            len(levels) != 1 << (self.bits - 1) or any(low >= high for low, high in pairwise((-1e-9, *levels)))
        ):
            raise ValueError(
                f"kind='nearest' of {self.bits} bits takes {1 << (self.bits - 1)} magnitudes, ascending from 0, got "
                f"{levels}"
            )
        if self.by_maximum and not self.reach > 0:
            raise ValueError(f"kind={self.kind!r} needs the level of the largest code, got reach={self.reach}")

    @property
    def by_maximum(self) -> bool:
        """Scales are such that the largest value takes the largest code, and no sum is needed."""
        return self.kind in ("linear", "e4m3", "e5m2")

    @property
    def roots(self) -> int:
        """For ``"nearest"``: square roots taken to widen the scale; none where zero is a level."""
        return self.widening if self.magnitudes and self.magnitudes[0] > 0 else 0

    def sections_of(self, shape: Sequence[int]) -> Sections:
        """The sections of the payload of a tensor of this shape."""
        if self.scales == "block":
            return Sections.of_blocks(shape, self.bits, self.block, base3=self.kind == "trits")
        if self.scales == "token_history":
            return Sections.of_history(shape, self.bits, base3=self.kind == "trits")
        return Sections.of(shape, self.bits, base3=self.kind == "trits")


class Allotment(NamedTuple):
    """Which components get bits, of all of all groups.

    Attributes:
        depths: bits of each, 0 to 8, int32 ``(G, K)``.
        planes: the first plane of each that has some, int32 ``(G, K)``.
    """

    depths: Tensor
    planes: Tensor


class ComponentSpec(NamedTuple):
    """What a kernel is told of a codec that turns blocks of channels onto components.

    Attributes:
        blocks, width: of a group, and channels of each, as many as it has components.
        planes: bits of all components together.
        nbytes: of a group's payload.
        energies_at, rows_at, planes_at: where in it codes of components begin, half bytes of rows, and planes of bits,
            one of ``ceil(rows / 8)`` bytes after another. Before them: the largest amplitude, float32, and gains of
            blocks, bfloat16.
        step: from one row that energies and correlations are taken from to the next.
        largest_weight: of a component's element, in whole numbers.
        largest_sum: of the magnitudes of weights of a channel, before they are rounded.
        stride: rows from one to the next of a course along the trellis; 0: levels are chosen without one.
    """

    blocks: int
    width: int
    planes: int
    nbytes: int
    energies_at: int
    rows_at: int
    planes_at: int
    step: int
    largest_weight: int
    largest_sum: int
    stride: int = 0


class ComponentTables(NamedTuple):
    """Numbers of such a codec, on a stream's device.

    Attributes:
        steps: borders and levels, as ``reference.components.Chosen.steps``; along the trellis, of all its levels.
        amplitudes: of each code of a component, float32 ``(256,)``, relative to the largest.
        unit_levels: what a level of 1 is of each depth, in amplitudes, float32 ``(D + 1,)``.
        worth: of the next bit of a component with 0, 1, ... bits, in codes, over the least, int32 ``(D,)``.
        row_scales: of each code of a row, float32 ``(16,)``, ascending.
        most: a claim to a bit is less than that.
        row_slope: steps of a row's code to a factor of two of squares.
        per_octave: steps of a component's code to a factor of two of amplitudes.
        moderate: magnitudes within powers of two of this size are coded as they are.
        smallest: amplitude that is not sent as 0.
        share: of the newest frame in what a basis follows.
        smallest_sweep: rows that a sweep turns at least.
        smallest_angle: squared correlation that it leaves alone.
    """

    steps: Tensor
    amplitudes: Tensor
    unit_levels: Tensor
    worth: Tensor
    row_scales: Tensor
    most: int
    row_slope: float
    per_octave: int
    moderate: int
    smallest: float
    share: float
    smallest_sweep: int
    smallest_angle: float


class FactorSpec(NamedTuple):
    """What a kernel is told of a codec that sends two thin factors of each matrix.

    Attributes:
        rank: components, at most.
        magnitudes: eight, of the levels of four bits, with a scale for each component; none: factors are bfloat16.
    """

    rank: int
    magnitudes: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class MatrixView:
    """A concrete way to see a flat buffer as a (groups, rows, channels) matrix.

    Attributes:
        numel: elements of the flat buffer.
        groups, rows, channels: the matrix; ``groups * rows * channels >= numel``, the tail is zero padding.
        axes: sizes of the flat buffer's own axes, when they must be permuted; else ``None``.
        order: the permutation of ``axes`` that brings group axes first, then row axes, then channel axes.
        hint: crc32 of the hint this came from; 0 without a hint.
    """

    numel: int
    groups: int
    rows: int
    channels: int
    axes: tuple[int, ...] | None = None
    order: tuple[int, ...] = ()
    hint: int = 0

    @property
    def shape(self) -> tuple[int, int, int]:
        """(groups, rows, channels)."""
        return self.groups, self.rows, self.channels

    def to_matrix(self, flat: Tensor) -> Tensor:
        """View or copy a flat ``[numel]`` tensor as ``(groups, rows, channels)``, contiguous."""
        if self.axes is not None:
            return flat.view(self.axes).permute(self.order).reshape(self.shape).contiguous()
        missing = self.groups * self.rows * self.channels - self.numel
        return (pad(flat, (0, missing)) if missing else flat).view(self.shape)

    def to_flat(self, matrix: Tensor) -> Tensor:
        """Undo :meth:`to_matrix`: ``(groups, rows, channels)`` to a flat, contiguous ``[numel]``."""
        if self.axes is not None:
            permuted = matrix.reshape([self.axes[i] for i in self.order])
            inverse = [self.order.index(i) for i in range(len(self.order))]
            return permuted.permute(inverse).reshape(-1)
        return matrix.reshape(-1)[: self.numel]
