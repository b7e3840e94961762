"""Write the stored payloads of a new codec: ``python -m tests.codecs.make_fixtures NAME``.

Of ``STREAMS`` several frames are stored, for each is decoded with what the one before left.
A stored payload is a promise to every peer of an earlier release. This script creates files and never
replaces one; to change a wire format, give the new format a new codec id.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from compactdist import codecs
from compactdist.state.matrix_view import plain
from tests.codecs import kit

FOLDER = Path(__file__).parent.parent / "fixtures" / "codecs"

# A name for each codec, and for each option whose payloads look different.
SPECS: dict[str, dict[str, Any]] = {
    **{codec_id: {"id": codec_id} for codec_id in ("binary", "int2", "int3", "int4", "int8", "raw", "ternary")},
    **{codec_id: {"id": codec_id} for codec_id in ("fp8", "topk", "topk_int4", "lowrank", "lowrank_int4")},
    "transform": {"id": "transform"},
    "transform-trellis": {"id": "transform", "bits": 2.0, "trellis": True},
    "rates": {"id": "rates"},
    "rates-scalar": {"id": "rates", "rungs": "scalar"},
    "fp8-e5m2": {"id": "fp8", "format": "e5m2"},
    "fp8-block": {"id": "fp8", "scales": "block"},
    "topk-3": {"id": "topk", "m": 3},
    "lowrank-2": {"id": "lowrank", "rank": 2},
    "lowrank_int4-3": {"id": "lowrank_int4", "rank": 3},
    "lowrank_int4-energy": {"id": "lowrank_int4", "rank": 4, "allocation": "energy"},
    "topk_int4-2": {"id": "topk_int4", "m": 2, "block": 16},
    "binary-block": {"id": "binary", "scales": "block"},
    "binary-rank": {"id": "binary", "scales": "rank"},
    "binary-rank-1": {"id": "binary", "scales": "rank", "rank": 1},
    "ternary-block": {"id": "ternary", "scales": "block", "block": 100},
    "int2-uniform": {"id": "int2", "centroids": "uniform"},
    "int3-block": {"id": "int3", "scales": "block"},
    "int3-uniform": {"id": "int3", "centroids": "uniform"},
    "int4-block-uniform": {"id": "int4", "scales": "block", "block": 64, "centroids": "uniform"},
    "int2-minmax": {"id": "int2", "scales": "block", "block": 32, "centroids": "minmax"},
    "int3-minmax": {"id": "int3", "scales": "block", "centroids": "minmax"},
    "int4-minmax": {"id": "int4", "scales": "block", "centroids": "minmax"},
    "int8-minmax": {"id": "int8", "scales": "block", "block": 300, "centroids": "minmax"},
}
VARIANTS = {name: spec for name, spec in SPECS.items() if len(spec) > 1}

# Codecs whose payloads mean nothing without those before them: stored as streams of ``FRAMES`` frames.
STREAMS: dict[str, dict[str, Any]] = {
    f"{codec_id}-history": {"id": codec_id, "scales": "token_history"}
    for codec_id in ("binary", "ternary", "int2", "int4", "int8", "fp8")
}
STREAM_VIEW, STREAM_DTYPE, FRAMES = plain(64 * 128, 1, 128), torch.bfloat16, 3

# Row and channel scales; row scales only; neither; a flat tensor with a tail.
CASES = (
    ((70, 72), torch.float32, "channel_scaled"),
    ((3, 5, 66), torch.float16, "laplace"),
    ((2, 3, 2, 9), torch.bfloat16, "gaussian"),
    ((300,), torch.float32, "student4"),
)


class Case(NamedTuple):
    shape: tuple[int, ...]
    dtype: torch.dtype
    input: Tensor
    payload: Tensor
    decoded: Tensor


class Stream(NamedTuple):
    """``inputs``: a tensor for each frame; ``payloads``: likewise; ``decoded``: what the last frame leaves; ``scales``:
    what both ends remember then.
    """

    inputs: list[Tensor]
    payloads: list[Tensor]
    decoded: Tensor
    scales: Tensor


def write(name: str, folder: Path = FOLDER) -> None:
    """Create ``<name>.npz``.

    Raises:
        FileExistsError: It is there already.
    """
    if name in STREAMS:
        write_stream(name, folder)
        return
    codec = codecs.get(SPECS[name])
    arrays = {}
    for index, (shape, dtype, distribution) in enumerate(CASES):
        x = kit.sample(distribution, shape, dtype, seed=index)
        payload = codec.encode(x)
        arrays[f"{index}_shape"] = np.array(shape)
        arrays[f"{index}_dtype"] = np.array(str(dtype).removeprefix("torch."))
        arrays[f"{index}_input"] = kit.as_bytes(x).numpy()
        arrays[f"{index}_payload"] = payload.numpy()
        arrays[f"{index}_decoded"] = kit.as_bytes(codec.decode(payload, shape, dtype)).numpy()
    with (folder / f"{name}.npz").open("xb") as file:
        np.savez_compressed(file, **arrays)


def load(name: str, folder: Path = FOLDER) -> list[Case]:
    """Read the stored cases of one name."""
    cases = []
    with np.load(folder / f"{name}.npz") as arrays:
        for index in range(len(arrays.files) // 5):
            shape = tuple(arrays[f"{index}_shape"].tolist())
            dtype = getattr(torch, str(arrays[f"{index}_dtype"]))
            tensors = {part: torch.from_numpy(arrays[f"{index}_{part}"]) for part in ("input", "payload", "decoded")}
            cases.append(
                Case(
                    shape,
                    dtype,
                    tensors["input"].view(dtype).reshape(shape),
                    tensors["payload"],
                    tensors["decoded"].view(dtype).reshape(shape),
                )
            )
    return cases


def write_stream(name: str, folder: Path = FOLDER) -> None:
    """``write`` for a stream: inputs are sixteenths, kept as int8, of channels that change from frame to frame."""
    session = codecs.get(STREAMS[name]).open(STREAM_VIEW, STREAM_DTYPE, torch.device("cpu"))
    arrays: dict[str, Any] = {}
    terms: tuple[Tensor, ...] = ()
    for frame in range(FRAMES):
        x = kit.sample("channel_scaled", STREAM_VIEW.shape, seed=frame).view(-1)
        sixteenths = (16 * x).round().clamp(-127, 127).to(torch.int8)
        out = torch.empty(STREAM_VIEW.numel, dtype=STREAM_DTYPE)
        payload = torch.empty(session.payload_nbytes, dtype=torch.uint8)
        session.encode(sixteenths.to(STREAM_DTYPE) / 16, terms, out, payload)
        session.commit()
        terms = (out,)
        arrays |= {f"{frame}_sixteenths": sixteenths.numpy(), f"{frame}_payload": payload.numpy()}
    arrays |= {"decoded": kit.as_bytes(out).numpy(), "scales": session.shared_memory[0].numpy()}
    with (folder / f"{name}.npz").open("xb") as file:
        np.savez_compressed(file, **arrays)


def load_stream(name: str, folder: Path = FOLDER) -> Stream:
    """Read the stored stream of one name."""
    with np.load(folder / f"{name}.npz") as arrays:
        inputs = [torch.from_numpy(arrays[f"{k}_sixteenths"]).to(STREAM_DTYPE) / 16 for k in range(FRAMES)]
        payloads = [torch.from_numpy(arrays[f"{k}_payload"]) for k in range(FRAMES)]
        decoded = torch.from_numpy(arrays["decoded"]).view(STREAM_DTYPE)
        return Stream(inputs, payloads, decoded, torch.from_numpy(arrays["scales"]))


if __name__ == "__main__":
    for wanted in sys.argv[1:]:
        write(wanted)
