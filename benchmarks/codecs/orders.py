"""What a prediction with a velocity costs: steps of both ends of a stream at orders 2 and "auto", beside order 1.

    python -m benchmarks.codecs.orders --json benchmarks/results/orders.json

Frames of [4096, 3072] bfloat16 on a CPU, as ``state_forms`` makes and takes them. The lines of one codec and state take
turns, frame by frame; medians.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.codecs.state_forms import CHANNELS, ROWS, Stream
from benchmarks.common import add_rounds, begin, finish, parser, timed
from compactdist import codecs
from compactdist.state import Order, StateForm

ORDERS: tuple[Order, ...] = (1, 2, "auto")
SETTINGS: tuple[tuple[str, StateForm], ...] = (
    ("binary", "exact"),
    ("int4", "exact"),
    ("int4", "int8"),
    ("transform:bits=0.4", "exact"),
)
"""Codecs and forms of state."""


def lines(codec: str, state: StateForm, rounds: int) -> list[dict[str, Any]]:
    """The lines of one codec and state: milliseconds by order, and the ratio to order 1."""
    streams = {order: Stream(codecs.get(codec), state, order) for order in ORDERS}
    turns: dict[str, Any] = {}
    for order, stream in streams.items():
        turns |= {f"send {order}": stream.send, f"receive {order}": stream.receive}
    ms = timed(turns, rounds)
    plain = ms["send 1"] + ms["receive 1"]
    return [
        {
            "codec": codec,
            "state": state,
            "order": order,
            "send_ms": round(ms[f"send {order}"], 2),
            "receive_ms": round(ms[f"receive {order}"], 2),
            "ratio": round((ms[f"send {order}"] + ms[f"receive {order}"]) / plain, 2),
        }
        for order in ORDERS
    ]


def main() -> None:
    """Print the lines, and write them where ``--json`` says."""
    made = parser(__doc__ or "")
    add_rounds(made, 20, "frames")
    args = made.parse_args()
    begin(args)
    with torch.no_grad():
        found = [line for setting in SETTINGS for line in lines(*setting, args.rounds)]
    for line in found:
        print(
            f"{line['codec']:<19} {line['state']:<6} order {line['order']:<5} send {line['send_ms']:7.2f} ms   "
            f"receive {line['receive_ms']:7.2f} ms   {line['ratio']:5.2f} x order 1"
        )
    finish(
        args.json,
        {"ranks": "none", "shape": [ROWS, CHANNELS], "threads": args.threads, "rounds": args.rounds, "lines": found},
    )


if __name__ == "__main__":
    main()
