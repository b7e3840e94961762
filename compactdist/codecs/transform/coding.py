"""From rows and channels to levels of components, and back.

A group's matrix is float32 ``(R, K)`` here: R rows, K = M n channels in M blocks. Its components are ``(K, R)``.
``Layout`` says where the parts of a payload lie, ``encode`` chooses them, ``decode`` reads them. What ``decode``
computes is the same on every machine: whole numbers, and single elements rounded one operation at a time.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from compactdist.codecs.shapes import padded_nbytes
from compactdist.codecs.transform.depths import DEEPEST, PER_OCTAVE, allocate, outermost
from compactdist.codecs.transform.planes import classes, codes_of, levels_of, pack, unpack
from compactdist.codecs.transform.products import by_blocks, inverse
from compactdist.kernels import reference as kernels

__all__ = ["Decoded", "Layout", "decode", "encode"]

_LARGEST_CODE = 255
_ROW_STEPS, _ROW_CODES = 4, 16
"""Row scales are powers of ``2**(1/4)``, from 0.3 to 3.4; the code 0 is for rows of zeros."""

_ROW_POWER = 0.7
"""Rows are evened out in part: the scale of all of a row's components is what its strongest ones need."""

_SMALLEST_AMPLITUDE = 2.0**-60
"""A residual whose largest amplitude is smaller decodes to zero: machines differ in subnormal numbers."""

_WIDE_FROM = 4
"""From this depth on a weight of 7 bits would be the largest error."""


class Layout(NamedTuple):
    """The matrix ``(R, C)`` of a group as blocks, and the sections of its payload.

    Attributes:
        rows, channels: of the matrix.
        blocks: of equal width; the last may reach beyond the channels, with zeros there.
        width: channels of a block, even.
        planes: bits of all components together.
    """

    rows: int
    channels: int
    blocks: int
    width: int
    planes: int

    @classmethod
    def of(cls, rows: int, channels: int, bits: float, block: int) -> Layout:
        blocks = max(1, -(-channels // block))
        width = -(-channels // blocks)
        width += width % 2
        return cls(rows, channels, blocks, width, max(1, int(bits * channels + 1e-9)))

    @property
    def components(self) -> int:
        """Of all blocks."""
        return self.blocks * self.width

    @property
    def sections(self) -> tuple[int, int, int, int]:
        """Bytes of the scales, the energy codes, the row codes and the planes, padding included."""
        return (
            padded_nbytes(4 + 2 * self.blocks),
            padded_nbytes(self.components),
            padded_nbytes(-(-self.rows // 2)),
            padded_nbytes(-(-self.rows // 8) * self.planes),
        )

    @property
    def nbytes(self) -> int:
        """Of the payload."""
        return sum(self.sections)

    def padded(self, matrix: Tensor) -> Tensor:
        """``(..., R, C)`` with zeros beyond the channels, ``(..., R, K)``."""
        missing = self.components - self.channels
        return torch.nn.functional.pad(matrix, (0, missing)) if missing else matrix

    def blocks_of(self, matrix: Tensor) -> Tensor:
        """A view ``(..., M, R, n)`` of a contiguous ``(..., R, K)``."""
        return matrix.view(*matrix.shape[:-1], self.blocks, self.width).transpose(-2, -3)

    def components_of(self, components: Tensor) -> Tensor:
        """A view ``(..., M, n, R)`` of a contiguous ``(..., K, R)``."""
        return components.view(*components.shape[:-2], self.blocks, self.width, self.rows)


@cache
def _amplitude_table(device: torch.device) -> Tensor:
    """float32 ``(256,)``: relative to the largest; a component without energy has the code 0, which decodes to 0."""
    powers = [2.0 ** ((code - _LARGEST_CODE) / PER_OCTAVE) for code in range(_LARGEST_CODE + 1)]
    return torch.tensor([0.0, *powers[1:]], device=device)


@cache
def _row_table(device: torch.device) -> Tensor:
    powers = [2.0 ** ((code - _ROW_CODES // 2) / _ROW_STEPS) for code in range(_ROW_CODES)]
    return torch.tensor([0.0, *powers[1:]], device=device)


@cache
def _outermost_table(device: torch.device) -> Tensor:
    return torch.tensor([outermost(depth) / 127 for depth in range(DEEPEST + 1)], device=device)


class Weights(NamedTuple):
    """A basis scaled by its components' amplitudes, in whole numbers.

    Attributes:
        whole: float32 ``(M, n, n)``, components by channels.
        unit: what a weight of 1 is, float32 ``(M,)``, in units of the largest amplitude.
        wide: whether weights have 14 bits.
    """

    whole: Tensor
    unit: Tensor
    wide: bool

    @classmethod
    def of(cls, basis: Tensor, amplitudes: Tensor, depths: Tensor) -> Weights:
        """``basis`` is float32 ``(M, n, n)``, ``amplitudes`` and ``depths`` are ``(M, n)``."""
        wide = bool((depths >= _WIDE_FROM).any())
        scaled = basis * (amplitudes * _outermost_table(basis.device)[depths])[:, :, None]
        unit = scaled.abs().amax((1, 2)) / (127 * 128 if wide else 127)
        divisor = torch.where(unit > 0, unit, torch.ones_like(unit))[:, None, None]
        return cls(torch.round(scaled / divisor), unit, wide)

    def products(self, levels: Tensor, layout: Layout) -> Tensor:
        """Levels ``(K, R)`` times the weights, whole numbers ``(R, K)``, rounded once."""
        out = torch.empty(layout.rows, layout.components, device=levels.device)
        inverse(layout.components_of(levels), self.whole, layout.blocks_of(out), wide=self.wide)
        return out

    def scaled(self, products: Tensor, gains: Tensor | None, top: Tensor, rows: Tensor) -> Tensor:
        """What products stand for, ``(R, K)``; ``gains (M,)``, ``top ()``, ``rows (R,)``."""
        unit = (self.unit if gains is None else self.unit * gains) * top
        return (products * unit.repeat_interleave(self.whole.shape[1])) * rows[:, None]


class Decoded(NamedTuple):
    """What a payload says.

    Attributes:
        matrix: float32 ``(R, K)``.
        levels: float32 whole numbers ``(K, R)``, in proportion to the rows' scales.
        amplitudes: float32 ``(M, n)``, relative to the largest.
    """

    matrix: Tensor
    levels: Tensor
    amplitudes: Tensor


def decode(payload: Tensor, layout: Layout, basis: Tensor) -> Decoded:
    """What a payload, uint8 ``(layout.nbytes,)``, says on a basis ``(M, n, n)``."""
    scales, energies, row_codes, planes = payload.split(list(layout.sections))
    top = scales[:4].clone().view(torch.float32)[0]
    gains = kernels.decode_bf16(scales[4 : 4 + 2 * layout.blocks])
    codes = energies[: layout.components]
    depths = allocate(codes, layout.planes)
    amplitudes = _amplitude_table(payload.device)[codes.long()].view(-1, layout.width)
    of_row = _row_codes(row_codes, layout)
    levels = _levels(planes, depths, layout)
    weights = Weights.of(basis, amplitudes, depths.view(-1, layout.width))
    rows = _row_table(payload.device)[of_row]
    matrix = weights.scaled(weights.products(levels, layout), gains, top, rows)
    return Decoded(matrix, _weighted(levels, of_row), amplitudes)


def _row_codes(section: Tensor, layout: Layout) -> Tensor:
    pairs = torch.stack([section & 15, section >> 4], 1).view(-1)
    return pairs[: layout.rows].long()


def _levels(section: Tensor, depths: Tensor, layout: Layout) -> Tensor:
    octets = -(-layout.rows // 8)
    planes = section[: octets * layout.planes].view(layout.planes, octets)
    out = torch.zeros(layout.components, layout.rows, device=section.device)
    at = 0
    for depth, which in classes(depths):
        count = which.numel() * depth
        out[which] = levels_of(unpack(planes[at : at + count], depth, layout.rows), depth)
        at += count
    return out


def _weighted(levels: Tensor, row_codes: Tensor) -> Tensor:
    """Levels times their row's scale relative to the largest, rounded."""
    table = _row_table(levels.device)
    largest = table[row_codes.amax()]
    relative = table[row_codes] / torch.where(largest > 0, largest, torch.ones_like(largest))
    return torch.round(levels * relative)


def encode(matrix: Tensor, amax: Tensor, layout: Layout, basis: Tensor) -> tuple[Tensor, Decoded]:
    """The payload of a finite float32 ``(R, K)``, contiguous, on a basis ``(M, n, n)``; and what ``decode`` gives.

    ``amax``, one element, is its largest magnitude.

    Returns:
        uint8 ``(layout.nbytes,)``, and its meaning.
    """
    device, exponent = matrix.device, int(torch.frexp(amax)[1])
    near_one = matrix * 2.0 ** (-exponent // 2) * 2.0 ** -(exponent + -exponent // 2)
    components = torch.empty(layout.components, layout.rows, device=device)
    by_blocks(basis, layout.blocks_of(near_one).mT, layout.components_of(components))
    row_codes, codes, largest = _fitted(components, layout)
    depths = allocate(codes, layout.planes)
    amplitudes = _amplitude_table(device)[codes.long()]
    rows = _row_table(device)[row_codes]
    planes = _planes(components, depths, rows, amplitudes * largest)
    section = torch.nn.functional.pad(planes.reshape(-1), (0, layout.sections[3] - planes.numel()))

    levels, amplitudes = _levels(section, depths, layout), amplitudes.view(-1, layout.width)
    weights = Weights.of(basis, amplitudes, depths.view(-1, layout.width))
    products = weights.products(levels, layout)
    seen = weights.scaled(products, None, largest, rows)
    energy, agreement = _per_block(seen, seen, layout), _per_block(seen, near_one, layout).clamp(min=0)
    gains = kernels.round_bf16(kernels.divide_or_zero(agreement, energy))
    top = (largest.double() * 2.0**exponent).clamp(max=torch.finfo(torch.float32).max).float()
    top = torch.where(top < _SMALLEST_AMPLITUDE, torch.zeros_like(top), top)

    nibbles = torch.nn.functional.pad(row_codes.to(torch.uint8), (0, row_codes.numel() % 2)).view(-1, 2)
    parts = (
        torch.cat([top.view(1).view(torch.uint8), kernels.encode_bf16(gains)]),
        codes,
        nibbles[:, 0] | nibbles[:, 1] << 4,
        section,
    )
    padded = [torch.nn.functional.pad(one, (0, n - one.numel())) for one, n in zip(parts, layout.sections, strict=True)]
    decoded = weights.scaled(products, gains, top, rows)
    return torch.cat(padded), Decoded(decoded, _weighted(levels, row_codes), amplitudes)


def _per_block(a: Tensor, b: Tensor, layout: Layout) -> Tensor:
    """The sum of ``a b`` over each block, ``(M,)``."""
    return (a * b).sum(0).view(-1, layout.width).sum(1)


def _planes(components: Tensor, depths: Tensor, rows: Tensor, scale: Tensor) -> Tensor:
    """uint8 ``(planes, ceil(R / 8))`` from float32 ``(K, R)``; ``rows (R,)`` and ``scale (K,)`` make a deviation."""
    parts, inverse_rows = [], torch.where(rows > 0, 1 / rows, torch.zeros_like(rows))
    for depth, which in classes(depths):
        some = components[which]
        if depth > 1:  # of a sign no scale matters
            of_class = scale[which]
            some *= torch.where(of_class > 0, 1 / of_class, torch.zeros_like(of_class))[:, None]
            some *= inverse_rows
        parts.append(pack(codes_of(some, depth), depth))
    return torch.cat(parts)


def _fitted(components: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """Row codes int64 ``(R,)``, energy codes uint8 ``(K,)`` and the largest amplitude ``()`` that fit components.

    Rows are fitted twice: to all components, then to those that get bits, each as strong as its amplitude says.
    """
    squares = components * components
    row_codes = _row_codes_for(squares.sum(0))
    codes, largest = _energy_codes(squares, row_codes)
    power = (_amplitude_table(components.device)[codes.long()] * largest).square()
    counts = (allocate(codes, layout.planes) > 0) & (power > 0)
    weights = torch.where(counts, 1 / torch.where(counts, power, torch.ones_like(power)), 0.0)
    row_codes = _row_codes_for(weights @ squares)
    return row_codes, *_energy_codes(squares, row_codes)


def _row_codes_for(of_row: Tensor) -> Tensor:
    relative = of_row / of_row.mean().clamp(min=1e-30)
    steps = torch.round(_ROW_STEPS * _ROW_POWER / 2 * torch.log2(relative.clamp(min=1e-30))) + _ROW_CODES // 2
    return torch.where(of_row > 0, steps.clamp(1, _ROW_CODES - 1), 0.0).long()


def _energy_codes(squares: Tensor, row_codes: Tensor) -> tuple[Tensor, Tensor]:
    rows = _row_table(squares.device)[row_codes]
    weights = torch.where(rows > 0, 1 / (rows * rows), 0.0)
    power = squares @ weights / len(weights)
    largest = power.amax()
    relative = torch.log2((power / largest.clamp(min=1e-30)).clamp(min=1e-30)) / 2
    codes = torch.round(_LARGEST_CODE + PER_OCTAVE * relative).clamp(0, _LARGEST_CODE)
    return codes.to(torch.uint8), largest.sqrt()
