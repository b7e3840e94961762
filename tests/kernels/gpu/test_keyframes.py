"""Keyframes that the device seals and checks: they are the host's to the byte, and nothing is read to make them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

import compactdist
from compactdist import codecs
from compactdist.errors import FrameError, NonFiniteError
from compactdist.kernels import use
from compactdist.state.staged import Wanted
from compactdist.testing import act_like_nccl
from compactdist.wire import HEADER_NBYTES
from tests.kernels.gpu import kit
from tests.kernels.gpu.conftest import INTERPRETED
from tests.kernels.gpu.test_frames import PADDING, VIEW, Stream
from tests.kernels.gpu.test_host_reads import NoReads
from tests.launch import run_ranks

CODED = ["int8", "int4:scales=block", "topk"]
WRONG_BYTES = [0, 5, 17, 25, 72, 97, 104, 113, HEADER_NBYTES + 301, -PADDING - 1]
KEYS = (True, True, False, False, True, False)
"""Which frames are keyframes: the first, a second warm-up step's, one on a stream with a history."""


@pytest.fixture(autouse=True)
def _kernels_of_the_device():
    with use("gpu"):
        yield


def _coder(name: str) -> Any:
    return None if name == "raw" else codecs.get(name)


def _stream(name: str = "int8", device: torch.device = kit.DEVICE, **options: Any) -> Stream:
    return Stream(device=device, keyframe=_coder(name), **options)


def _run(stream: Stream) -> list[tuple[torch.Tensor, torch.Tensor]]:
    seen = []
    for step, key in enumerate(KEYS):
        frame = stream.send(step, key=key)
        seen.append((kit.raw(frame), kit.raw(stream.receive(step, frame, key=key))))
        assert stream.ends_are_equal()
    stream.both_are_silent()
    return seen


@pytest.mark.parametrize("name", [*CODED, "raw"])
@pytest.mark.parametrize("options", [{}, {"order": 2}, {"state": "int8"}, {"order": 0}], ids=str)
def test_keyframes_are_those_that_the_host_makes(name, options):
    got = _run(_stream(name, **options))
    with use("reference"):
        expected = _run(_stream(name, torch.device("cpu"), **options))
    for (frame, value), (host_frame, host_value) in zip(got, expected, strict=True):
        assert torch.equal(frame, host_frame)
        assert torch.equal(value, host_value)


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU benchmarks.gpu.host counts what waits")
@pytest.mark.parametrize("name", [*CODED, "raw"])
def test_both_ends_of_a_request_read_nothing(name):
    """Of the second request; the first has made tables."""
    stream = _stream(name, order=2)
    x = [stream.x() for _ in range(3)]
    out = torch.empty_like(x[0])
    with pytest.MonkeyPatch.context() as patch, NoReads(patch) as reads:
        for request in range(2):
            stream.encoder.drop(), stream.decoder.drop()
            for step in range(3):
                reads.armed = request == 1
                stream.receive(step, stream.send(step, x[step]), into=out if step % 2 else None)
                reads.armed = False
    stream.both_are_silent()
    assert stream.ends_are_equal()


@pytest.mark.parametrize("name", ["int8", "raw"])
@pytest.mark.parametrize("at", WRONG_BYTES)
def test_one_wrong_bit_is_noticed_and_nothing_applied(name, at):
    """Of every byte in turn with an output of the caller's and without, which the check of a frame does not see."""
    stream, into = _stream(name), (WRONG_BYTES.index(at) + (name == "raw")) % 2 == 0
    for step in range(2):
        stream.receive(step, stream.send(step, key=True), key=True)
    before, frame = kit.raw(stream.decoder.predictor.base), stream.send(2, key=True)
    out = torch.zeros(VIEW.numel, dtype=torch.bfloat16, device=kit.DEVICE) if into else None
    frame[at] ^= 4 if at == 5 else 2
    value = stream.receive(2, frame, key=True, into=out)
    assert not bool(stream.decoder.holds_values)
    assert torch.equal(kit.raw(stream.decoder.predictor.base), before)
    if out is not None or name == "raw":
        assert (value if out is None else out).isnan().all()
    damaged = (
        "what arrived in step 2 has a damaged header" if 0 <= at < HEADER_NBYTES else "wrong checksum .*in step 2: "
    )
    with pytest.raises(FrameError, match=rf"the receiver: {damaged}.* Nothing was applied.*reset\(\) on all ranks"):
        stream.boards[1].poll(wait=True)
    stream.receive(3, stream.send(3))  # a residual against a history that this end has not
    assert not bool(stream.decoder.holds_values)
    with pytest.raises(FrameError, match="digest"):
        stream.boards[1].poll(wait=True)
    stream.receive(4, stream.send(4, key=True), key=True)  # the next keyframe starts anew
    stream.receive(5, stream.send(5))
    stream.both_are_silent()
    assert stream.ends_are_equal()


def test_a_keyframe_that_is_refused_on_an_empty_stream_leaves_zeros():
    stream = _stream()
    frame = stream.send(0)
    frame[HEADER_NBYTES] ^= 1
    stream.receive(0, frame)
    assert not stream.decoder.predictor.base.any()
    with pytest.raises(FrameError, match="wrong checksum"):
        stream.boards[1].poll(wait=True)


@pytest.mark.parametrize("name", ["int8", "raw"])
def test_a_keyframe_that_is_not_sent_leaves_no_trace(name):
    stream = _stream(name)
    for step in range(6):
        stream.send(step, key=True, kept=False)
        stream.receive(step, stream.send(step))
    stream.both_are_silent()
    assert stream.ends_are_equal()


@pytest.mark.parametrize("name", CODED)
@pytest.mark.parametrize(("order", "bad"), [(1, torch.nan), (2, -torch.inf)])
def test_what_is_not_finite_is_flagged_in_a_coded_keyframe_and_both_ends_go_on(name, order, bad):
    stream, out = _stream(name, order=order), torch.zeros(VIEW.numel, dtype=torch.bfloat16, device=kit.DEVICE)
    x = stream.x()
    x[17] = bad
    stream.receive(0, stream.send(0, x), into=out)
    assert out.isnan().all()
    assert stream.ends_are_equal()
    assert stream.decoder.predictor.base.isfinite().all()
    for board, end in zip(stream.boards, ("the sender", "the receiver"), strict=True):
        with pytest.raises(NonFiniteError, match=f"{end}: in step 0 the tensor held NaN or Inf.* remember zero"):
            board.poll(wait=True)
    for step in range(1, 5):
        x = stream.x()
        value = stream.receive(step, stream.send(step, x))
    assert (value - x).abs().max() < 1
    stream.both_are_silent()
    assert stream.ends_are_equal()


@pytest.mark.parametrize(("order", "into"), [(1, False), (2, True)], ids=["value", "into"])
def test_what_is_not_finite_arrives_in_a_keyframe_of_own_bytes(order, into):
    stream = _stream("raw", order=order)
    x = stream.x()
    x[17], x[18], x[19] = torch.nan, torch.inf, -torch.inf
    bits = x.view(torch.int16)
    bits[20] = 0x7FA5  # a NaN of another kind
    out = torch.zeros_like(x) if into else None
    value = stream.receive(0, stream.send(0, x), into=out)
    assert torch.equal(kit.raw(value if out is None else out), kit.raw(x))
    base = stream.decoder.predictor.base
    assert not base[17:21].any()
    assert torch.equal(base[21:], x[21:])
    assert stream.ends_are_equal()
    x = stream.x()
    for step in range(1, 4):
        value = stream.receive(step, stream.send(step, x))
    assert (value - x).abs().max() < 0.5
    stream.both_are_silent()
    assert stream.ends_are_equal()


@pytest.mark.parametrize("name", ["int8", "raw"])
def test_the_host_takes_such_keyframes_too(name):
    """Where it looks into frames itself: a message on gloo, a frame that is not aligned."""
    stream = _stream(name)
    x = stream.x()
    x[17] = torch.nan
    frame = stream.send(0, x)
    if name == "raw":
        assert torch.equal(kit.raw(stream.receive(0, frame, foreseen=False)), kit.raw(x))
    else:
        out = torch.zeros_like(x)
        with pytest.raises(NonFiniteError, match=r"the receiver: .*coded keyframe cannot carry; no output was written"):
            stream.receive(0, frame, foreseen=False, into=out)
        assert not out.any()
        with pytest.raises(NonFiniteError, match="the sender"):
            stream.boards[0].poll(wait=True)
    assert stream.ends_are_equal()
    for step in range(1, 4):
        stream.receive(step, stream.send(step))
    stream.both_are_silent()
    assert stream.ends_are_equal()


@pytest.mark.parametrize("name", ["int8", "raw"])
@pytest.mark.parametrize("turn", [0, 1], ids=["sender", "receiver"])
def test_host_and_device_take_turns(name, turn):
    stream = _stream(name)
    for step, key in enumerate((True, False, True, True, False, False)):
        with use("reference" if step in (0, 2) and turn == 0 else "gpu"):
            frame = stream.send(step, key=key)
        stream.receive(step, frame, key=key, foreseen=turn == 0 or step not in (0, 3))
    stream.both_are_silent()
    assert stream.ends_are_equal()


def test_a_keyframe_without_history_is_made_by_the_host():
    stream = _stream()
    frame = stream.send(0, refuse_state=True)
    stream.receive(0, frame, key=False)  # with a budget the receiver's host looks
    assert stream.decoder.refused
    assert stream.decoder.live is None is stream.encoder.live


@pytest.mark.parametrize("name", ["int8", "raw"])
def test_a_keyframe_of_a_host_that_forgets_is_refused_by_a_device(name):
    """Two ends of one stream without the same kernels: the sender starts again with a keyframe, the receiver cannot."""
    stream = _stream(name)
    x = stream.x()
    x[17] = torch.nan
    nbytes = stream.encoder.frame_nbytes(stream.codec, x.numel(), x.dtype, keyframe=True)
    with use("reference"):
        staged, _ = stream.encoder.stage_or_flag(x, stream.codec, Wanted(frame_nbytes=nbytes), keyframe=True)
    assert not staged.on_device
    stream.receive(0, staged.frame)
    assert not bool(stream.decoder.holds_values)
    with pytest.raises(FrameError, match=f"the receiver: wrong {'flags' if name == 'raw' else 'payload_nbytes'}"):
        stream.boards[1].poll(wait=True)


def _gather(group: Any, x: torch.Tensor) -> torch.Tensor:
    out = torch.empty(2 * x.numel(), dtype=x.dtype)
    group.all_gather_into_tensor(out, x)
    return out


@pytest.mark.skipif(not INTERPRETED, reason="groups of two ranks need two GPUs, see benchmarks.gpu.check")
@pytest.mark.parametrize("keyframe", ["int8", "raw"])
@pytest.mark.parametrize("local", ["reconstructed", "exact"])
def test_a_group_reports_a_keyframe_that_is_not_finite_and_goes_on(keyframe, local):
    def body(rank, world_size):
        with use("gpu"):
            group = compactdist.wrap(
                act_like_nccl(dist.group.WORLD), "int4", min_numel=64, keyframe=keyframe, local=local
            )
            x = torch.linspace(-1, 1, 1280)
            x_bad = x.clone()
            if rank == 0:
                x_bad[5] = torch.inf
            group.step()
            out = _gather(group, x_bad)
            if keyframe == "raw":
                assert torch.equal(out.isinf(), torch.arange(2560) == 5)
            else:
                assert out.view(2, -1)[0].isnan().all() == (rank == 1)
                assert out.view(2, -1)[1].isfinite().all()
                with pytest.raises(NonFiniteError, match=r"in step 0 the tensor held NaN or Inf"):
                    group.step()
            for _ in range(4):
                group.step()
                out = _gather(group, x)
            assert (out - torch.cat([x, x])).abs().max() < 0.2
            group.check()
            group.close()

    run_ranks(body, world_size=2, timeout=120)


@pytest.mark.skipif(not INTERPRETED, reason="groups of two ranks need two GPUs, see benchmarks.gpu.check")
def test_a_refused_keyframe_is_not_passed_on():
    """Inside ``forwarding()`` a frame that a device refused is coded anew: its payload may be damaged."""

    def body(rank, world_size):
        with use("gpu"):
            group = compactdist.wrap(act_like_nccl(dist.group.WORLD), "int4", min_numel=64)
            x, out = torch.linspace(-1, 1, 1280), torch.zeros(1280)
            group.step()
            with group.forwarding():
                if rank == 0:
                    group.send(x, 1)
                    group.recv(out, 1)
                    assert (out - x).abs().max() < 0.02
                else:
                    group.recv(out, 0)
                    decoder = next(s for site in group._engine.store.sites() for s in site.decoders.values())
                    assert bool(decoder.holds_values)
                    decoder.holds_values = torch.zeros(1, dtype=torch.bool)
                    group.send(x, 0)
            assert not any(site.forwarded for site in group.stats().sites.values())
            group.close()

    run_ranks(body, world_size=2, timeout=120)
