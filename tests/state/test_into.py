"""A receiver writes a value to its history and to the caller's tensor at once, and to neither from a damaged frame."""

from __future__ import annotations

import pytest
import torch

from compactdist import codecs, kernels
from compactdist.errors import FrameError
from compactdist.state import StreamConfig, StreamEncoder, plain
from compactdist.state.decoder import StreamDecoder
from compactdist.state.staged import Wanted
from tests.state import kit

N = 1 << 14


def ends(**config):
    config = StreamConfig(find_layout=False, **config)
    return StreamEncoder(config, 7, "a"), StreamDecoder(config, 7, "b")


def frames(encoder, codec, steps, dtype):
    """Frames of a tensor that changes, as the sender stages them, with the sender's own reconstruction."""
    x = torch.randn(N)
    for step in range(steps):
        staged = encoder.stage(x.to(dtype), codec, Wanted(value=True), keyframe=not step)
        encoder.commit(staged)
        yield step, staged
        x = x + 0.1 * torch.randn(N)


@pytest.mark.parametrize(
    ("which", "order", "keyframe", "state"),
    [("cpu", 1, "raw", "exact"), ("cpu", "auto", "int8", "int8"), ("reference", 2, "int8", "exact")],
)
@pytest.mark.parametrize("scales", ["token_channel", "token_history", "block"])
@pytest.mark.parametrize("codec_id", ["binary", "int2", "int8"])
def test_the_callers_tensor_gets_what_the_history_gets(codec_id, scales, which, order, keyframe, state):
    codec = codecs.get(codec_id, scales=scales)
    with kernels.use(which):
        encoder, decoder = ends(state=state, order=order, keyframe=None if keyframe == "raw" else codecs.get(keyframe))
        for step, staged in frames(encoder, codec, 4, torch.bfloat16):
            room = torch.full((N + 3,), 7.0, dtype=torch.bfloat16)
            into = room[1 : N + 1].view(128, -1)  # does not begin a cache line
            held = [one.clone() for one in decoder.predictor.held]
            damaged = staged.frame.clone()
            damaged[-40] ^= 4
            with pytest.raises(FrameError):
                decoder.decode(damaged, codec, N, torch.bfloat16, into=into)
            assert not decoder.wrote
            assert bool((room == 7).all())
            assert all(map(kit.same_bytes, held, decoder.predictor.held))
            value = decoder.decode(staged.frame, codec, N, torch.bfloat16, into=into)
            assert kit.same_bytes(value, staged.value)
            assert decoder.wrote == (keyframe != "raw" or step > 0)
            if decoder.wrote:
                assert kit.same_bytes(into.reshape(-1), staged.value)
            assert bool((room[[0, N + 1, N + 2]] == 7).all())
            assert all(map(kit.same_bytes, encoder.predictor.held, decoder.predictor.held))


@pytest.mark.parametrize("codec_id", ["topk", "lowrank", "transform", "rates"])
def test_every_codec_can(codec_id):
    codec = codecs.get(codec_id)
    encoder, decoder = ends()
    for _, staged in frames(encoder, codec, 3, torch.float32):
        into = torch.full((N,), 7.0)
        value = decoder.decode(staged.frame, codec, N, torch.float32, into=into)
        assert decoder.wrote
        assert kit.same_bytes(into, value)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("codec_id", ["binary", "int4", "fp8"])
def test_large_copies_are_written_past_the_caches(codec_id, threads):
    numel, before = 6 << 20, torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with kernels.use("cpu"):
            codec = codecs.get(codec_id)
            session = codec.open(plain(numel, 1, 1024), torch.bfloat16, torch.device("cpu"))
            x, base = torch.randn(2, numel).bfloat16()
            payload = torch.empty(session.payload_nbytes, dtype=torch.uint8)
            session.encode(x, (base,), None, payload)
            out, once = base.clone(), torch.empty_like(base)
            session.decode(payload, (base,), once)
            for shift in (0, 1):
                room = torch.zeros(numel + 64, dtype=torch.bfloat16)
                start = -room.data_ptr() % 64 // 2 + shift
                session.decode_twice(payload, (base,), out, room[start : start + numel])
                assert kit.same_bytes(out, once)
                assert kit.same_bytes(room[start : start + numel], once)
    finally:
        torch.set_num_threads(before)
