"""Two bits for each element: the sign and one of two magnitudes."""

from __future__ import annotations

from compactdist.codecs.base import About
from compactdist.codecs.registry import register
from compactdist.codecs.scalar.lloyd_max import LloydMaxQuantizer


@register
class Int2(LloydMaxQuantizer):
    """Decodes to ``+-0.4528 S`` or ``+-1.5104 S``.

    About 2.02 bits for each element of a ``[1088, 3072]`` tensor, NMSE 0.118 on white Gaussian data.
    """

    codec_id = "int2"
    about = About(
        sends="sign and one of two magnitudes",
        use="the default: errors that are not seen in images at a seventh of the bytes",
        source="Lloyd-Max levels of the Gaussian (Max, Quantizing for minimum distortion, 1960); "
        "scales: `reference/scales.py`",
    )
    bits = 2
    widening = 2
    # Lloyd-Max for the unit Gaussian, NMSE 0.117482; computed as lloyd_max.py says.
    uniform_step = 0.9956866859435064
    magnitudes = (0.45278003463649646, 1.510417608499104)
