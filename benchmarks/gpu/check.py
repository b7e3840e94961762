"""Is every collective of a wrapped group right, and compressed? On NCCL where there is a GPU, else on NCCL's manners.

    python -m benchmarks.gpu.check
    python -m benchmarks.gpu.check --inner nccl_like --only broadcast

Two ranks make each collective in four steps, on a group over NCCL where a CUDA device exists (two ranks share one GPU
if there is only one: each says that it is another host, so that NCCL takes the network), and otherwise on a CPU over a
group that acts like NCCL (``compactdist.testing.act_like_nccl``). A line says ``right`` if all that arrived is within
the tolerance of what was sent, the ranks sent as many frames as they should, and these were smaller than the tensors.
Frames of the first step are keyframes.
"""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from typing import Any

import torch
import torch.distributed as dist

import compactdist
from benchmarks.common import WORLD_SIZE, finish, on_two_ranks
from benchmarks.gpu.collectives import CALLS, Run
from benchmarks.gpu.common import apart, card, parser
from compactdist.testing import act_like_nccl

STEPS = 4
TOLERANCE = {"raw": 0.0, "int8": 0.02, "int4": 0.2, "int2": 0.5}
"""By codec: the largest relative error (of norms) of a step."""


def inner_group(inner: str, rank: int) -> tuple[Any, torch.device]:
    """The inner group and the device of its tensors."""
    if inner == "nccl_like":
        return act_like_nccl(dist.group.WORLD), torch.device("cpu")
    device = torch.device("cuda", rank % torch.cuda.device_count())
    if torch.cuda.device_count() < dist.get_world_size():
        os.environ.update(apart(rank))
    torch.cuda.set_device(device)
    return dist.new_group(backend="nccl"), device


def checked(run: Run, name: str, tolerance: float) -> dict[str, Any]:
    """One line of the table, as this rank sees it."""
    made, frames = CALLS[name]
    group, line = run.group, {"call": name, "frames_expected": frames * STEPS, "errors": [], "raised": ""}
    group.reset()
    group.reset_stats()
    try:
        for run.step in range(STEPS):
            group.step()
            got, expected = (tensor.float() for tensor in made(run))
            line["errors"].append(float((got - expected).norm() / expected.norm()))
    except Exception as error:
        traceback.print_exc()
        line["raised"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    stats = group.stats()
    line |= {"frames": stats.compressed_calls, "wire_bytes": stats.wire_bytes, "raw_bytes": stats.raw_bytes}
    close = len(line["errors"]) == STEPS and all(error <= tolerance for error in line["errors"])  # NaN is not
    framed = line["frames"] == line["frames_expected"]
    smaller = not frames or stats.wire_bytes < stats.raw_bytes or stats.raw_bytes == 0  # a broadcast's receiver
    line["right"] = close and framed and smaller and not line["raised"]
    return line


def body(rank: int, inner: str, codec: str, names: list[str]) -> list[list[dict[str, Any]]]:
    """Every call on this rank; returns the lines of all ranks."""
    warnings.simplefilter("ignore", FutureWarning)  # every torch deprecates some names that its users still have
    plain, device = inner_group(inner, rank)
    group = compactdist.wrap(plain, codec, min_numel=64)
    lines = [checked(Run(group, rank, device), name, TOLERANCE[codec]) for name in names]
    group.close()
    of_all: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_all, lines)
    return of_all


def show(line: dict[str, Any]) -> None:
    """Print one line of the table."""
    said = line["raised"] or f"largest error {max(line['errors']):.4f}"
    frames = f"{line['frames']} frames" + ("" if line["frames"] == line["frames_expected"] else " MISSING")
    verdict = "right" if line["right"] else "WRONG"
    print(f"{verdict}  {line['call']:42} {frames:10} {line['raw_bytes']:9} -> {line['wire_bytes']:8} bytes  {said}")


def main() -> None:
    made = parser(__doc__ or "")
    made.add_argument("--inner", choices=("nccl", "nccl_like"), help="default: nccl where there is a CUDA device")
    made.add_argument("--codec", choices=list(TOLERANCE), default="int8")
    made.add_argument("--only", nargs="+", choices=list(CALLS), default=list(CALLS), metavar="CALL")
    args = made.parse_args()
    there_is = torch.cuda.is_available() and dist.is_nccl_available()
    inner = args.inner or ("nccl" if there_is else "nccl_like")
    if inner == "nccl" and not there_is:
        sys.exit("no CUDA device, or a torch without NCCL: --inner nccl_like checks on a CPU")
    ranks = on_two_ranks(body, inner, args.codec, args.only)
    # of each call the line of a rank where it is wrong, or else of the one that sent most
    lines = [min(both, key=lambda line: (line["right"], -line["wire_bytes"])) for both in zip(*ranks, strict=True)]
    print(f"{STEPS} steps of each collective on two ranks over {inner}, codec {args.codec}, torch {torch.__version__}")
    for line in lines:
        show(line)
    finish(
        args.json, {**card(), "ranks": f"{WORLD_SIZE}, {inner}", "inner": inner, "codec": args.codec, "lines": lines}
    )
    wrong = [line["call"] for line in lines if not line["right"]]
    if wrong:
        sys.exit(f"{len(wrong)} of {len(lines)} wrong: {', '.join(wrong)}")
    print(f"all {len(lines)} right")


if __name__ == "__main__":
    main()
