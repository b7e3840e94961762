"""Image error of codecs between PipeFusion's stages on the digits FLUX, over several noise seeds.

    python -m benchmarks.quality.pipefusion_quality --seeds 4 --json benchmarks/results/pipefusion_quality.json
    python -m benchmarks.quality.pipefusion_quality --show benchmarks/results/pipefusion_quality.json

Starts torchrun with two ranks by itself: two stages, two patches, one synchronous step, 28 steps. For every seed
uncompressed PipeFusion is the reference; prints median and range of ||x - x_ref|| / ||x_ref|| of the final latents
(which are this model's pictures) over the seeds, and the bytes between the stages. `--show` prints stored results
again.
"""

from __future__ import annotations

from typing import Any

from benchmarks.quality import over_seeds
from compactdist import CallInfo
from compactdist_xdit.fine import Fine


def only_latents_fine(call: CallInfo) -> str | None:
    """The adapter's policy without the exceptions for the first residual and the last message."""
    return Fine("pipefusion", over_seeds.RANKS - 1)(call)


VARIANTS: dict[str, dict[str, Any]] = {
    **{codec: {"codec": codec} for codec in ("int8", "int4", "int2", "binary")},
    **{f"{codec}, order 2": {"codec": codec, "order": 2} for codec in ("int8", "int4", "int2", "binary")},
    **{f"{codec}, its ends too": {"codec": codec, "policy": only_latents_fine} for codec in ("int4", "int2", "binary")},
}


if __name__ == "__main__":
    over_seeds.main(__doc__ or "", "pipefusion_quality", "pipefusion", VARIANTS, 4, over_seeds.table)
