"""What the checksum of a payload costs beside the steps that make and read the payload.

    python -m benchmarks.codecs.checksum --json benchmarks/results/checksum.json

A sender sums up the payload while it makes it, or right after; a receiver before it decodes, over the history and into
the user's tensor at once. For each codec, at [4096, 3072] bfloat16, medians of rounds in which the steps follow one
another: encode, decode, and both with checksum. *Share* is what checksums add to encode and decode, over encode and
decode. A raw keyframe is summed up while it is copied, by both ends; its share is what that takes longer than a plain
copy, over the plain copy.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.common import add_rounds, begin, finish, parser, timed
from compactdist import codecs, kernels
from compactdist.codecs.base import Session
from compactdist.kernels.cpu import call
from compactdist.state import plain

CPU = torch.device("cpu")
ROWS, CHANNELS = 4096, 3072
CODECS = ("binary", "int2", "int4", "int8")


def _session(codec_id: str, scales: str, *, sums: bool) -> Session:
    """One end of a stream, whose encoder sums up its codes if it can, or never."""
    session = codecs.get(codec_id, scales=scales).open(plain(ROWS * CHANNELS, 1, CHANNELS), torch.bfloat16, CPU)
    x = torch.randn(session.view.numel).bfloat16()
    session.encode(x, (x,), None, torch.empty(session.payload_nbytes, dtype=torch.uint8))
    if not sums:
        session._steps._encoders[True].slots[call.ROW_WORDS] = 0  # type: ignore[attr-defined]
    return session


def line(codec_id: str, scales: str, rounds: int) -> dict[str, Any]:
    """One codec: milliseconds of its steps and of the checksum."""
    session, bare = _session(codec_id, scales, sums=True), _session(codec_id, scales, sums=False)
    x, base, history = torch.randn(3, session.view.numel).bfloat16()
    out, users = torch.empty_like(x), torch.empty_like(x)
    payload = torch.empty(session.payload_nbytes, dtype=torch.uint8)
    checksum = kernels.checksum_for(session.payload_nbytes, CPU)

    def encode_and_sum() -> int:
        session.encode(x, (base,), out, payload)
        return checksum(payload) if session.checksum is None else session.checksum

    def sum_and_decode() -> int:
        summed = checksum(payload)
        session.decode_twice(payload, (history,), history, users)
        return summed

    ms = timed(
        {
            "encode": lambda: bare.encode(x, (base,), out, payload),
            "decode": lambda: bare.decode_twice(payload, (history,), history, users),
            "encode with checksum": encode_and_sum,
            "decode with checksum": sum_and_decode,
        },
        rounds,
    )
    added = ms["encode with checksum"] - ms["encode"] + ms["decode with checksum"] - ms["decode"]
    return {"codec": codec_id, "scales": scales, "ms": ms, "share": added / (ms["encode"] + ms["decode"])}


def raw_keyframe(rounds: int) -> dict[str, Any]:
    """A tensor's own bytes: milliseconds of a copy, and of one that sums up what it copies."""
    x = torch.randn(ROWS * CHANNELS).bfloat16().view(torch.uint8)
    copy = torch.empty_like(x)
    checksum = kernels.checksum_for(x.numel(), x.device)
    ms = timed({"copy": lambda: copy.copy_(x), "copy with checksum": lambda: checksum(x, copy)}, rounds)
    share = ms["copy with checksum"] / ms["copy"] - 1
    return {"codec": "raw keyframe", "scales": "", "ms": ms, "share": share}


def main() -> None:
    """Print the lines, and write them where ``--json`` says."""
    made = parser(__doc__ or "")
    add_rounds(made, 16)
    args = made.parse_args()
    begin(args)
    lines = [line(codec, scales, args.rounds) for codec in CODECS for scales in ("token_channel", "block")]
    lines.append(raw_keyframe(args.rounds))
    for one in lines:
        steps = "  ".join(f"{name} {value:.3f} ms" for name, value in one["ms"].items())
        print(f"{one['codec']:>12} {one['scales']:<14} share {100 * one['share']:5.1f} %   {steps}")
    finish(
        args.json,
        {"ranks": "none", "shape": [ROWS, CHANNELS], "threads": args.threads, "rounds": args.rounds, "lines": lines},
    )


if __name__ == "__main__":
    main()
