"""Eight bits for each element: a float8."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from compactdist.codecs.base import About
from compactdist.codecs.options import check_choice
from compactdist.codecs.registry import register
from compactdist.codecs.scalar.layout import Layout
from compactdist.codecs.scalar.quantized import ScalarQuantizer
from compactdist.codecs.scalar.scales import RowScales, storable_scale
from compactdist.codecs.shapes import BLOCK_ELEMENTS
from compactdist.kernels import reference as kernels


class _Format(NamedTuple):
    """Of the value ``1.mantissa * 2**(exponent - bias)``, and where its finite codes end."""

    mantissa_bits: int
    bias: int
    largest_code: int

    @property
    def units(self) -> float:
        """The largest value, in units of the smallest subnormal."""
        return _level(self, self.largest_code)


_FORMATS = {"e4m3": _Format(3, 7, 0x7E), "e5m2": _Format(2, 15, 0x7B)}


def _level(form: _Format, code: int) -> float:
    """Value of a code without sign, in units of the smallest subnormal: an integer."""
    exponent, mantissa = divmod(min(code, form.largest_code), 1 << form.mantissa_bits)
    return float(mantissa if exponent == 0 else ((1 << form.mantissa_bits) + mantissa) << (exponent - 1))


@register
class Fp8(ScalarQuantizer):
    """Decodes to a float8 times S, the scales chosen so that the largest values use the largest float8.

    The wire format is the one of ``layout.py`` with 8-bit codes: bit 7 is the sign, below it the exponent and the
    mantissa of the OCP 8-bit formats E4M3 (no infinity, bias 7) or E5M2 (bias 15). The level of a code is its value
    times ``2**9`` (E4M3) or ``2**16`` (E5M2), so that levels are integers. Codes for infinity and NaN are never sent
    and decode as the largest value. Rounding is to nearest even.

    About 8.02 bits for each element of a ``[1088, 3072]`` tensor, NMSE 7e-4 (E4M3) or 3e-3 (E5M2) on white Gaussian
    data. On such data int8 is better by 10 dB; a float keeps the relative error of small values beside large ones.

    Args:
        format: ``"e4m3"`` or ``"e5m2"``.
        scales: ``"token_channel"`` or ``"block"``.
        block: Elements to a block, at most.

    Raises:
        CodecConfigError: An option has a value it does not take.
    """

    codec_id = "fp8"
    about = About(
        sends="a float8",
        use="values over a wide range whose relative error counts; on residuals `int8` is better",
        source="OCP 8-bit Floating Point Specification, 2023",
    )
    bits = 8

    def __init__(self, format: str = "e4m3", scales: str = "token_channel", block: int = BLOCK_ELEMENTS) -> None:
        super().__init__(scales, block)
        self.format = check_choice(self.codec_id, "format", format, tuple(_FORMATS))
        self.fused = "e4m3" if self.format == "e4m3" else "e5m2"
        self.reach = _FORMATS[self.format].units

    def get_config(self) -> dict[str, Any]:
        """Return the options that differ from their defaults."""
        config = super().get_config()
        if self.format != "e4m3":
            config["format"] = self.format
        return config

    def _row_statistic(self, magnitude: Tensor) -> Tensor:
        return magnitude.amax(2, keepdim=True)

    def _fit(self, values: Tensor, magnitude: Tensor, rows: RowScales, layout: Layout) -> tuple[Tensor, Tensor]:
        one = torch.ones((), dtype=torch.float32, device=magnitude.device)
        reach = (magnitude * kernels.divide_or_zero(one, rows.weight)).amax(1, keepdim=True) / rows.norm
        if layout.channel_scales_per_group == 1:
            reach = reach.amax(2, keepdim=True)
        c = storable_scale(reach / self.reach, up=True)
        # Each element rounds to its nearest level and zero is a level, so no element's error exceeds the element.
        codes = encode_units(kernels.normalised(magnitude, rows.t, c), self.format)
        return (codes | ((values < 0).to(torch.uint8) << 7)).view(-1), c

    def _levels(self, packed: Tensor, count: int) -> Tensor:
        return kernels.unpack_levels(packed, unit_levels(self.format), 8, count)


def unit_levels(form: str) -> tuple[float, ...]:
    """The 256 levels of a format by code, in units of the smallest subnormal; codes from 128 on are negative."""
    positive = tuple(_level(_FORMATS[form], code) for code in range(128))
    return positive + tuple(-level for level in positive)


def encode_units(value: Tensor, form: str) -> Tensor:
    """Round float32 >= 0, in units of the smallest subnormal, to codes (uint8) without sign; saturates.

    Done on float bits: a unit is the value 1 here, so exponent fields differ by a constant, and what lies below the
    smallest normal number is an integer.
    """
    mantissa_bits, _, largest_code = _FORMATS[form]
    drop = 23 - mantissa_bits
    bits = value.contiguous().view(torch.int32)
    rounded = (bits + ((1 << (drop - 1)) - 1) + ((bits >> drop) & 1)) >> drop
    # 2**mantissa_bits units are the smallest normal number, whose exponent field is 1.
    normal = rounded - ((127 + mantissa_bits - 1) << mantissa_bits)
    subnormal = value.round().to(torch.int32)
    return torch.where(value < (1 << mantissa_bits), subnormal, normal).clamp(max=largest_code).to(torch.uint8)
