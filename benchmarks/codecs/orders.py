"""What a prediction with a velocity costs: steps of both ends of a stream at orders 2 and "auto", beside order 1.

    python -m benchmarks.codecs.orders --json benchmarks/results/orders.json

Frames of [4096, 3072] bfloat16 on a CPU, as ``state_forms`` makes and takes them. The lines of one codec and state take
turns, frame by frame; medians.
"""

from __future__ import annotations

from typing import Any

from benchmarks.codecs.state_forms import Stream, compared, measure
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


def _lines(rounds: int) -> list[dict[str, Any]]:
    """Milliseconds by codec, state and order, and the ratio to order 1."""
    found = []
    for codec, state in SETTINGS:
        streams = {order: Stream(codecs.get(codec), state, order) for order in ORDERS}
        for order, line in compared(streams, rounds).items():
            found.append({"codec": codec, "state": state, "order": order, **line})
    return found


def _shown(line: dict[str, Any]) -> str:
    return (
        f"{line['codec']:<19} {line['state']:<6} order {line['order']:<5} send {line['send_ms']:7.2f} ms   "
        f"receive {line['receive_ms']:7.2f} ms   {line['ratio']:5.2f} x order 1"
    )


if __name__ == "__main__":
    measure(__doc__ or "", _lines, _shown)
