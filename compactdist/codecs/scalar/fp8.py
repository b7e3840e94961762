"""Eight bits for each element: a float8."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from compactdist.codecs.base import About
from compactdist.codecs.options import check_choice
from compactdist.codecs.registry import register
from compactdist.codecs.scalar.quantized import ScalarQuantizer
from compactdist.codecs.shapes import BLOCK_ELEMENTS
from compactdist.kernels import reference as kernels
from compactdist.kernels.spec import FLOAT8


@register
class Fp8(ScalarQuantizer):
    """Decodes to a float8 times S, the scales chosen so that the largest values use the largest float8.

    The wire format is the one of ``sections.py`` with 8-bit codes: bit 7 is the sign, below it the exponent and the
    mantissa of the OCP 8-bit formats E4M3 (no infinity, bias 7) or E5M2 (bias 15). The level of a code is its value
    times ``2**9`` (E4M3) or ``2**16`` (E5M2), so that levels are integers. Codes for infinity and NaN are never sent
    and decode as the largest value. Rounding is to nearest even.

    About 8.02 bits for each element of a ``[1088, 3072]`` tensor, NMSE 7e-4 (E4M3) or 3e-3 (E5M2) on white Gaussian
    data. On such data int8 is better by 10 dB; a float keeps the relative error of small values beside large ones.

    Args:
        format: ``"e4m3"`` or ``"e5m2"``.
        scales: ``"token_channel"``, ``"token_history"`` or ``"block"``.
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
        self.format = check_choice(self.codec_id, "format", format, tuple(FLOAT8))
        self.kind = "e4m3" if self.format == "e4m3" else "e5m2"
        self.reach = FLOAT8[self.format].units

    def get_config(self) -> dict[str, Any]:
        """Return the options that differ from their defaults."""
        config = super().get_config()
        if self.format != "e4m3":
            config["format"] = self.format
        return config


def unit_levels(form: str) -> tuple[float, ...]:
    """The 256 levels of a format by code, in units of the smallest subnormal; codes from 128 on are negative."""
    return kernels.float8_levels(FLOAT8[form])


def encode_units(value: Tensor, form: str) -> Tensor:
    """Round float32 >= 0, in units of the smallest subnormal, to codes (uint8) without sign; saturates."""
    return kernels.float8_codes(value, FLOAT8[form])
