"""Residuals far larger than their tensor restart the stream; keyframes may be announced, and coded."""

from __future__ import annotations

import pytest
import torch

from compactdist import Rule, codecs
from compactdist.config import Options
from compactdist.errors import ConfigError, FrameError, NonFiniteError
from compactdist.state import ResidualDecoder, ResidualEncoder, StreamConfig, StreamDecoder, StreamEncoder
from compactdist.state.staged import Wanted
from compactdist.wire import KEYFRAME, RESTART, raw_nbytes, unpack
from tests.state import kit

N = 4096


def error(y: torch.Tensor, x: torch.Tensor) -> float:
    return float((y.double() - x.double()).norm() / x.double().norm())


@pytest.mark.parametrize("order", [1, 2, "auto"])
@pytest.mark.parametrize("error_feedback", [None, False])
@pytest.mark.parametrize("codec", ["binary", "int2", "int4", "int8", "topk", "lowrank_int4"])
def test_alternating_magnitudes(codec, error_feedback, order):
    """The small tensor after a large one is as exact as a tensor coded alone."""
    encoder, decoder = kit.pair(codec=codec, order=order, error_feedback=error_feedback)
    coded = codecs.get(codec)
    for t in range(8):
        x = torch.randn(N) * (1e20 if t % 2 else 1e-20)
        frame = encoder.encode(x)
        y = decoder.decode(frame)
        kit.check_in_step(encoder, decoder)
        if t and not t % 2:
            assert unpack(frame, "here").flags == RESTART
            alone = coded.decode(coded.encode(x), x.shape, x.dtype)
            assert error(y, x) < 1.5 * error(alone, x) + 0.02


def test_a_restart_costs_no_more_than_a_residual():
    encoder = ResidualEncoder("int2")
    sizes = [encoder.encode(torch.randn(N) * scale).numel() for scale in (1, 1, 1e-9, 1e-9)]
    assert sizes[1] == sizes[2] == sizes[3] < sizes[0]


@pytest.mark.parametrize("dtype", kit.DTYPES)
def test_slowly_changing_tensors_never_restart(dtype):
    encoder, decoder = kit.pair(codec="int4")
    x = torch.randn(N)
    for _ in range(10):
        x = x + 0.3 * torch.randn(N)
        frame = encoder.encode(x.to(dtype))
        decoder.decode(frame)
        assert not unpack(frame, "here").flags & RESTART


def pair(**config) -> tuple[StreamEncoder, StreamDecoder]:
    config = StreamConfig(**config)
    return StreamEncoder(config, 1, "a"), StreamDecoder(config, 1, "b")


def carry(encoder, decoder, x, codec, hint=None):
    """One frame of the size and kind both ends expect."""
    fresh = encoder.is_fresh(x.numel(), x.dtype)
    assert fresh == decoder.is_fresh(x.numel(), x.dtype)
    sizes = {end.frame_nbytes(codec, x.numel(), x.dtype, keyframe=fresh, hint=hint) for end in (encoder, decoder)}
    staged = encoder.stage(x, codec, Wanted(hint=hint), keyframe=fresh)
    encoder.commit(staged)
    assert sizes == {staged.frame.numel()}
    return staged, decoder.decode(staged.frame, codec, x.numel(), x.dtype, hint=hint)


@pytest.mark.parametrize("order", [1, 2, "auto"])
@pytest.mark.parametrize("keyframe", [None, codecs.get("int8")])
def test_an_announced_keyframe_comes_next_and_only_then(order, keyframe):
    codec = codecs.get("int4")
    encoder, decoder = pair(order=order, keyframe=keyframe)
    kinds = []
    for t in range(8):
        if t in (3, 4):
            encoder.announce_keyframe = True
        staged, _ = carry(encoder, decoder, torch.randn(64, 48), codec)
        assert kit.same_bytes(encoder.predictor.base, decoder.predictor.base)
        assert encoder.digest == decoder.digest
        kinds.append(staged.header.is_keyframe)
    assert kinds == [True, False, False, False, True, False, True, False]


def test_an_announcement_is_kept_until_a_residual_can_carry_it():
    """A keyframe announces none: the residual after it does."""
    codec = codecs.get("int4")
    encoder, decoder = pair()
    encoder.announce_keyframe = True
    kinds = [carry(encoder, decoder, torch.randn(64), codec)[0].header.is_keyframe for _ in range(4)]
    assert kinds == [True, False, True, False]


def test_a_residual_in_place_of_the_announced_keyframe_is_refused():
    codec, x = codecs.get("int4"), torch.randn(N)
    encoder, decoder = pair()
    carry(encoder, decoder, x, codec)
    encoder.announce_keyframe = True
    carry(encoder, decoder, x, codec)
    encoder.keyframe_announced = False
    staged = encoder.stage(x, codec, keyframe=False)
    with pytest.raises(FrameError, match=r"wrong kind.*keyframe"):
        decoder.decode(staged.frame, codec, N, torch.float32)


@pytest.mark.parametrize("dtype", kit.DTYPES)
@pytest.mark.parametrize("n", [1000, N])
def test_coded_keyframes(n, dtype):
    """The default: a quarter to a half of the bytes, at 8 bits' error; the residuals after it correct that."""
    encoder, decoder = kit.pair(codec="int4")
    x = torch.randn(n)
    frame = encoder.encode(x.to(dtype))
    header = unpack(frame, "here")
    assert header.flags == KEYFRAME
    assert header.keyframe_codec == codecs.get("int8").fingerprint()
    assert error(decoder.decode(frame), x.to(dtype)) < 0.02
    kit.check_in_step(encoder, decoder)
    if n == N:
        assert header.payload_nbytes < 0.55 * x.to(dtype).nbytes
    for _ in range(4):
        decoder.decode(encoder.encode(x.to(dtype)))
        kit.check_in_step(encoder, decoder)
    assert error(decoder.state, x.to(dtype)) < 0.01


@pytest.mark.parametrize("dtype", kit.DTYPES)
@pytest.mark.parametrize("keyframe", ["int8", "int4", "binary", "lowrank"])
def test_keyframes_of_small_tensors_are_their_own_bytes(keyframe, dtype):
    """Whatever the size, a keyframe is never larger than a raw one, and both ends know its size beforehand."""
    codec, config = codecs.get("int4"), codecs.get(keyframe)
    kinds = set()
    for n in (0, 1, 2, 17, 100, 128, 129, 300, 512, 1000, N):
        encoder, decoder = pair(keyframe=config)
        x = torch.randn(n).to(dtype)
        staged, y = carry(encoder, decoder, x, codec)
        assert staged.header.payload_nbytes <= raw_nbytes(n, dtype)
        assert torch.equal(y, x) or not staged.header.is_raw_keyframe
        kinds.add((n, staged.header.is_raw_keyframe))
        staged, _ = carry(encoder, decoder, x, codec)
        assert not staged.header.is_keyframe
    assert {(0, True), (1, True), (N, False)} <= kinds


def test_a_keyframe_may_carry_its_own_bytes_where_a_coded_one_is_expected():
    codec, x = codecs.get("int4"), torch.randn(N)
    encoder, decoder = pair()
    staged = encoder.stage(x, codec, Wanted(own_bytes=True), keyframe=True)
    assert staged.header.is_raw_keyframe
    encoder.commit(staged)
    assert torch.equal(decoder.decode(staged.frame, codec, N, x.dtype), x)
    for _ in range(3):
        carry(encoder, decoder, x, codec)
        assert kit.same_bytes(encoder.predictor.base, decoder.predictor.base)


def test_codec_raw_implies_raw_keyframes():
    x = torch.full((N,), float("nan"))
    encoder, decoder = kit.pair(codec="raw")
    assert kit.same_bytes(decoder.decode(encoder.encode(x)), x)
    assert Options(codec="raw").stream.keyframe is None
    assert Options(codec="raw", policy=Rule("int4", key="*kv*")).stream.keyframe == codecs.get("int8")


def test_a_keyframe_that_cannot_be_coded_raises_and_changes_nothing():
    encoder, decoder = kit.pair(codec="int4")
    for _ in range(2):
        with pytest.raises(NonFiniteError, match="NaN"):
            encoder.encode(torch.full((N,), float("nan")))
        assert encoder.state is None
    decoder.decode(encoder.encode(torch.randn(N)))
    kit.check_in_step(encoder, decoder)


def test_which_keyframe_codecs_there_are():
    default = codecs.get("int8")
    assert ResidualEncoder("int4", keyframe="raw").config.keyframe is None
    assert ResidualEncoder("int4").config == ResidualEncoder("int4", keyframe=default).config == StreamConfig()
    assert StreamConfig().keyframe == Options().stream.keyframe == default
    with pytest.raises(ConfigError, match="lossless"):
        StreamConfig(keyframe=codecs.get("raw"))
    with pytest.raises(FrameError, match="keyframes"):
        ResidualDecoder("int4").decode(ResidualEncoder("int4", keyframe="raw").encode(torch.randn(N)))
