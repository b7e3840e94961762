"""What the streams of presets cost in time, and on which links that pays.

    python -m benchmarks.codecs.preset_cost --json benchmarks/results/preset_cost.json

One thread encodes and decodes residuals of [1088, 3072] in bfloat16, all settings in turn; figures are the smallest
milliseconds of both ends together, header and history included. Changes repeat most of the change before, so that order
"auto" predicts from two reconstructions. A preset that codes longer and sends less than another
choice wins below a link speed: the bits saved in a request, over the time that its residuals take longer. Bits of
keyframes are counted, the time of keyframes is not.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from benchmarks.codecs.changing import tensors
from benchmarks.common import check_load, finish, parser
from compactdist import codecs
from compactdist.presets import PRESETS, Preset
from compactdist.state import StreamConfig, StreamDecoder, StreamEncoder, Wanted, plain

ROWS, CHANNELS = 1088, 3072
WARM = 3
"""Frames before any is timed: the keyframe, and those after which order "auto" predicts from two."""
PAIRS = (
    ("small", "binary, int8 keyframe", Preset("binary", "int8"), 28),
    ("tiny", "small", PRESETS["small"], 28),
    ("few-step", "int4, int8 keyframe", Preset("int4", "int8"), 4),
    ("few-step", "int4, int8 keyframe", Preset("int4", "int8"), 8),
)
"""A preset, the choice it is held against, by name and options, and the steps of a request."""


@dataclass
class Ends:
    """A stream's two ends, and the milliseconds that each of its frames took."""

    preset: Preset

    def __post_init__(self) -> None:
        keyframe = codecs.get(self.preset.keyframe)
        coded = None if keyframe.lossless else keyframe
        config = StreamConfig(order=self.preset.order, keyframe=coded, find_layout=False)
        self.codec = codecs.get(self.preset.codec)
        self.sender, self.receiver = StreamEncoder(config, 0, "sender"), StreamDecoder(config, 0, "receiver")
        self.ms: list[float] = []
        self.bits: list[float] = []

    def send(self, x: torch.Tensor, step: int) -> None:
        """Encode and decode a flat tensor."""
        view, start = plain(x.numel(), 1, CHANNELS), time.thread_time()
        staged = self.sender.stage(x, self.codec, Wanted(step=step, hint=view), keyframe=step == 0)
        self.sender.commit(staged)
        self.receiver.decode(staged.frame, self.codec, x.numel(), x.dtype, step=step, hint=view)
        self.ms.append(1e3 * (time.thread_time() - start))
        self.bits.append(8 * staged.frame.numel() / x.numel())

    def request_bits(self, steps: int) -> float:
        """Bits for each element of a request of so many steps."""
        return self.bits[0] + (steps - 1) * self.bits[-1]


def main() -> None:
    """Print the lines, and write them where ``--json`` says."""
    made = parser(__doc__ or "")
    made.add_argument("--frames", type=int, default=12, help="residuals that are timed (default 12)")
    args = made.parse_args()
    check_load(args.max_load)
    torch.set_num_threads(1)
    ends = {name: Ends(preset) for name, preset in PRESETS.items()}
    ends |= {name: Ends(preset) for _, name, preset, _ in PAIRS if name not in PRESETS}
    with torch.no_grad():
        for step, x in enumerate(tensors(ROWS, CHANNELS, WARM + args.frames, steady=0.9)):
            for one in ends.values():
                one.send(x, step)
    rows = {name: {"ms": min(one.ms[WARM:]), "bits_per_element": one.bits[-1]} for name, one in ends.items()}
    for name, row in rows.items():
        print(f"{name}: {row['ms']:.1f} ms, {row['bits_per_element']:.3f} bits")
    wins = []
    for name, other, _, steps in PAIRS:
        saved = (ends[other].request_bits(steps) - ends[name].request_bits(steps)) * ROWS * CHANNELS / 1e6
        longer = (steps - 1) * (rows[name]["ms"] - rows[other]["ms"]) / 1e3
        wins.append({"preset": name, "over": other, "steps": steps, "below_mbit_per_s": saved / longer})
        print(f"{name} wins over {other} in {steps} steps below {saved / longer:.0f} Mbit/s a thread")
    finish(args.json, {"ranks": "none", "threads": 1, "shape": [ROWS, CHANNELS], "rows": rows, "wins": wins})


if __name__ == "__main__":
    main()
