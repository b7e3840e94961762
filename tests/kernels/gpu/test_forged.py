"""Frames whose checksums are right and whose header or payload says what no sender would say here."""

from __future__ import annotations

import random
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from compactdist import wire
from compactdist.errors import CompactDistError
from compactdist.kernels import checksum_for, use
from tests.kernels.gpu import kit
from tests.kernels.gpu.test_frames import Stream
from tests.kernels.gpu.test_rates import LADDER, Steered
from tests.quick import quick_rows

HARMLESS = {"next_rate", "next_kind", "checksum", "digest", "shape", "dtype"}
"""Fields that a frame may say otherwise (the announcements), or that sealing sets."""
BEHIND = 64


@pytest.fixture(autouse=True)
def _kernels_of_the_device():
    with use("gpu"):
        yield


def _forged(frame: Tensor, draw: random.Random, name: str) -> tuple[Tensor, bool]:
    """The frame with another value in one field, its payload too every other time; and whether it must be refused."""
    forged = frame.clone()
    header = wire.unpack(forged, "a test")
    payload = wire.payload_of(forged, header)
    if draw.random() < 0.5:
        payload.copy_(torch.tensor([draw.randrange(256) for _ in range(payload.numel())], dtype=torch.uint8))
    now: Any = getattr(header, name)
    values = [value for value in (0, 1, 2, 3, 5, 16, 255) if value != now]  # a restart is a frame that a host takes
    said: Any = draw.choice([0.5, -1.0, float("inf"), 0.03]) if isinstance(now, float) else draw.choice(values)
    changed = replace(header, **{name: said, "checksum": checksum_for(payload.numel(), payload.device)(payload)})
    wire.seal(forged, changed)
    return forged, name not in HARMLESS


@pytest.mark.parametrize(
    ("codec", "foreseen"),
    quick_rows(
        [("topk_int4:m=5", True)],
        [
            ("topk_int4:m=5", True),
            ("topk_int4:m=5", False),
            ("int4", True),
            ("int2:scales=token_history", False),
            (LADDER, True),
        ],
    ),
)
def test_a_forged_frame_moves_nothing_and_writes_nowhere_else(codec, foreseen):
    draw, refused = random.Random(str(codec)), 0
    names = [field.name for field in fields(wire.Header) if field.name not in ("shape", "dtype", "checksum", "digest")]
    for number, name in enumerate(names):
        stream = Steered("bits=3", codec) if codec == LADDER else Stream(codec)
        step = 2 + number % 2
        for before in range(step):
            stream.receive(before, stream.send(before))
            stream.decoder.read_announcement()
        frame, must_be_refused = _forged(stream.send(step, kept=False), draw, name)
        memory = torch.full((stream.view.numel + 2 * BEHIND,), 7.0, dtype=torch.bfloat16, device=kit.DEVICE)
        into, held = memory[BEHIND:-BEHIND], [kit.raw(tensor) for tensor in stream.decoder.predictor.held]
        error = None
        try:
            stream.receive(step, frame, foreseen=foreseen, into=into)
            stream.decoder.read_announcement()
            stream.boards[1].poll(wait=True)
        except CompactDistError as raised:
            error = raised
        assert (memory[:BEHIND] == 7).all(), name
        assert (memory[-BEHIND:] == 7).all(), name
        if must_be_refused:
            assert error is not None, name
            assert into.isnan().all() if foreseen else (into == 7).all(), name
            assert all(map(torch.equal, held, map(kit.raw, stream.decoder.predictor.held))), name
            refused += 1
    assert refused > 15
