"""What it costs to measure a frame: three sums of squares, beside encoding it. A sender does so under a target.

    python -m benchmarks.codecs.measuring --json benchmarks/results/measuring.json

Tensors of 3072 channels, bfloat16 on a CPU, a prediction from one tensor. ``encode`` is ``int4`` by row and channel,
with its reconstruction; ``measure`` what ``kernels.energies`` runs, ``torch`` the same in torch's operations, as its
reference has it. All take turns; medians.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.common import add_rounds, begin, finish, parser, timed
from compactdist import codecs, kernels
from compactdist.kernels.reference.energies import energies
from compactdist.state.matrix_view import plain

CHANNELS = 3072
ROWS = (1088, 4096)


def _line(rows: int, rounds: int) -> dict[str, Any]:
    view, g = plain(rows * CHANNELS, 1, CHANNELS), torch.Generator().manual_seed(0)
    base = torch.randn(view.numel, generator=g)
    x, base = (base + 0.1 * torch.randn(view.numel, generator=g)).bfloat16(), base.bfloat16()
    session, out = codecs.get("int4").open(view, x.dtype, x.device), torch.empty_like(x)
    payload = torch.empty(session.payload_nbytes, dtype=torch.uint8)
    ms = timed(
        {
            "encode": lambda: session.encode(x, (base,), out, payload),
            "measure": lambda: kernels.energies(x, (base,), out),
            "torch": lambda: energies(x, (base,), out),
        },
        rounds,
    )
    return {"rows": rows, **{f"{name}_ms": round(taken, 2) for name, taken in ms.items()}}


def main() -> None:
    made = parser(__doc__ or "")
    add_rounds(made, 20, "frames")
    args = made.parse_args()
    begin(args)
    lines = [_line(rows, args.rounds) for rows in ROWS]
    for line in lines:
        ms = "   ".join(f"{name} {line[f'{name}_ms']:7.2f} ms" for name in ("encode", "measure", "torch"))
        print(f"[{line['rows']}, {CHANNELS}]  {ms}")
    about = {"ranks": "none", "channels": CHANNELS, "threads": args.threads, "rounds": args.rounds}
    finish(args.json, {**about, "lines": lines})


if __name__ == "__main__":
    main()
