"""K and V (in an all-to-all: Q, K and V) one after the other, all at once, or with all frames in one message.

Two gloo ranks on a link of a given rate and latency (:mod:`benchmarks.link.tunnel`: Linux, as root). Tensors of equal
size, in steady calls of one site each:

* in turn: a call is waited for before the next is made, as by code that sends Q, K and V with a synchronous call each;
* at once: asynchronous calls, then one wait after the other; a coalesced all-gather and a batch of point-to-point
  messages do the same. A tensor is decoded while those after it are under way;
* one: the same calls, with all frames in one inner call: copied behind one another, and out again before they are
  decoded. This exists here only, to be measured.

One group for each way; they are timed in turn, in another order each round. Medians of the slower rank over the rounds,
and each way against "at once" in the same round. ``empty``: milliseconds of a call of 16 bytes of the plain group.

    python -m benchmarks.link.messages [--op all_gather] [--link 100/0 1000/1] [--mb 1 16] [--json FILE]
"""

from __future__ import annotations

import itertools
import random
import statistics
import sys
import time
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist

import compactdist
from benchmarks.common import WORLD_SIZE, check_load, finish, parser, quartiles
from benchmarks.link.tunnel import on_slow_link

CHANNELS, WARMUP = 1024, 3
TENSORS = {"all_gather": 2, "all_to_all": 3}  # K and V; Q, K and V
WAYS = "in turn", "at once", "one"


class _Part:
    """The work of a frame that travels in a message with others."""

    def __init__(self, message: _Message, number: int) -> None:
        self._message, self._number = message, number

    def wait(self) -> bool:
        self._message.wait(self._number)
        return True

    def is_completed(self) -> bool:
        return False


class _Message:
    """The frames of several calls in one inner call between two ranks.

    Args:
        op: the inner call.
        count: calls that share a message; the last of them sends it.
    """

    def __init__(self, op: str, count: int) -> None:
        self._op, self._count = op, count
        self._frames: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._work: Any = None
        self._gathered = torch.empty(0, dtype=torch.uint8)

    def add(self, arrived: torch.Tensor, frame: torch.Tensor, call: Callable[..., Any]) -> _Part:
        self._frames.append((arrived, frame))
        if self.full:
            frames = torch.cat([frame for _, frame in self._frames])
            arriving = WORLD_SIZE * frames.numel() if self._op == "all_gather" else frames.numel()
            self._gathered = torch.empty(arriving, dtype=torch.uint8)
            self._work = call(self._gathered, frames)
        return _Part(self, len(self._frames) - 1)

    @property
    def full(self) -> bool:
        return len(self._frames) == self._count

    @torch.inference_mode()  # as the buffers of frames were made
    def wait(self, number: int) -> None:
        if self._work is not None:
            self._work.wait()
            self._work = None
        sizes = [frame.numel() for _, frame in self._frames]
        start, end = sum(sizes[:number]), sum(sizes[: number + 1])
        arrived = self._frames[number][0]
        if self._op == "all_gather":
            peer = 1 - dist.get_rank()
            arrived.view(WORLD_SIZE, -1)[peer].copy_(self._gathered.view(WORLD_SIZE, -1)[peer, start:end])
        else:
            arrived.copy_(self._gathered[start:end])


def join_frames(group: Any, op: str, count: int) -> None:
    """Let so many calls of a group, one after the other, share one inner call."""
    link, rank = group._engine.link, group._engine.rank
    plain, message = getattr(link, op), _Message(op, count)

    def current() -> _Message:
        nonlocal message
        if message.full:
            message = _Message(op, count)
        return message

    def all_gather(self: Any, arrived: Any, frame: Any, opts: Any) -> Any:
        return current().add(arrived, frame, lambda into, of: plain(into, of, opts))

    def all_to_all(self: Any, arrived: Any, frames: Any, arriving: Any, leaving: Any, opts: Any) -> Any:
        def exchange(into: torch.Tensor, of: torch.Tensor) -> Any:
            n = into.numel()
            return plain(
                into, of, [0 if r == rank else n for r in (0, 1)], [0 if r == rank else n for r in (0, 1)], opts
            )

        return current().add(arrived, frames, exchange)

    setattr(link, op, MethodType({"all_gather": all_gather, "all_to_all": all_to_all}[op], link))


def _send(op: str, group: Any, outputs: list[Any], inputs: list[Any], way: str) -> None:
    call = group.all_gather_into_tensor if op == "all_gather" else group.all_to_all_single
    for work in [call(output, x, async_op=way != "in turn") for output, x in zip(outputs, inputs, strict=True)]:
        if work is not None:
            work.wait()


def _body(rank: int, op: str, codec: str, mb: float, count: int, rounds: int) -> list[list[float]]:
    """For each way: milliseconds of each round on the slower rank; last those of an empty call."""
    groups = {way: compactdist.wrap(dist.group.WORLD, codec, agree="off", find_layout=False) for way in WAYS}
    join_frames(groups["one"], op, count)
    rows = max(2, int(mb * 1e6 / 2 / CHANNELS) // 2 * 2)
    generator = torch.Generator().manual_seed(rank)
    base, change = (torch.randn(count, rows, CHANNELS, generator=generator) for _ in range(2))
    outputs = list(torch.empty(count, (WORLD_SIZE if op == "all_gather" else 1) * rows, CHANNELS, dtype=torch.bfloat16))
    order, times = random.Random(1), {way: [] for way in (*WAYS, "empty")}
    small, smalls = torch.zeros(16, dtype=torch.uint8), list(torch.zeros(WORLD_SIZE, 16, dtype=torch.uint8))
    for step in range(rounds + WARMUP):
        inputs = list((base + 0.1 * step * change).bfloat16())
        for way in (*order.sample(WAYS, len(WAYS)), "empty"):
            if way != "empty":
                groups[way].step()
            dist.barrier()
            start = time.perf_counter()
            if way == "empty":
                dist.all_gather(smalls, small)
            else:
                _send(op, groups[way], outputs, inputs, way)
            if step >= WARMUP:
                times[way].append(1e3 * (time.perf_counter() - start))
    slower = torch.tensor(list(times.values()))
    dist.all_reduce(slower, dist.ReduceOp.MAX)
    made: list[list[float]] = slower.tolist()
    return made


def main() -> int:
    """Print the table."""
    cli = parser(__doc__)
    cli.add_argument("--op", nargs="+", default=[*TENSORS], choices=[*TENSORS])
    cli.add_argument("--link", nargs="+", default=["100/0", "1000/1"], help="Mbit/s, /, milliseconds of latency")
    cli.add_argument("--mb", type=float, nargs="+", default=[1.0, 16.0], help="of one rank's tensor, bfloat16")
    cli.add_argument("--codecs", nargs="+", default=["int8", "int4"])
    cli.add_argument("--rounds", type=int, default=9)
    args = cli.parse_args()
    check_load(args.max_load)
    rows = []
    print(f"{'call':10} {'codec':6} {'MB':>4} {'Mbit/s / ms':>11} {'way':8} {'ms':>8}  of at once (quartiles)")
    for op, codec, mb, link in itertools.product(args.op, args.codecs, args.mb, args.link):
        mbit, latency = map(float, link.split("/"))
        *ways, empty = on_slow_link(mbit, latency, _body, op, codec, mb, TENSORS[op], args.rounds)
        at_once = ways[WAYS.index("at once")]
        for way, of_way in zip(WAYS, ways, strict=True):
            ratio = quartiles([a / b for a, b in zip(of_way, at_once, strict=True)])
            about = {
                "op": op,
                "tensors": TENSORS[op],
                "codec": codec,
                "mb": mb,
                "mbit": mbit,
                "latency_ms": latency,
                "way": way,
            }
            rows.append(about | {"ms": statistics.median(of_way), "empty_ms": statistics.median(empty), "ratio": ratio})
            spread = f"{ratio['median']:.3f} ({ratio['q1']:.3f} to {ratio['q3']:.3f})"
            print(
                f"{op:10} {codec:6} {mb:4g} {link:>11} {way:8} {statistics.median(of_way):8.2f}  {spread}", flush=True
            )
    finish(args.json, {"ranks": "2, gloo, each in a network namespace", "rounds": args.rounds, "results": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
