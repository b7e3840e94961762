"""Eight bits for each element: a signed integer, equally spaced levels."""

from __future__ import annotations

from typing import Any

from compactdist.codecs.base import About
from compactdist.codecs.options import check_choice
from compactdist.codecs.registry import register
from compactdist.codecs.scalar import affine
from compactdist.codecs.scalar.quantized import ScalarQuantizer
from compactdist.codecs.shapes import BLOCK_ELEMENTS


@register
class Int8(ScalarQuantizer):
    """Decodes to ``q * S`` with q from -127 to 127. The scales follow the maxima, so no element is clipped.

    About 8.02 bits for each element of a ``[1088, 3072]`` tensor, NMSE 1e-4 on white Gaussian data.

    Args:
        scales: ``"token_channel"``, ``"token_history"`` or ``"block"``.
        block: Elements to a block, at most.
        centroids: ``"uniform"``, the integers; ``"minmax"``, 256 levels from the smallest to the largest value of a
            block (needs ``scales="block"``).

    Raises:
        CodecConfigError: An option has a value it does not take.
    """

    codec_id = "int8"
    about = About(
        sends="an integer from -127 to 127",
        use="links that are a little too slow; tensors with no history, where it is nearly exact",
        source="uniform levels up to the largest element of a row and channel: `int8.py`",
    )
    bits = 8
    kind = "linear"
    reach = 127.0

    def __init__(self, scales: str = "token_channel", block: int = BLOCK_ELEMENTS, centroids: str = "uniform") -> None:
        super().__init__(scales, block)
        self.centroids = check_choice(self.codec_id, "centroids", centroids, ("uniform", "minmax"))
        self.offsets = affine.wanted(self.codec_id, centroids, scales)

    def get_config(self) -> dict[str, Any]:
        """Return the options that differ from their defaults."""
        config = super().get_config()
        if self.centroids != "uniform":
            config["centroids"] = self.centroids
        return config
