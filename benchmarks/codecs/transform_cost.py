"""What a step of the transform codec costs, as a whole and in parts, beside what it reads and writes just moved.

    python -m benchmarks.codecs.transform_cost --json benchmarks/results/transform_cost.json

A step is all that both ends do for a frame: encode, decode, and the basis update of each. *Just moved*
(``moving.py``): read tensor and base and write the new base, then read and write the base in place. Rounds follow one
another; figures are medians, as multiples of the median of what was moved. On one thread its own time is taken, which
other processes cannot take away. The tensor's channels are mixed from a few strong directions and many weak ones, as
activations are; *first* is a stream's first frame, where the basis is found in the prediction.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.codecs import moving
from benchmarks.codecs.changing import tensors
from benchmarks.common import add_rounds, begin, finish, parser, timed
from compactdist import codecs
from compactdist.codecs.transform.basis import followed, rows_of
from compactdist.codecs.transform.coding import Frame, Weights, decode, encode
from compactdist.codecs.transform.ends import put_out, residuals
from compactdist.codecs.transform.products import Products, by_blocks
from compactdist.codecs.transform.transform import TransformSession
from compactdist.state import plain

CPU = torch.device("cpu")


def opened(bits: float, trellis: bool, rows: int, channels: int) -> TransformSession:
    """One end of a stream."""
    codec = codecs.get("transform", bits=bits, trellis=trellis)
    session = codec.open(plain(rows * channels, 1, channels), torch.bfloat16, CPU)
    assert isinstance(session, TransformSession)
    return session


def parts_of(session: TransformSession, x: Tensor, base: Tensor, out: Tensor, payload: Tensor) -> dict[str, Any]:
    """The parts of a step of a session that has learnt, as calls without arguments."""
    layout, basis, view = session._layout, session._basis, session.view
    assert basis is not None
    matrices, squares, _ = residuals(x, (base,), view, layout)
    matrices = matrices.clone()
    turned = torch.empty(layout.components, layout.rows, dtype=matrices.dtype)
    rows = rows_of(basis.rows[0])

    def forward() -> None:
        by_blocks(rows.to(matrices.dtype), layout.blocks_of(matrices[0]).mT, layout.components_of(turned))

    forward()
    space = torch.empty(turned.shape, dtype=torch.int8)
    frame: Frame = decode(payload, layout, space)
    weights = Weights.of(rows, frame.spread)
    units, scales = frame.units(weights)[None], frame.rows[None]

    def products() -> Products:
        return Products(frame.levels, weights.whole, frame.spread.counts)

    return {
        "residual": lambda: residuals(x, (base,), view, layout),
        "forward products": forward,
        "scales, levels and planes": lambda: encode(turned, squares[0], 0, layout, space),
        "read planes": lambda: decode(payload, layout, space),
        "weights": lambda: Weights.of(rows, frame.spread),
        "inverse products, put out": lambda: put_out([products()], units, scales, (base,), view, out),
        "evidence": frame.evidence,
        "basis update": lambda: followed(basis.rows[0], basis.energies[0], frame.spread, frame.evidence()),
    }


def measured(rows: int, channels: int, bits: float, trellis: bool, rounds: int) -> dict[str, Any]:
    """One shape at one rate."""
    base, x, y = tensors(rows, channels, 3)
    sender, receiver = (opened(bits, trellis, rows, channels) for _ in range(2))
    payload = torch.empty(sender.payload_nbytes, dtype=torch.uint8)
    held, out, beside = base.clone(), torch.empty_like(x), torch.empty_like(x)

    def first() -> None:
        opened(bits, trellis, rows, channels).encode(x, (base,), out, payload)

    first_ms = timed({"first": first}, 1)["first"]
    for value in (x, y):
        sender.encode(value, (held,), out, payload)
        receiver.decode(payload, (held,), beside)
        for one in (sender, receiver):
            one.commit()
            one.prepare()
        held.copy_(out)
    x, staged = x.clone(), {"frame": torch.empty_like(payload)}

    def update(session: TransformSession) -> None:
        basis, what = session._basis, session._staged
        session.commit()
        session.prepare()
        session._basis, session._staged = basis, what

    steps = {
        "moved": lambda: (moving.move_for_blocks(x, base, out), moving.move_for_decoding(beside)),
        "encode": lambda: sender.encode(x, (base,), out, staged["frame"]),
        "update at the sender": lambda: update(sender),
        "decode": lambda: receiver.decode(staged["frame"], (base,), beside),
        "update at the receiver": lambda: update(receiver),
    }
    ms = timed(steps, rounds)
    parts = timed(parts_of(receiver, x, base, out, staged["frame"]), rounds)
    moved = ms.pop("moved")
    return {
        "shape": [rows, channels],
        "bits": bits,
        "trellis": trellis,
        "chosen": len(sender._read(staged["frame"])[0].spread.block) / sender._layout.components,
        "moved_ms": moved,
        "step": sum(ms.values()) / moved,
        "whole": {name: value / moved for name, value in ms.items()},
        "parts": {name: value / moved for name, value in parts.items()},
        "first": first_ms / moved,
        "held_bytes_of_history": sender.held_bytes / x.nbytes,
    }


def main() -> None:
    """Print the lines, and write them where ``--json`` says."""
    made = parser(__doc__ or "")
    add_rounds(made, 11)
    made.add_argument("--rows", type=int, nargs="+", default=[4096, 1088], help="(default 4096 1088)")
    made.add_argument("--bits", type=float, nargs="+", default=[1.0], help="(default 1)")
    made.add_argument("--trellis", action="store_true", help="choose levels along a trellis")
    args = made.parse_args()
    begin(args)
    lines = [measured(rows, 3072, bits, args.trellis, args.rounds) for rows in args.rows for bits in args.bits]
    for one in lines:
        print(
            f"{one['shape']} {one['bits']} bits: a step {one['step']:.1f} x moved ({one['moved_ms']:.2f} ms), "
            f"{100 * one['chosen']:.0f} % of components, {100 * one['held_bytes_of_history']:.0f} % memory"
        )
        for kind in ("whole", "parts"):
            print(f"  {kind}: " + "  ".join(f"{name} {value:.1f}" for name, value in one[kind].items()))
    finish(args.json, {"ranks": "none", "threads": args.threads, "rounds": args.rounds, "lines": lines})


if __name__ == "__main__":
    main()
