"""Image error of the transform codec on the digits FLUX in xDiT, at the bytes of the scalar codecs, over noise seeds.

    R=benchmarks/results
    python -m benchmarks.quality.transform_quality --route ring --json $R/transform_quality_ring.json
    python -m benchmarks.quality.transform_quality --route ulysses --json $R/transform_quality_ulysses.json

Starts torchrun with two ranks by itself. Bytes are those of whole requests, keyframes, scales and headers included. The
reference for errors is the uncompressed run on the same route. "As published" is what CompactFusion sends for the same
name: keyframes of the tensors' own bytes.
"""

from __future__ import annotations

from typing import Any

from benchmarks.quality import over_seeds

VARIANTS: dict[str, dict[str, Any]] = {
    "binary, as published": {"codec": "binary", "keyframe": "raw"},
    "int2, as published": {"codec": "int2", "keyframe": "raw"},
    "binary": {"codec": "binary"},
    "int2": {"codec": "int2"},
    "int4": {"codec": "int4"},
    "transform, 0.4 bits, int4 keyframe": {"codec": "transform:bits=0.4", "keyframe": "int4"},
    "transform, 0.95 bits": {"codec": "transform:bits=0.95"},
    "transform, 2 bits": {"codec": "transform:bits=2"},
    "transform, 4 bits": {"codec": "transform:bits=4"},
}


if __name__ == "__main__":
    over_seeds.main(__doc__ or "", "transform_quality", None, VARIANTS, 4, over_seeds.table)
