"""What a history in eight bits costs: steps of both ends of a stream, beside those with an exact state.

    python -m benchmarks.codecs.state_forms --json benchmarks/results/state_forms.json

Frames of [4096, 3072] bfloat16 on a CPU, as a group makes and takes them: a sender encodes and remembers, a receiver
checks, decodes to the user's tensor and remembers. The lines of one codec take turns, frame by frame; medians. Bytes of
state are those of one end.
"""

from __future__ import annotations

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
from compactdist.state.stream import Spares, Staged

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
        self.staged: Staged = self.sender.stage(x, self.codec, keyframe=keyframe, step=self.step, hint=self.view)
        self.sender.commit(self.staged)

    def receive(self) -> Tensor:
        """Take the frame; the value."""
        x = self.tensors[0]
        value = self.receiver.decode(
            self.staged.frame, self.codec, x.numel(), x.dtype, step=self.step, hint=self.view, into=self.into
        )
        self.step += 1
        return value


def lines(spec: dict[str, Any], rounds: int) -> list[dict[str, Any]]:
    """The lines of one codec: milliseconds and bytes by form of state, and the ratio to an exact state."""
    streams = {state: Stream(codecs.get(spec), state) for state in STATE_FORMS}
    turns: dict[str, Any] = {}
    for state, stream in streams.items():
        turns |= {f"send {state}": stream.send, f"receive {state}": stream.receive}
    ms = timed(turns, rounds)
    exact = ms["send exact"] + ms["receive exact"]
    return [
        {
            "codec": spec["id"],
            "scales": spec.get("scales", "token_channel"),
            "state": state,
            "send_ms": round(ms[f"send {state}"], 2),
            "receive_ms": round(ms[f"receive {state}"], 2),
            "ratio": round((ms[f"send {state}"] + ms[f"receive {state}"]) / exact, 2),
            "state_bytes": stream.receiver.predictor.held_bytes,
        }
        for state, stream in streams.items()
    ]


def main() -> None:
    """Print the lines, and write them where ``--json`` says."""
    made = parser(__doc__ or "")
    add_rounds(made, 20, "frames")
    args = made.parse_args()
    begin(args)
    with torch.no_grad():
        found = [line for spec in CODECS for line in lines(spec, args.rounds)]
    for line in found:
        print(
            f"{line['codec']:>8} {line['scales']:<14} {line['state']:<6} send {line['send_ms']:7.2f} ms   "
            f"receive {line['receive_ms']:7.2f} ms   {line['ratio']:5.2f} x exact   {line['state_bytes'] / 1e6:5.1f} MB"
        )
    finish(
        args.json,
        {"ranks": "none", "shape": [ROWS, CHANNELS], "threads": args.threads, "rounds": args.rounds, "lines": found},
    )


if __name__ == "__main__":
    main()
