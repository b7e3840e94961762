"""The wire format of the scalar quantizers.

A tensor is seen as float32 ``(G, R, C)``: groups, rows, channels (see ``shapes.matrix_shape``). Element ``(g,
n, j)`` decodes to ``level[code] * S`` with ``S = t[g, n] * c[g, j]``: two float32 multiplications, ``S``
first. The product is clamped to the largest finite value of the wanted dtype and rounded to nearest even.

The payload is three sections, each filled up with zeros to a multiple of 16 bytes:

1. **codes**, ``G * R * C`` of b bits, row-major, including the zeros that fill the tail of a flat tensor.
   Within a byte the first element takes the lowest bits.

   ====== === ==============================================================================
   codec  b   code
   ====== === ==============================================================================
   binary 1   1 for values >= 0, else 0; levels +1 and -1
   int2   2   ``sign << 1 | magnitude``, sign 1 is negative; two magnitudes
   int4   4   ``sign << 3 | magnitude``, sign 1 is negative; eight magnitudes
   int8   8   two's complement, -127 to 127; the level is the integer
   ====== === ==============================================================================

2. **row scales** ``t``, one byte for each of ``G * R`` rows, there if ``C >= 64`` and ``R > 1``; otherwise
   ``t = 1``. The byte is an unsigned minifloat with 5 exponent and 3 mantissa bits (UE5M3): 0 means exactly
   0, any other code k means ``(8 + k % 8) / 8 * 2 ** (k // 8 - 31)``. Rows are normalised so that a group's
   largest is 1.
3. **channel scales** ``c``, bfloat16, low byte first: ``G * C`` of them if ``R >= 64``, otherwise one for
   each group.

A tensor without elements has an empty payload.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from compactdist.codecs.shapes import matrix_shape, padded_nbytes

MIN_CHANNELS_FOR_ROW_SCALES = 64
"""Below this a byte for each row would cost more than an eighth of a bit for each element."""

MIN_ROWS_FOR_CHANNEL_SCALES = 64
"""Below this two bytes for each channel would cost more than a quarter of a bit for each element."""


@dataclass(frozen=True)
class Layout:
    """Sizes and offsets, in bytes, of one payload.

    Attributes:
        groups: G, matrices with scales of their own.
        rows: R, in each group.
        channels: C, in each row.
        bits: b, for each code.
    """

    groups: int
    rows: int
    channels: int
    bits: int

    @classmethod
    def of(cls, shape: Sequence[int], bits: int) -> Layout:
        """Return the layout of a tensor of this shape."""
        return cls(*matrix_shape(shape), bits)

    @property
    def elements(self) -> int:
        """Coded elements, padding included."""
        return self.groups * self.rows * self.channels

    @property
    def codes_nbytes(self) -> int:
        """Bytes that carry codes, before alignment."""
        return -(-self.elements * self.bits // 8)

    @property
    def row_scale_count(self) -> int:
        """Row scales on the wire: G * R or none."""
        present = self.channels >= MIN_CHANNELS_FOR_ROW_SCALES and self.rows > 1
        return self.groups * self.rows if present else 0

    @property
    def channel_scales_per_group(self) -> int:
        """Channel scales on the wire for each group: C or one."""
        return self.channels if self.rows >= MIN_ROWS_FOR_CHANNEL_SCALES else 1

    @property
    def row_scales_at(self) -> int:
        """Offset of the row scales."""
        return padded_nbytes(self.codes_nbytes)

    @property
    def channel_scales_at(self) -> int:
        """Offset of the channel scales."""
        return self.row_scales_at + padded_nbytes(self.row_scale_count)

    @property
    def total_nbytes(self) -> int:
        """Length of the payload."""
        if self.elements == 0:
            return 0
        return self.channel_scales_at + padded_nbytes(2 * self.groups * self.channel_scales_per_group)
