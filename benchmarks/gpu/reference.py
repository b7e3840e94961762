"""Our codecs beside CompactFusion's recipe, on one card in one run: time of a step, and error in the closed loop.

    python -m benchmarks.gpu.reference --json benchmarks/results/gpu_reference.json
    python -m benchmarks.gpu.reference --device cpu --shapes 64x96 --steps 4 --backend aot_eager

The recipe is re-written from its formulas (``reference_steps.py``), so that this needs nothing of theirs: as it is
("eager"), and through ``torch.compile`` ("compiled"). Both encode from x and base to payload and new base, and decode
from payload and base to new base. Ours do so too: quantizers by the kernels of a stream, low rank by its session,
which searches from where the last step ended ("warm") or anew ("cold"). Tensors are float16.

    kernel us   sum over the kernels of a step (torch.profiler)
    graph us    the step replayed from a CUDA graph, "-" where it cannot be captured
    host us     to launch it, without a graph

White: every element changes by a tenth of its spread in each step, independently. Drift: changes in 64 slowly turning
directions over channels of different strength, a fifth of the tensor's size in each step, and a little noise. Error:
that of the receiver, of norms, the mean over the steps.

On a CPU "host us" is the time of the step, and the other two are not there.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu import checks
from benchmarks.gpu.common import (
    EXIT_WITHOUT_GPU,
    Clock,
    cell,
    graph_of,
    host_us,
    lines_of,
    parser,
    profiled,
    settle,
    table,
)
from benchmarks.gpu.reference_steps import RANK, RECIPES
from compactdist import codecs
from compactdist.state.matrix_view import plain

DTYPE = torch.float16
OURS = {
    "binary ours": {"id": "binary"},
    "binary ours block": {"id": "binary", "scales": "block"},
    "int2 ours": {"id": "int2"},
    "int2 ours block": {"id": "int2", "scales": "block"},
    "lowrank_int4 ours cold": {"id": "lowrank_int4", "rank": RANK},
    "lowrank_int4 ours warm": {"id": "lowrank_int4", "rank": RANK},
}
NAMES = [
    *(f"binary {kind}" for kind in ("eager", "compiled", "ours", "ours block")),
    *(f"int2 {kind}" for kind in ("eager", "compiled", "ours", "ours block")),
    *(f"lowrank_int4 {kind}" for kind in ("eager", "compiled", "ours cold", "ours warm")),
]
STREAMS = ("white", "drift")
DIRECTIONS, TURN = 64, 0.2
PROFILED = 10
"""Runs of a step under the profiler."""


class Ends(NamedTuple):
    """Both ends of a stream: ``encode(x, base) -> (payload, new base)`` and ``decode(payload, base) -> new base``.

    What is returned may be overwritten by the next call.
    """

    encode: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    decode: Callable[[Tensor, Tensor], Tensor]


def ends_of(name: str, shape: tuple[int, int], device: torch.device, backend: str) -> Ends:
    """The ends of one line of the table, for tensors of this shape."""
    codec_id, kind = name.split(" ", 1)
    if kind == "eager":
        return Ends(RECIPES[codec_id].encode, RECIPES[codec_id].decode)
    if kind == "compiled":
        recipe = RECIPES[codec_id].compiled(backend)
        return Ends(recipe.encode, recipe.decode)
    return _ours(codecs.get(OURS[name]), shape, device, cold=kind.endswith("cold"))


def _ours(codec: Any, shape: tuple[int, int], device: torch.device, *, cold: bool) -> Ends:
    view = plain(shape[0] * shape[1], 1, shape[1])
    sender, receiver = (codec.open(view, DTYPE, device) for _ in range(2))
    payload = torch.empty(sender.payload_nbytes, dtype=torch.uint8, device=device)
    sent, got = torch.empty(shape, dtype=DTYPE, device=device), torch.empty(shape, dtype=DTYPE, device=device)
    fused = None
    if device.type == "cuda" and getattr(codec, "spec", None) is not None:
        fused = checks.gpu_kernels().steps_of(codec.spec, view, DTYPE, device)
        flag = torch.zeros(1, dtype=torch.int32, device=device)

    def encode(x: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
        if fused is not None:
            fused.encode(x.view(-1), (base.view(-1),), sent.view(-1), payload, flag=flag)
        else:
            sender.encode(x.view(-1), (base.view(-1),), sent.view(-1), payload)
            sender.rollback() if cold else sender.commit()
        return payload, sent

    def decode(data: Tensor, base: Tensor) -> Tensor:
        if fused is not None:
            fused.decode(data, (base.view(-1),), got.view(-1))
        else:
            receiver.decode(data, (base.view(-1),), got.view(-1))
            receiver.commit()
        return got

    return Ends(encode, decode)


def stream(kind: str, shape: tuple[int, int], steps: int, device: torch.device) -> Iterator[Tensor]:
    """The values of a stream, one more than steps, in float16."""
    g = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=g, device=device)

    x = normal(*shape)
    if kind == "white":
        yield x.to(DTYPE)
        for _ in range(steps):
            x += 0.1 * normal(*shape)
            yield x.to(DTYPE)
        return
    channels = torch.exp(0.5 * normal(shape[1]))
    left, right = normal(shape[0], DIRECTIONS), normal(shape[1], DIRECTIONS)
    strength = 0.97 ** torch.arange(DIRECTIONS, device=device)
    strength = 0.2 * strength / strength.norm()
    x *= channels
    yield x.to(DTYPE)
    for _ in range(steps):
        left = (1 - TURN**2) ** 0.5 * left + TURN * normal(*left.shape)
        right = (1 - TURN**2) ** 0.5 * right + TURN * normal(*right.shape)
        x += channels * (left * strength @ right.T + 0.03 * normal(*shape))
        yield x.to(DTYPE)


def error_of(ends: Ends, values: Iterator[Tensor]) -> tuple[float, bool]:
    """The receiver's mean relative error, and whether both ends held the same bits all along."""
    at_sender = at_receiver = next(values)
    errors, equal = [], True
    for x in values:
        payload, new = ends.encode(x, at_sender)
        at_receiver = ends.decode(payload, at_receiver).clone()
        at_sender = new.clone()
        equal = equal and torch.equal(at_sender, at_receiver)
        errors.append(float((at_receiver.float() - x.float()).norm() / x.float().norm()))
    return statistics.fmean(errors), equal


def times_of(work: Callable[[], Any], clock: Clock) -> dict[str, Any]:
    """Microseconds of one direction, and its launches; what there is not is ``None``."""
    for _ in range(3):
        work()
    if not clock.on_gpu:
        return {
            "kernel_us": None,
            "launches": None,
            "graph_us": None,
            "us": (taken := clock.us(work)),
            "host_us": taken,
        }
    counts = profiled(lambda: [work() for _ in range(PROFILED)])
    assert counts is not None
    found: dict[str, Any] = {"kernel_us": counts.kernel_us / PROFILED, "launches": counts.launches / PROFILED}
    found |= {"us": clock.us(work), "host_us": host_us(work)}
    try:
        graph = graph_of(work)
        found["graph_us"] = clock.us(graph.replay)
    except RuntimeError as error:  # a codec that asks the device for a number cannot be captured
        torch.cuda.synchronize()
        found |= {"graph_us": None, "no_graph": str(error).splitlines()[0]}
    return found


def measured(name: str, shape: tuple[int, int], args: Any, clock: Clock) -> dict[str, Any]:
    """One line: sizes, times and errors."""
    device = torch.device(args.device)
    ends = ends_of(name, shape, device, args.backend)
    base, x = stream("white", shape, 1, device)
    payload = ends.encode(x, base)[0].clone()
    line: dict[str, Any] = {"method": name, "shape": list(shape), "payload_bytes": payload.nbytes}
    for kind in STREAMS:
        # a session remembers, so each stream has its own
        one = ends_of(name, shape, device, args.backend) if name in OURS else ends
        error, equal = error_of(one, stream(kind, shape, args.steps, device))
        line |= {f"{kind}_error": error, f"{kind}_ends_equal": equal}
    for direction, work in (("encode", lambda: ends.encode(x, base)), ("decode", lambda: ends.decode(payload, base))):
        line |= {f"{direction}_{key}": value for key, value in times_of(work, clock).items()}
    return line


def shown(lines: list[dict[str, Any]]) -> str:
    """The table."""
    head = ["us", "enc: kernel", "graph", "host", "dec: kernel", "graph", "host", "launches", *STREAMS]
    keys = [f"{way}_{what}_us" for way in ("encode", "decode") for what in ("kernel", "graph", "host")]
    rows = []
    for line in lines:
        cells = [cell(line.get(key), 1 if (line.get(key) or 1000) < 100 else 0) for key in keys]
        errors = [cell(line.get(f"{kind}_error"), 4) for kind in STREAMS]
        rows.append([line["name"], *cells, cell(line.get("encode_launches")), *errors])
    return table(head, rows)


def _shape(text: str) -> tuple[int, int]:
    rows, channels = map(int, text.split("x"))
    return rows, channels


def main() -> None:
    made = parser(__doc__ or "")
    made.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    made.add_argument("--shapes", nargs="+", type=_shape, default=[(1088, 3072), (4352, 3072)], metavar="ROWSxCHANNELS")
    made.add_argument("--steps", type=int, default=28, help="of the closed loops (default 28)")
    made.add_argument("--rounds", type=int, default=20, help="samples of each time (default 20)")
    made.add_argument("--backend", default="inductor", help="of torch.compile (default inductor)")
    made.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, metavar="METHOD")
    args = made.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device: nothing was measured (--device cpu measures without one)")
        sys.exit(EXIT_WITHOUT_GPU)
    clock = Clock(args.rounds, args.device)
    named = {f"{name} {rows}": (name, (rows, c)) for rows, c in args.shapes for name in args.only}
    lines = lines_of(named, lambda name: measured(*named[name], args, clock))
    shapes = ", ".join(f"[{rows}, {channels}]" for rows, channels in args.shapes)
    print(f"float16 {shapes}, {args.device}; microseconds of a step, and errors over {args.steps} steps")
    print(shown(lines))
    about = {"device": args.device, "steps": args.steps, "backend": args.backend, "dtype": "float16"}
    settle(args.json, {**about, "lines": lines}, lines)


if __name__ == "__main__":
    main()
