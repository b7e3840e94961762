"""Rate and error of every codec.

``python -m benchmarks.codecs.codec_table --json benchmarks/results/codec_table.json``

Error on a unit Gaussian and a unit Laplace matrix, rate at ``[1088, 3072]`` with all scales and padding counted, and
the gap to the rate-distortion bound of the Gaussian: ``6.0206 * bits + 10 * log10(NMSE)`` dB.
"""

from __future__ import annotations

import argparse
import math
from typing import Any

import torch

from benchmarks.common import add_json, write_json
from compactdist import codecs

SHAPE = (1088, 3072)
CODECS: tuple[dict[str, Any], ...] = (
    {"id": "binary"},
    {"id": "binary", "scales": "block"},
    {"id": "binary", "scales": "rank"},
    {"id": "ternary"},
    {"id": "int2"},
    {"id": "int2", "scales": "block"},
    {"id": "int2", "centroids": "uniform"},
    {"id": "int2", "scales": "block", "centroids": "minmax"},
    {"id": "int3"},
    {"id": "int3", "centroids": "uniform"},
    {"id": "int3", "scales": "block", "centroids": "minmax"},
    {"id": "int4"},
    {"id": "int4", "scales": "block"},
    {"id": "int4", "centroids": "uniform"},
    {"id": "int4", "scales": "block", "centroids": "minmax"},
    {"id": "int8"},
    {"id": "int8", "scales": "block", "centroids": "minmax"},
    {"id": "fp8"},
    {"id": "fp8", "format": "e5m2"},
    {"id": "topk"},
    {"id": "topk", "m": 4},
    {"id": "topk", "m": 16},
    {"id": "topk_int4"},
    {"id": "topk_int4", "m": 4},
    {"id": "lowrank"},
    {"id": "lowrank", "rank": 32},
    {"id": "lowrank_int4"},
    {"id": "lowrank_int4", "allocation": "energy"},
    {"id": "transform"},
    {"id": "transform", "bits": 2.0},
    {"id": "transform", "bits": 4.0},
    {"id": "rates"},
)


def samples() -> dict[str, torch.Tensor]:
    """A matrix of unit variance from each density."""
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(SHAPE, generator=generator, dtype=torch.float64) - 0.5
    laplace = -uniform.sign() * torch.log1p(-2 * uniform.abs().clamp(max=0.4999999)) / math.sqrt(2)
    return {"gaussian": torch.randn(SHAPE, generator=generator), "laplace": laplace.float()}


def row(spec: dict[str, Any], data: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Measure one codec."""
    codec = codecs.get(spec)
    options = {key: value for key, value in spec.items() if key != "id"}
    bits = codec.payload_nbytes(SHAPE, torch.float32) * 8 / math.prod(SHAPE)
    result: dict[str, Any] = {"id": spec["id"], "options": options, "bits": round(bits, 4)}
    for name, x in data.items():
        error = codec.decode(codec.encode(x), x.shape, x.dtype).double() - x.double()
        nmse = 10 * math.log10(float(error.square().sum() / x.double().square().sum()))
        result[name] = {"nmse_db": round(nmse, 2), "gap_db": round(20 * math.log10(2) * bits + nmse, 2)}
    return result


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| codec | options | bits | Gaussian NMSE dB | gap dB | Laplace NMSE dB | gap dB |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for each in rows:
        options = ", ".join(f"{key}={value}" for key, value in each["options"].items())
        g, lap = each["gaussian"], each["laplace"]
        lines.append(
            f"| `{each['id']}` | {options} | {each['bits']:.3f} | {g['nmse_db']:.2f} | {g['gap_db']:.2f} "
            f"| {lap['nmse_db']:.2f} | {lap['gap_db']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_json(parser)
    arguments = parser.parse_args()
    data = samples()
    rows = [row(spec, data) for spec in CODECS]
    print(table(rows))
    write_json(arguments.json, {"shape": SHAPE, "rows": rows})


if __name__ == "__main__":
    main()
