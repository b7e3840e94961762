"""Four bits with a zero level, for the values of ``topk_int4`` and the factors of ``lowrank_int4``."""

from __future__ import annotations

from compactdist.codecs.scalar.quantized import ScalarQuantizer
from compactdist.codecs.shapes import BLOCK_ELEMENTS

# Lloyd-Max of 15 levels for the unit Gaussian, NMSE 0.010737: as lloyd_max.py says, with the first level held at 0.
MAGNITUDES = (
    0.0,
    0.2738568549040208,
    0.5547636946759694,
    0.8511344121244998,
    1.174879178355213,
    1.5460567537076253,
    2.0064743961505593,
    2.6808661189877245,
)


class Int4WithZero(ScalarQuantizer):
    """Codes ``sign << 3 | magnitude`` of fifteen levels, zero among them, in the wire format of ``sections.py``.

    A part of other codecs: not registered. Unlike with ``int4``, zeros decode to exact zeros.
    """

    codec_id = "int4_with_zero"
    kind = "nearest"
    bits = 4
    magnitudes = MAGNITUDES

    def __init__(self, block: int = BLOCK_ELEMENTS) -> None:
        super().__init__("block")
        self.block = block  # no upper limit here: a component of a factor is one block
