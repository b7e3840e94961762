"""Three bits for each element: the sign and one of four magnitudes."""

from __future__ import annotations

from compactdist.codecs.base import About
from compactdist.codecs.registry import register
from compactdist.codecs.scalar.lloyd_max import LloydMaxQuantizer


@register
class Int3(LloydMaxQuantizer):
    """Decodes to one of four magnitudes from ``0.245 S`` to ``2.152 S``, with either sign.

    About 3.02 bits for each element of a ``[1088, 3072]`` tensor, NMSE 0.035 on white Gaussian data. Eight codes
    fill three bytes.
    """

    codec_id = "int3"
    about = About(
        sends="sign and one of four magnitudes",
        use="between `int2` and `int4`",
        source="Lloyd-Max levels of the Gaussian (Max, Quantizing for minimum distortion, 1960); "
        "scales: `reference/scales.py`",
    )
    bits = 3
    # Lloyd-Max for the unit Gaussian, NMSE 0.034548; computed as lloyd_max.py says.
    uniform_step = 0.5860194414434869
    magnitudes = (0.24509417894422308, 0.7560052812058808, 1.3439092785050053, 2.151945704536992)
