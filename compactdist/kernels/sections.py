"""The wire format of the scalar quantizers.

A tensor is seen as float32 ``(G, R, C)``: groups, rows, channels (see ``matrix_shape``). Element ``(g,
n, j)`` decodes to ``level[code] * S`` with ``S = t[g, n] * c[g, j]``: two float32 multiplications, ``S``
first. The product is clamped to the largest finite value of the wanted dtype and rounded to nearest even.

The payload is three sections, each filled up with zeros to a multiple of 16 bytes:

1. **codes**, ``G * R * C`` of b bits, row-major, including the zeros that fill the tail of a flat tensor.
   Within a byte the first element takes the lowest bits.

   ======= === =============================================================================
   codec   b   code
   ======= === =============================================================================
   binary  1   1 for values >= 0, else 0; levels +1 and -1
   ternary 1.6 0, 1, 2 are the levels 0, +1, -1; five to a byte, the first counts 1, then 3, 9, 27, 81
   int2    2   ``sign << 1 | magnitude``, sign 1 is negative; two magnitudes
   int3    3   ``sign << 2 | magnitude``, sign 1 is negative; four magnitudes
   int4    4   ``sign << 3 | magnitude``, sign 1 is negative; eight magnitudes
   int8    8   two's complement, -127 to 127; the level is the integer
   fp8     8   the bits of a float8; the level is its value in units of the smallest subnormal
   ======= === =============================================================================

   A code of 3 bits may run over the end of a byte into the lowest bits of the next.

2. **row scales** ``t``, one byte for each of ``G * R`` rows, there if ``C >= 64`` and ``R > 1``; otherwise
   ``t = 1``. The byte is an unsigned minifloat with 5 exponent and 3 mantissa bits (UE5M3): 0 means exactly
   0, any other code k means ``(8 + k % 8) / 8 * 2 ** (k // 8 - 31)``. Rows are normalised by a power of
   two, so that a group's largest is at least 1/2 and less than 1.
3. **channel scales** ``c``, bfloat16, low byte first: ``G * C`` of them if ``R >= 64``, otherwise one for
   each group.

With the option ``scales="block"`` the N = R * C elements of each group are cut, in row-major order, into ``B =
ceil(N / block)`` blocks of equal length ``L = ceil(N / B)``, the last filled up with zeros, and coded as ``G * B``
groups of one row of L channels: no row scales, and one channel scale for each block. (A flat tensor is one row of
N.) With ``centroids="minmax"`` a fourth section of the same form as the third carries a signed bfloat16 **offset**
``a`` for each block; the code q, of b bits without a sign, decodes to ``a + q * c``, product first.

With ``scales="token_history"`` a tensor with R >= 64 and C >= 128 has room for row scales of two bytes, and channel
scales that come from the frame before: ``reference/history.py``. Any other is coded as with ``"token_channel"``.

With ``scales="rank"`` of ``binary`` the scales are others: ``rank_scales.py``.

A tensor without elements has an empty payload.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

SECTION_ALIGN_NBYTES = 16
"""Every payload section starts at a multiple of this, so kernels may load 128 bits at a time."""

BLOCK_ELEMENTS = 128
"""Row length given to a flat tensor, which has no channels of its own."""

MIN_CHANNELS_FOR_ROW_SCALES = 64
"""Below this a byte for each row would cost more than an eighth of a bit for each element."""

MIN_ROWS_FOR_CHANNEL_SCALES = 64
"""Below this two bytes for each channel would cost more than a quarter of a bit for each element."""

MIN_CHANNELS_FOR_WIDE_ROW_SCALES = 128
"""Below this two bytes for each row would cost more than an eighth of a bit for each element."""


def padded_nbytes(nbytes: int) -> int:
    """Round a size up to the section alignment."""
    return -(-nbytes // SECTION_ALIGN_NBYTES) * SECTION_ALIGN_NBYTES


def matrix_shape(shape: Sequence[int]) -> tuple[int, int, int]:
    """Return ``(groups, rows, channels)`` for a tensor of the given shape.

    ========================= ==========================================================================
    shape                     view
    ========================= ==========================================================================
    ``()``, ``(n,)``          one row if n <= 128, else rows of 128 (the caller pads the tail with zeros)
    ``(N, C)``                ``(1, N, C)``
    ``(G, N, C)``             ``(G, N, C)``: each group has scales of its own
    ``(B, S, ..., H, D)``     ``(1, B * S * ..., H * D)``: tokens by channels of all heads
    ========================= ==========================================================================

    Example:
        >>> matrix_shape((2, 1088, 24, 128))
        (1, 2176, 3072)
        >>> matrix_shape((300,))
        (1, 3, 128)
    """
    if len(shape) <= 1:
        elements = math.prod(shape)
        if elements <= BLOCK_ELEMENTS:
            return 1, 1, elements
        return 1, -(-elements // BLOCK_ELEMENTS), BLOCK_ELEMENTS
    if len(shape) == 2:
        return 1, shape[0], shape[1]
    if len(shape) == 3:
        return shape[0], shape[1], shape[2]
    return 1, math.prod(shape[:-2]), shape[-2] * shape[-1]


@dataclass(frozen=True)
class Sections:
    """Sizes and offsets, in bytes, of one payload.

    Attributes:
        groups: G, matrices with scales of their own.
        rows: R, in each group.
        channels: C, in each row.
        bits: b, for each code.
        base3: Codes are trits, five to a byte; ``bits`` is not used.
        offsets: Each block has an offset beside its scale.
        wide_rows: There is room for row scales of two bytes, and channel scales come from the frame before.
    """

    groups: int
    rows: int
    channels: int
    bits: int
    base3: bool = False
    offsets: bool = False
    wide_rows: bool = False

    @classmethod
    def of(cls, shape: Sequence[int], bits: int, *, base3: bool = False) -> Sections:
        """Return the sections of a tensor of this shape, with scales by row and channel."""
        return _of(tuple(shape), bits, base3)

    @classmethod
    def of_history(cls, shape: Sequence[int], bits: int, *, base3: bool = False) -> Sections:
        """As :meth:`of`, with wide row scales where the tensor is large enough for them."""
        return _of_history(tuple(shape), bits, base3)

    @classmethod
    def of_blocks(
        cls, shape: Sequence[int], bits: int, block: int, *, base3: bool = False, offsets: bool = False
    ) -> Sections:
        """Return the sections of a tensor of this shape, with one scale for every ``block`` elements."""
        return _of_blocks(tuple(shape), bits, block, base3, offsets)

    @cached_property
    def elements(self) -> int:
        """Coded elements, padding included."""
        return self.groups * self.rows * self.channels

    @cached_property
    def codes_nbytes(self) -> int:
        """Bytes that carry codes, before alignment."""
        if self.base3:
            return -(-self.elements // 5)
        return -(-self.elements * self.bits // 8)

    @cached_property
    def row_scale_count(self) -> int:
        """Row scales on the wire: G * R or none."""
        present = self.channels >= MIN_CHANNELS_FOR_ROW_SCALES and self.rows > 1
        return self.groups * self.rows if present else 0

    @cached_property
    def channel_scales_per_group(self) -> int:
        """Channel scales on the wire for each group: C or one."""
        return self.channels if self.rows >= MIN_ROWS_FOR_CHANNEL_SCALES else 1

    @cached_property
    def row_scales_at(self) -> int:
        """Offset of the row scales."""
        return padded_nbytes(self.codes_nbytes)

    @cached_property
    def channel_scales_at(self) -> int:
        """Offset of the channel scales."""
        return self.row_scales_at + padded_nbytes(self.row_scale_count * (2 if self.wide_rows else 1))

    @cached_property
    def total_nbytes(self) -> int:
        """Length of the payload."""
        if self.elements == 0:
            return 0
        sections = 2 if self.offsets else 1
        return self.channel_scales_at + sections * padded_nbytes(2 * self.groups * self.channel_scales_per_group)


# Every step of a stream asks for the same few layouts, several times.


@lru_cache(maxsize=256)
def _of(shape: tuple[int, ...], bits: int, base3: bool) -> Sections:
    return Sections(*matrix_shape(shape), bits, base3)


@lru_cache(maxsize=256)
def _of_history(shape: tuple[int, ...], bits: int, base3: bool) -> Sections:
    narrow = _of(shape, bits, base3)
    large = narrow.rows >= MIN_ROWS_FOR_CHANNEL_SCALES and narrow.channels >= MIN_CHANNELS_FOR_WIDE_ROW_SCALES
    return replace(narrow, wide_rows=True) if large and narrow.groups else narrow


@lru_cache(maxsize=256)
def _of_blocks(shape: tuple[int, ...], bits: int, block: int, base3: bool, offsets: bool) -> Sections:
    groups = matrix_shape(shape)[0]
    per_group = math.prod(shape) // max(groups, 1)
    blocks = -(-per_group // block)
    return Sections(groups * blocks, 1, -(-per_group // max(blocks, 1)), bits, base3, offsets)
