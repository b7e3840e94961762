"""What a history in eight bits costs: steps of both ends of a stream, beside those with an exact state.

    python -m benchmarks.codecs.state_forms --json benchmarks/results/state_forms.json

Frames of [4096, 3072] bfloat16 on a CPU, as a group makes and takes them: a sender encodes and remembers, a receiver
checks, decodes to the user's tensor and remembers. The lines of one codec take turns, frame by frame; medians. Bytes of
state are those of one end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import add_rounds, begin, finish, parser, timed
from compactdist import codecs
from compactdist.codecs import Codec
from compactdist.state import Order, StreamConfig
from compactdist.state.decoder import StreamDecoder
from compactdist.state.encoder import StreamEncoder
from compactdist.state.matrix_view import plain
from compactdist.state.quantized_history import STATE_FORMS, StateForm
from compactdist.state.staged import Staged, Wanted
from compactdist.state.stream import Spares

ROWS, CHANNELS = 4096, 3072
CODECS: tuple[dict[str, Any], ...] = (
    {"id": "binary"},
    {"id": "int2"},
    {"id": "int4"},
    {"id": "int4", "scales": "block"},
    {"id": "int4", "scales": "token_history"},
)


class Stream:
    """Both ends of a stream, and two tensors that it sends in turn."""

    def __init__(self, codec: Codec, state: StateForm, order: Order = 1) -> None:
        config, self.codec = StreamConfig(order, find_layout=False, state=state), codec
        self.sender = StreamEncoder(config, 1, "sender", Spares())
        self.receiver = StreamDecoder(config, 1, "receiver")
        self.view, g = plain(ROWS * CHANNELS, 1, CHANNELS), torch.Generator().manual_seed(0)
        first = torch.randn(self.view.numel, generator=g)
        second = first + 0.1 * torch.randn(self.view.numel, generator=g)
        self.tensors, self.into = [first.bfloat16(), second.bfloat16()], torch.empty_like(first.bfloat16())
        self.step = 0
        for _ in range(3):
            self.send()
            self.receive()

    def send(self) -> None:
        """Make the next frame and remember what it does."""
        x, keyframe = self.tensors[self.step % 2], self.step == 0
        self.staged: Staged = self.sender.stage(
            x, self.codec, Wanted(step=self.step, hint=self.view), keyframe=keyframe
        )
        self.sender.commit(self.staged)

    def receive(self) -> Tensor:
        """Take the frame; the value."""
        x = self.tensors[0]
        value = self.receiver.decode(
            self.staged.frame, self.codec, x.numel(), x.dtype, step=self.step, hint=self.view, into=self.into
        )
        self.step += 1
        return value


def compared(streams: Mapping[Any, Stream], rounds: int) -> dict[Any, dict[str, float]]:
    """Medians of what it takes to send and to receive a frame, by name, and the ratio to the first name's."""
    turns: dict[str, Any] = {}
    for name, stream in streams.items():
        turns |= {f"send {name}": stream.send, f"receive {name}": stream.receive}
    ms = timed(turns, rounds)
    both = {name: ms[f"send {name}"] + ms[f"receive {name}"] for name in streams}
    first = next(iter(both.values()))
    return {
        name: {
            "send_ms": round(ms[f"send {name}"], 2),
            "receive_ms": round(ms[f"receive {name}"], 2),
            "ratio": round(both[name] / first, 2),
        }
        for name in streams
    }


def measure(doc: str, lines: Callable[[int], list[dict[str, Any]]], shown: Callable[[dict[str, Any]], str]) -> None:
    """Measure lines, print them, and write them where ``--json`` says.

    Args:
        doc: of the benchmark.
        lines: measures all of them, in so many frames.
        shown: what is printed of a line.
    """
    made = parser(doc)
    add_rounds(made, 20, "frames")
    args = made.parse_args()
    begin(args)
    with torch.no_grad():
        found = lines(args.rounds)
    for line in found:
        print(shown(line))
    finish(
        args.json,
        {"ranks": "none", "shape": [ROWS, CHANNELS], "threads": args.threads, "rounds": args.rounds, "lines": found},
    )


def _lines(rounds: int) -> list[dict[str, Any]]:
    """Milliseconds and bytes by codec and form of state, and the ratio to an exact state."""
    found = []
    for spec in CODECS:
        streams = {state: Stream(codecs.get(spec), state) for state in STATE_FORMS}
        for state, line in compared(streams, rounds).items():
            about = {"codec": spec["id"], "scales": spec.get("scales", "token_channel"), "state": state}
            found.append({**about, **line, "state_bytes": streams[state].receiver.predictor.held_bytes})
    return found


def _shown(line: dict[str, Any]) -> str:
    return (
        f"{line['codec']:>8} {line['scales']:<14} {line['state']:<6} send {line['send_ms']:7.2f} ms   "
        f"receive {line['receive_ms']:7.2f} ms   {line['ratio']:5.2f} x exact   {line['state_bytes'] / 1e6:5.1f} MB"
    )


if __name__ == "__main__":
    measure(__doc__ or "", _lines, _shown)
