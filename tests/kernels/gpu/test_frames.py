"""Frames that the device seals and checks: they are the host's to the byte, and a wrong one is noticed."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from compactdist import codecs, wire
from compactdist.errors import ConfigError, FrameError, NonFiniteError
from compactdist.kernels import use
from compactdist.state.board import Board
from compactdist.state.decoder import StreamDecoder
from compactdist.state.encoder import StreamEncoder
from compactdist.state.matrix_view import plain
from compactdist.state.quantized_history import make_predictor
from compactdist.state.staged import Wanted
from compactdist.state.stream import Spares
from compactdist.state.stream_config import StreamConfig
from compactdist.wire import HEADER_NBYTES
from tests.kernels.gpu import kit
from tests.kernels.gpu.conftest import INTERPRETED
from tests.kernels.gpu.test_host_reads import NoReads

NUMEL, CHANNELS, STEPS = 7 * 64, 64, 5
VIEW = plain(NUMEL, 1, CHANNELS)
SMALL = plain(9 * 8, 1, 8)
"""Enough for a codec whose kernels the interpreter takes seconds for."""
ON_A_TRELLIS = "transform:block=8,bits=2,trellis=true"
PADDING = 32


class Stream:
    """Both ends of a stream, each with a board of its own."""

    def __init__(self, codec: Any = "int4", device: torch.device = kit.DEVICE, **options: Any) -> None:
        config = StreamConfig(**{"find_layout": False, **options})
        self.codec = codecs.get(codec)
        self.view = SMALL if self.codec.codec_id == "transform" else VIEW
        self.device = device
        self.boards = Board(), Board()
        self.encoder = StreamEncoder(config, 1234, "the sender", Spares(), board=self.boards[0])
        self.decoder = StreamDecoder(config, 1234, "the receiver", board=self.boards[1])
        self.generator = torch.Generator().manual_seed(0)
        self.base = torch.randn(self.view.numel, generator=self.generator)

    def x(self) -> Tensor:
        change = 0.1 * torch.randn(self.view.numel, generator=self.generator)
        return (self.base + change).bfloat16().to(self.device)

    def send(
        self, step: int, x: Tensor | None = None, *, kept: bool = True, key: bool | None = None, **options: Any
    ) -> Tensor:
        x, key = self.x() if x is None else x, step == 0 if key is None else key
        sized = self.encoder.frame_nbytes(self.codec, x.numel(), x.dtype, keyframe=key, hint=self.view)
        told = {"step": step, "epoch": 0, "frame_nbytes": sized + PADDING, "hint": self.view, "foreseen": True}
        staged, failure = self.encoder.stage_or_flag(x, self.codec, Wanted(**told, **options), keyframe=key)
        assert failure is None
        assert staged.on_device == (self.there and not options)
        if kept:
            self.encoder.commit(staged)
        else:
            self.encoder.withdraw(staged)
        return staged.frame

    def receive(
        self,
        step: int,
        frame: Tensor,
        *,
        foreseen: bool = True,
        into: Tensor | None = None,
        key: bool | None = None,
    ) -> Tensor:
        return self.decoder.decode(
            frame, self.codec, self.view.numel, torch.bfloat16, step=step, epoch=0, hint=self.view,
            foreseen=foreseen, keyframe=foreseen and (step == 0 if key is None else key), devices_take_keyframes=True,
            into=into,
        )  # fmt: skip

    @property
    def there(self) -> bool:
        from compactdist.kernels import frames_for

        return frames_for(self.device) is not None

    def both_are_silent(self) -> None:
        for board in self.boards:
            board.poll(wait=True)

    def ends_are_equal(self) -> bool:
        ours, theirs = self.encoder.predictor.held, self.decoder.predictor.held
        same = all(torch.equal(kit.raw(a), kit.raw(b)) for a, b in zip(ours, theirs, strict=True))
        return same and self.encoder.known_digest() == self.decoder.known_digest()


@pytest.fixture(autouse=True)
def _kernels_of_the_device():
    with use("gpu"):
        yield


def _run(stream: Stream) -> list[tuple[Tensor, Tensor]]:
    seen = []
    for step in range(STEPS):
        frame = stream.send(step)
        seen.append((kit.raw(frame), kit.raw(stream.receive(step, frame))))
    stream.both_are_silent()
    assert stream.ends_are_equal()
    return seen


@pytest.mark.parametrize("codec", ["binary", "int2", "int8:scales=block", "int4", "fp8"])
@pytest.mark.parametrize(
    "options",
    [{}, {"order": 2}, {"order": "auto"}, {"state": "int8"}],
    ids=["last", "velocity", "a share of the change", "int8 history"],
)
def test_frames_are_those_that_the_host_makes(codec, options):
    _same_as_on_the_host(codec, options)


@pytest.mark.parametrize("codec", ["topk", "topk_int4:m=5"])
def test_frames_of_other_codecs_are_those_that_the_host_makes(codec):
    _same_as_on_the_host(codec, {"order": 2})
    _same_as_on_the_host(codec, {"order": "auto"})


@pytest.mark.parametrize("codec", ["transform:block=8", ON_A_TRELLIS])
@pytest.mark.parametrize("order", [2, "auto"])
def test_a_host_reads_frames_whose_sums_a_device_has_made(codec, order):
    """Such a sender's sums are in another order than a host's, so frames may differ; each is read alike."""
    ends = Stream(codec, order=order), Stream(codec, torch.device("cpu"), order=order)
    for step in range(STEPS):
        frames = [end.send(step) for end in ends]
        values = [ends[0].receive(step, frames[0])]
        with use("reference"):
            values.append(ends[1].receive(step, frames[0].cpu()))
        assert torch.equal(kit.raw(values[0]), kit.raw(values[1]))
        assert len(frames[0]) == len(frames[1])
    ends[0].both_are_silent()
    assert ends[0].ends_are_equal()


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU benchmarks.gpu.host counts what waits")
@pytest.mark.parametrize(
    ("codec", "order"),
    [*((codec, 1) for codec in ("int4", "topk", "topk_int4", "transform:block=8", ON_A_TRELLIS)), ("binary", "auto")],
)
def test_both_ends_of_a_steady_frame_read_nothing(codec, order):
    stream = Stream(codec, order=order)
    x = [stream.x() for _ in range(5)]
    with pytest.MonkeyPatch.context() as patch, NoReads(patch) as reads:
        for step in range(5):
            reads.armed = step > 2  # the step before makes tables
            value = stream.receive(step, stream.send(step, x[step]))
            reads.armed = False
    assert (value - x[4]).abs().max() < 1
    stream.both_are_silent()
    assert stream.ends_are_equal()


@pytest.mark.parametrize("codec", ["topk_int4", "transform:block=8"])
def test_a_damaged_frame_of_another_codec_is_not_applied_and_its_output_is_nan(codec):
    stream = Stream(codec)
    out = torch.zeros(stream.view.numel, dtype=torch.bfloat16, device=kit.DEVICE)
    for step in range(3):
        stream.receive(step, stream.send(step), into=out)
    assert stream.ends_are_equal()
    assert torch.equal(out, stream.decoder.predictor.base)
    before, frame = kit.raw(out), stream.send(3)
    frame[HEADER_NBYTES + 40] ^= 1
    stream.receive(3, frame, into=out)
    assert out.isnan().all()
    assert torch.equal(kit.raw(stream.decoder.predictor.base), before)
    with pytest.raises(FrameError, match=r"the receiver: wrong checksum"):
        stream.boards[1].poll(wait=True)


def _same_as_on_the_host(codec, options):
    got = _run(Stream(codec, **options))
    with use("reference"):
        expected = _run(Stream(codec, torch.device("cpu"), **options))
    for (frame, value), (host_frame, host_value) in zip(got, expected, strict=True):
        assert torch.equal(frame, host_frame)
        assert torch.equal(value, host_value)


def _with_coefficient(frame: Tensor, value: float) -> Tensor:
    """The frame, its header saying this coefficient and right in all else."""
    header = wire.unpack(frame, "test")
    return wire.pack(replace(header, coefficient=value), wire.payload_of(frame, header), frame.numel())


@pytest.mark.parametrize("value", [math.nan, math.inf, 1.0625, -2.0, 0.03])
def test_a_coefficient_that_no_sender_chooses_is_refused_on_the_device(value):
    stream = Stream("int8", order="auto")
    for step in range(3):
        stream.receive(step, stream.send(step))
    frame, before = stream.send(3), [held.clone() for held in stream.decoder.predictor.held]
    out = torch.zeros(stream.view.numel, dtype=torch.bfloat16, device=kit.DEVICE)
    stream.receive(3, _with_coefficient(frame, value), into=out)
    assert out.isnan().all()
    kept = sorted(map(kit.raw, stream.decoder.predictor.held), key=torch.Tensor.tolist)  # in either order
    for now, then in zip(kept, sorted(map(kit.raw, before), key=torch.Tensor.tolist), strict=True):
        assert torch.equal(now, then)
    with pytest.raises(FrameError, match="wrong coefficient"):
        stream.boards[1].poll(wait=True)


def test_what_was_not_finite_gets_a_coefficient_of_zero_and_both_ends_go_on():
    stream = Stream("int8", order="auto")
    for step in range(6):
        x = stream.x()
        if step == 2:
            x[3] = math.nan
        frame = stream.send(step, x)
        assert step != 2 or wire.unpack(frame, "test").coefficient == 0
        stream.receive(step, frame)
    assert wire.unpack(frame, "test").coefficient != 0
    assert stream.ends_are_equal()


@pytest.mark.parametrize("terms", [1, 2])
def test_a_coefficient_of_zero_predicts_on_the_device_as_on_the_host(terms):
    """Zeros of both signs, too: a second term of -0 adds nothing."""
    predictor = make_predictor("auto", 0.0, "exact")
    for value in (torch.tensor([1.0, -0.0, 0.0, -3.0]), torch.tensor([-0.0, -0.0, 0.0, 2.0]))[:terms]:
        predictor.advance(value, ())
    base, share = predictor.terms(torch.tensor(0.0))
    assert torch.equal(kit.raw(base + share), kit.raw(predictor.terms(0.0)[0]))


def test_host_and_device_take_turns():
    stream = Stream()
    for step in range(8):
        with use("reference" if step in (3, 4, 6) else "gpu"):
            frame = stream.send(step)
            stream.receive(step, frame, foreseen=step != 5)
    stream.both_are_silent()
    assert stream.ends_are_equal()


def test_a_frame_that_is_not_sent_leaves_no_trace():
    stream = Stream()
    for step in range(4):
        if step:
            stream.send(step, kept=False)
        stream.receive(step, stream.send(step))
    stream.both_are_silent()
    assert stream.ends_are_equal()


@pytest.mark.parametrize(
    "at", [0, 5, 8, 17, 25, 50, 72, 97, 104, 113, 121, HEADER_NBYTES, HEADER_NBYTES + 201, -PADDING - 1]
)
def test_one_wrong_bit_is_noticed_and_nothing_applied(at):
    stream = Stream()
    for step in range(3):
        stream.receive(step, stream.send(step))
    before, frame = kit.raw(stream.decoder.predictor.base), stream.send(3)
    frame[at] ^= 4 if at == 5 else 2  # bit 2 of byte 5 is the flag of what is not finite: its sum is then wrong
    stream.receive(3, frame)
    assert not bool(stream.decoder.holds_values)
    assert torch.equal(kit.raw(stream.decoder.predictor.base), before)
    damaged = (
        "what arrived in step 3 has a damaged header" if 0 <= at < HEADER_NBYTES else "wrong checksum .*in step 3: "
    )
    with pytest.raises(FrameError, match=rf"the receiver: {damaged}.* Nothing was applied.*reset\(\) on all ranks"):
        stream.boards[1].poll(wait=True)
    stream.boards[1].poll(wait=True)  # raised once
    stream.receive(4, stream.send(4))  # what follows was made against another history
    assert not bool(stream.decoder.holds_values)
    with pytest.raises(FrameError, match="digest"):
        stream.boards[1].poll(wait=True)
    stream.encoder.drop(), stream.decoder.drop()
    stream.receive(0, stream.send(0))
    stream.receive(1, stream.send(1))
    stream.both_are_silent()
    assert stream.ends_are_equal()


def test_a_left_out_frame_and_a_wrong_step_are_named():
    stream = Stream()
    for step in range(2):
        stream.receive(step, stream.send(step))
    stream.send(2)
    stream.receive(2, stream.send(3))
    with pytest.raises(FrameError, match=r"wrong step \(and sequence, .*frame says 3, expected 2.*call step\(\)"):
        stream.boards[1].poll(wait=True)


@pytest.mark.parametrize(
    ("codec", "order"),
    [(codec, order) for codec in ("int4", "int4:scales=block") for order in (1, 2)]
    + [("topk", 1), ("transform:block=8", 1), (ON_A_TRELLIS, 1)],
)
def test_what_is_not_finite_is_flagged_and_both_ends_go_on(codec, order):
    stream = Stream(codec, order=order)
    for step in range(3):
        stream.receive(step, stream.send(step))
    x = stream.x()
    x[17] = torch.nan
    stream.receive(3, stream.send(3, x))
    assert not bool(stream.decoder.holds_values)
    assert stream.ends_are_equal()
    for board, end in zip(stream.boards, ("the sender", "the receiver"), strict=True):
        with pytest.raises(NonFiniteError, match=f"{end}: in step 3 .*NaN or Inf"):
            board.poll(wait=True)
    frame = stream.send(4)
    value = stream.receive(4, frame)
    assert bool(stream.decoder.holds_values)
    assert bool(torch.isfinite(value).all())
    stream.both_are_silent()
    assert stream.ends_are_equal()


def test_the_host_takes_a_flagged_frame_too():
    """Where it looks into frames itself: the first residual, a message on gloo."""
    stream = Stream()
    for step in range(2):
        stream.receive(step, stream.send(step))
    x = stream.x()
    x[77] = torch.inf
    with pytest.raises(NonFiniteError, match=r"the receiver: .*held NaN or Inf; no output was written"):
        stream.receive(2, stream.send(2, x), foreseen=False)
    assert stream.ends_are_equal()
    with pytest.raises(NonFiniteError, match="the sender"):
        stream.boards[0].poll(wait=True)
    stream.receive(3, stream.send(3))
    stream.both_are_silent()
    assert stream.ends_are_equal()


def test_a_keyframe_cannot_be_announced():
    stream = Stream()
    stream.receive(0, stream.send(0))
    stream.encoder.announce_keyframe = True
    with pytest.raises(ConfigError, match="the sender: a keyframe cannot be announced"):
        stream.send(1)


def test_a_board_keeps_the_first_report():
    streams, board = [Stream(), Stream()], Board()
    for number, stream in enumerate(streams):
        stream.decoder = StreamDecoder(stream.decoder.config, 1234, f"receiver {number}", board=board)
        stream.receive(0, stream.send(0))
        stream.receive(1, stream.send(1))  # the host looks into the first residual
        frame = stream.send(2)
        frame[200] ^= 1
        stream.receive(2, frame)
    with pytest.raises(FrameError, match="receiver 0: wrong checksum"):
        board.poll(wait=True)
    board.poll(wait=True)


@pytest.mark.parametrize("codec", ["int8", "int3:scales=block", "ternary"])
@pytest.mark.parametrize("accepted", [(1, 1), (1, 0), (0, 0), None], ids=["values", "none", "refused", "unchecked"])
def test_a_copy_of_what_is_decoded_holds_nan_where_there_are_no_values(codec, accepted):
    view = kit.VIEWS[-2]
    x, base = (kit.draw("gaussian", view.numel, 9, seed).bfloat16().to(kit.DEVICE) for seed in range(2))
    session = codecs.get(codec).open(view, torch.bfloat16, kit.DEVICE)
    steps = session.device_steps
    payload = torch.empty(session.payload_nbytes, dtype=torch.uint8, device=kit.DEVICE)
    expected, out, copy = torch.empty_like(x), base.clone(), torch.zeros_like(x)
    assert steps.encode(x, (base,), expected, payload)
    flags = None if accepted is None else torch.tensor(accepted, dtype=torch.uint8, device=kit.DEVICE)
    assert steps.decode(payload, (base,), out, copy=copy, accepted=flags)
    assert torch.equal(out, base if accepted == (0, 0) else expected)
    if accepted in (None, (1, 1)):
        assert torch.equal(kit.raw(copy), kit.raw(expected))
    else:
        assert copy.isnan().all()
