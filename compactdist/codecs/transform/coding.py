"""From components to the payload of a group, and back to levels and weights.

A group's matrix is float32 ``(R, K)``: R rows, K = M n channels in M blocks. Its components are ``(K, R)``; those that
get bits are *chosen*, S of them. ``Layout`` says where the parts of a payload lie, ``encode`` chooses them, ``decode``
reads them. What ``decode`` computes is the same on every machine: whole numbers, and single elements rounded one
operation at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from compactdist import kernels
from compactdist.codecs.shapes import padded_nbytes
from compactdist.codecs.transform import trellis
from compactdist.codecs.transform.depths import PER_OCTAVE, allocate
from compactdist.codecs.transform.levels import SCALAR, LevelSet, steps_table, unit_levels_of
from compactdist.codecs.transform.products import LARGEST_SUM, LARGEST_WEIGHT
from compactdist.kernels import reference
from compactdist.kernels.reference.components import Chosen

__all__ = [
    "ROW_SLOPE",
    "SMALLEST_AMPLITUDE",
    "Frame",
    "Layout",
    "Spread",
    "Weights",
    "amplitude_table",
    "amplitudes_of",
    "decode",
    "encode",
    "row_scales_of",
    "row_table",
    "sampled",
]

_LARGEST_CODE = 255
_ROW_STEPS, _ROW_CODES = 4, 16
"""Row scales are powers of ``2**(1/4)``, from 0.3 to 3.4; the code 0 is for rows of zeros."""

_ROW_POWER = 0.7
"""Rows are evened out in part: the scale of all of a row's components is what its strongest ones need."""

ROW_SLOPE = _ROW_STEPS * _ROW_POWER / 2
"""Steps of a row's code to a factor of two of the mean square of its components."""

SMALLEST_AMPLITUDE = 2.0**-60
"""A residual whose largest amplitude is smaller decodes to zero: machines differ in subnormal numbers."""

_SAMPLE = 512
"""Energies and covariances are taken from so many rows, or up to twice as many."""


def sampled(rows: int) -> slice:
    """The rows, evenly spaced from the first on, that energies and covariances are taken from."""
    return slice(None, None, max(1, rows // _SAMPLE))


class Layout(NamedTuple):
    """The matrix ``(R, C)`` of a group as blocks, and the sections of its payload.

    Attributes:
        rows, channels: of the matrix.
        blocks: of equal width; the last may reach beyond the channels, with zeros there.
        width: channels of a block, even.
        planes: bits of all components together.
        levels: that components are rounded to.
    """

    rows: int
    channels: int
    blocks: int
    width: int
    planes: int
    levels: LevelSet = SCALAR

    @classmethod
    def of(cls, rows: int, channels: int, bits: float, block: int, levels: LevelSet = SCALAR) -> Layout:
        blocks = max(1, -(-channels // block))
        width = -(-channels // blocks)
        width += width % 2
        return cls(rows, channels, blocks, width, max(1, int(bits * channels + 1e-9)), levels)

    @property
    def on_trellis(self) -> bool:
        """Whether levels are chosen along a trellis."""
        return self.levels == trellis.TRELLIS

    @property
    def components(self) -> int:
        """Of all blocks."""
        return self.blocks * self.width

    @property
    def plane_nbytes(self) -> int:
        """Of a bit for each row."""
        return -(-self.rows // 8)

    @property
    def sections(self) -> tuple[int, int, int, int]:
        """Bytes of the scales, the energy codes, the row codes and the planes, padding included."""
        return (
            padded_nbytes(4 + 2 * self.blocks),
            padded_nbytes(self.components),
            padded_nbytes(-(-self.rows // 2)),
            padded_nbytes(self.plane_nbytes * self.planes),
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

    def planes_of(self, section: Tensor) -> Tensor:
        """A view ``(planes, ceil(R / 8))`` of the section of planes."""
        return section[: self.plane_nbytes * self.planes].view(self.planes, self.plane_nbytes)


@cache
def amplitude_table(device: torch.device) -> Tensor:
    """float32 ``(256,)``: relative to the largest; a component without energy has the code 0, which decodes to 0."""
    powers = [2.0 ** ((code - _LARGEST_CODE) / PER_OCTAVE) for code in range(_LARGEST_CODE + 1)]
    return torch.tensor([0.0, *powers[1:]], dtype=torch.float32, device=device)


@cache
def row_table(device: torch.device) -> Tensor:
    """float32 ``(16,)``: of each code, ascending; that of 0 is 0."""
    powers = [2.0 ** ((code - _ROW_CODES // 2) / _ROW_STEPS) for code in range(_ROW_CODES)]
    return torch.tensor([0.0, *powers[1:]], dtype=torch.float32, device=device)


def amplitudes_of(codes: Tensor) -> Tensor:
    """Of energy codes, relative to the largest, float32."""
    return amplitude_table(codes.device)[codes.long()]


def row_scales_of(codes: Tensor) -> Tensor:
    """float32, of the same shape."""
    return row_table(codes.device)[codes]


class Spread(NamedTuple):
    """What energy codes say.

    Attributes:
        chosen: the components that get bits.
        counts: how many of them each block has.
        block: of each of them, int64 ``(S,)``.
        amplitudes: of all components, float32 ``(K,)``, relative to the largest.
        levels: that components are rounded to.
    """

    chosen: Chosen
    counts: list[int]
    block: Tensor
    amplitudes: Tensor
    levels: LevelSet

    @classmethod
    def of(cls, codes: Tensor, layout: Layout) -> Spread:
        """``codes`` is uint8 ``(K,)``."""
        depths = allocate(codes, layout.planes, layout.levels)
        places = depths.nonzero().view(-1)
        depths = depths[places]
        order = torch.argsort(depths, descending=True, stable=True)
        planes = torch.empty_like(depths)
        planes[order] = depths[order].cumsum(0) - depths[order]
        block = places // layout.width
        counts: list[int] = torch.bincount(block, minlength=layout.blocks).tolist()
        device = codes.device
        table = trellis.search_table(device) if layout.on_trellis else steps_table(layout.levels, device)
        return cls(Chosen(places, depths, planes, table), counts, block, amplitudes_of(codes), layout.levels)

    @property
    def unit_levels(self) -> Tensor:
        """What a level of 1 is of each chosen component, float32 ``(S,)``, in units of the largest amplitude."""
        return self.amplitudes[self.chosen.places] * unit_levels_of(self.chosen.depths, self.levels)


class Weights(NamedTuple):
    """Chosen components of a basis scaled by their amplitudes, in whole numbers.

    Attributes:
        whole: float32 ``(S, n)``, at most ``LARGEST_WEIGHT``; magnitudes of a block and channel add up to about
            ``LARGEST_SUM`` at most.
        unit: what a weight of 1 is, float32 ``(M,)``, in units of the largest amplitude.
    """

    whole: Tensor
    unit: Tensor

    @classmethod
    def of(cls, basis: Tensor, spread: Spread) -> Weights:
        """``basis`` is float32 ``(M, n, n)``, of any scale."""
        blocks, width, _ = basis.shape
        scaled = basis.reshape(-1, width)[spread.chosen.places] * spread.unit_levels[:, None]
        unit = basis.new_zeros(blocks).scatter_reduce_(0, spread.block, scaled.abs().amax(1), "amax")
        unit = unit / torch.full_like(unit, LARGEST_WEIGHT)  # CUDA takes the inverse of a number, and rounds twice
        whole = _rounded(scaled, unit, spread.block)
        # sums of whole numbers, exact in float64
        sums = torch.zeros(blocks, width, dtype=torch.float64, device=basis.device)
        excess = sums.index_add_(0, spread.block, whole.abs().double()).amax(1) / LARGEST_SUM
        unit = unit * excess.clamp(min=1).float()
        return cls(_rounded(scaled, unit, spread.block), unit)


def _rounded(scaled: Tensor, unit: Tensor, block: Tensor) -> Tensor:
    divisor = torch.where(unit > 0, unit, torch.ones_like(unit))
    return torch.round(scaled / divisor[block][:, None])


def _finite(units: Tensor) -> Tensor:
    """Units as both ends take them, whatever a payload says."""
    largest = torch.finfo(torch.float32).max
    return torch.nan_to_num(units, nan=0.0, posinf=largest, neginf=-largest)


class Frame(NamedTuple):
    """What a payload says.

    Attributes:
        spread: of its energies.
        levels: -127 to 127, int8 ``(S, R)``.
        row_codes: int64 ``(R,)``.
        gains: bfloat16-valued float32 ``(M,)``.
        top: the largest amplitude, float32 ``()``.
    """

    spread: Spread
    levels: Tensor
    row_codes: Tensor
    gains: Tensor
    top: Tensor

    @property
    def rows(self) -> Tensor:
        """Scales, float32 ``(R,)``."""
        return row_scales_of(self.row_codes)

    def units(self, weights: Weights) -> Tensor:
        """What a product of levels and weights of 1 is in each channel, of a row of scale 1, float32 ``(K,)``."""
        return _finite((weights.unit * self.gains) * self.top).repeat_interleave(weights.whole.shape[1])

    def evidence(self) -> Tensor:
        """Levels of the sampled rows times their scale relative to the largest, int8 ``(S, R')``."""
        which = sampled(self.levels.shape[1])
        rows = self.rows[which]
        largest = rows.amax()
        weights = rows / torch.where(largest > 0, largest, torch.ones_like(largest))
        return (self.levels[:, which] * weights).round_().to(torch.int8)


def decode(payload: Tensor, layout: Layout, space: Tensor) -> Frame:
    """What a payload, uint8 ``(layout.nbytes,)``, says. Levels go to ``space``, int8 ``(K, R)``."""
    scales, energies, row_codes, planes = payload.split(list(layout.sections))
    spread = Spread.of(energies[: layout.components], layout)
    out = space[: spread.block.numel()]
    bits, chosen = layout.planes_of(planes), spread.chosen
    if layout.on_trellis:
        bits, chosen = trellis.untangled(bits, chosen, layout.rows)
    kernels.component_steps_for(out.numel(), payload.device).read(bits, chosen, out)
    gains = reference.decode_bf16(scales[4 : 4 + 2 * layout.blocks])
    pairs = torch.stack([row_codes & 15, row_codes >> 4], 1).view(-1)
    return Frame(spread, out, pairs[: layout.rows].long(), gains, scales[:4].clone().view(torch.float32)[0])


def encode(turned: Tensor, of_row: Tensor, exponent: int, layout: Layout, space: Tensor) -> tuple[Tensor, Frame]:
    """The payload of components ``(K, R)`` that are to be multiplied by ``2**exponent``.

    Args:
        turned: the components, float32 or bfloat16, of magnitudes that can be squared.
        of_row: sums of their squares, float32 ``(R,)``; may differ a little.
        exponent: of what they were divided by.
        layout: of the payload.
        space: for the levels, int8 ``(K, R)``, contiguous.

    Returns:
        uint8 ``(layout.nbytes,)``, and what ``decode`` makes of it.
    """
    device = turned.device
    payload = torch.zeros(layout.nbytes, dtype=torch.uint8, device=device)
    planes = payload.split(list(layout.sections))[3]

    def weigh(codes: Tensor, largest: Tensor) -> Tensor:
        spread = Spread.of(codes, layout)
        power = (spread.amplitudes[spread.chosen.places] * largest).square()
        weights = torch.where(power > 0, 1 / power, torch.zeros_like(power))
        weighed: Tensor = kernels.component_steps_for(turned.numel(), device).weigh(
            turned, spread.chosen.places, weights
        )
        return weighed

    row_codes, codes, largest = _fitted(turned, of_row, layout, weigh)
    spread = Spread.of(codes, layout)
    out = space[: spread.block.numel()]
    steps, rows = kernels.component_steps_for(out.numel(), device), row_scales_of(row_codes)
    of_level = spread.unit_levels * largest
    unit = of_level if layout.on_trellis else spread.amplitudes[spread.chosen.places] * largest
    inverses = torch.where(unit > 0, 1 / unit, torch.zeros_like(unit))
    given = turned, spread.chosen, inverses, rows, layout.planes_of(planes), out
    if layout.on_trellis:
        energy, agreement = steps.choose_on_trellis(*given, trellis.stride_of(layout.rows))
    else:
        energy, agreement = steps.choose(*given)

    sums = torch.zeros(2, layout.blocks, dtype=torch.float64, device=device)
    exact = of_level.double()
    sums[0].index_add_(0, spread.block, agreement * exact)
    sums[1].index_add_(0, spread.block, energy * exact * exact)
    gains, top = _write_scales(payload, layout, (sums[0], sums[1]), largest.double() * 2.0**exponent, codes, row_codes)
    return payload, Frame(spread, out, row_codes, gains, top)


def _write_scales(
    payload: Tensor, layout: Layout, sums: tuple[Tensor, Tensor], top: Tensor, codes: Tensor, row_codes: Tensor
) -> tuple[Tensor, Tensor]:
    """Write all sections but the planes.

    Args:
        payload: of a group, zeros there.
        layout: of it.
        sums: for each block, of its levels times their scales: times the components, and squared, float64 ``(M,)``.
        top: the largest amplitude, float64 ``()``.
        codes: of energies, uint8 ``(K,)``.
        row_codes: int64 ``(R,)``.

    Returns:
        The gains and the largest amplitude as the receiver reads them.
    """
    scales, energies, of_rows, _ = payload.split(list(layout.sections))
    gains = reference.round_bf16(reference.divide_or_zero(sums[0].clamp(min=0), sums[1]).float())
    top = top.clamp(max=torch.finfo(torch.float32).max).float()
    top = torch.where(top < SMALLEST_AMPLITUDE, torch.zeros_like(top), top)
    scales[:4] = top.view(1).view(torch.uint8)
    scales[4 : 4 + 2 * layout.blocks] = reference.encode_bf16(gains)
    energies[: layout.components] = codes
    nibbles = torch.nn.functional.pad(row_codes.to(torch.uint8), (0, layout.rows % 2)).view(-1, 2)
    of_rows[: nibbles.shape[0]] = nibbles[:, 0] | nibbles[:, 1] << 4
    return gains, top


def _fitted(
    turned: Tensor, of_row: Tensor, layout: Layout, weigh: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Row codes int64 ``(R,)``, energy codes uint8 ``(K,)`` and the largest amplitude ``()`` that fit components.

    Rows are fitted twice: to all components, then to those that get bits, each as strong as its amplitude says.

    Args:
        turned: the components ``(K, R)``.
        of_row: sums of their squares, float32 ``(R,)``.
        layout: of the payload.
        weigh: of energy codes and the largest amplitude: the squares of each row, of the components that get bits
            then, each divided by the square of its amplitude, and summed up.
    """
    which = sampled(layout.rows)
    squares = turned[:, which].float().square()
    row_codes = _row_codes_for(of_row)
    codes, largest = _energy_codes(squares, row_codes[which])
    row_codes = _row_codes_for(weigh(codes, largest))
    return row_codes, *_energy_codes(squares, row_codes[which])


def _row_codes_for(of_row: Tensor) -> Tensor:
    relative = of_row / of_row.mean().clamp(min=1e-30)
    steps = torch.round(ROW_SLOPE * torch.log2(relative.clamp(min=1e-30))) + _ROW_CODES // 2
    return torch.where(of_row > 0, steps.clamp(1, _ROW_CODES - 1), 0.0).long()


def _energy_codes(squares: Tensor, row_codes: Tensor) -> tuple[Tensor, Tensor]:
    rows = row_scales_of(row_codes)
    weights = torch.where(rows > 0, 1 / (rows * rows), 0.0)
    power = squares @ weights / len(weights)
    largest = power.amax()
    relative = torch.log2((power / largest.clamp(min=1e-30)).clamp(min=1e-30)) / 2
    codes = torch.round(_LARGEST_CODE + PER_OCTAVE * relative).clamp(0, _LARGEST_CODE)
    return codes.to(torch.uint8), largest.sqrt()
