"""Keyframes are coded in the matrix view of the layout hint, which both ends know, and in blocks without one."""

from __future__ import annotations

import pytest
import torch

from compactdist import codecs
from compactdist.errors import FrameError
from compactdist.state import Layout, MatrixView, StreamConfig, StreamDecoder, StreamEncoder, blocks
from compactdist.state.staged import Wanted
from compactdist.wire import HEADER_NBYTES, raw_nbytes
from tests.state import kit

HEADS = Layout("(h s d) -> 1 s (h d)", h=3, d=48)
HINT = HEADS.resolve(3 * 100 * 48)
OTHER = Layout("(s d) -> 1 s d", d=150).resolve(HINT.numel)
CODEC = codecs.get("int4")
KEYFRAMES = (
    "int8",
    "int4",
    "int3",
    "binary",
    "ternary",
    "fp8",
    "int4:scales=block",
    "transform:bits=4",
    "lowrank_int4",
)


def ends(keyframe: str, **config) -> tuple[StreamEncoder, StreamDecoder]:
    made = StreamConfig(keyframe=codecs.get(keyframe), **config)
    return StreamEncoder(made, 1, "a"), StreamDecoder(made, 1, "b")


def values(numel: int = HINT.numel, seed: int = 0) -> torch.Tensor:
    """Heads whose channels differ much."""
    scale = torch.logspace(-2, 2, 3 * 48).view(3, 1, 48)
    return (torch.randn(3, numel // 144, 48, generator=torch.Generator().manual_seed(seed)) * scale).reshape(-1)


def carry(encoder, decoder, x, hint, *, keyframe=True):
    """One frame of the size that both ends expect; its header."""
    sizes = {end.frame_nbytes(CODEC, x.numel(), x.dtype, keyframe=keyframe, hint=hint) for end in (encoder, decoder)}
    staged = encoder.stage(x, CODEC, Wanted(value=True, hint=hint), keyframe=keyframe)
    assert sizes == {staged.frame.numel()}
    encoder.commit(staged)
    assert kit.same_bytes(decoder.decode(staged.frame, CODEC, x.numel(), x.dtype, hint=hint), staged.value)
    assert encoder.view == decoder.view
    return staged.header


def seen(header) -> tuple[int, int, int, int]:
    return header.groups, header.rows, header.channels, header.layout


@pytest.mark.timeout(60)
@pytest.mark.parametrize("keyframe", KEYFRAMES)
@pytest.mark.parametrize("hint", [HINT, None])
def test_every_codec_of_keyframes_follows_the_hint(keyframe, hint):
    encoder, decoder = ends(keyframe)
    view = hint or blocks(HINT.numel)
    header = carry(encoder, decoder, values(), hint)
    assert seen(header) == (*view.shape, view.hint)
    assert header.payload_nbytes == codecs.get(keyframe).payload_nbytes(view.shape, torch.float32)
    for seed in (1, 2):
        carry(encoder, decoder, values(seed=seed), hint, keyframe=False)


@pytest.mark.timeout(60)
def test_tokens_and_channels_are_worth_more_than_blocks():
    x, errors = values(), []
    for hint in (HINT, None):
        y = ends("int4")[0].stage(x, CODEC, Wanted(value=True, hint=hint), keyframe=True).value
        errors.append(float((y - x).norm() / x.norm()))
    assert errors[0] < 0.7 * errors[1]


@pytest.mark.timeout(60)
def test_a_live_stream_keeps_the_view_it_began_with():
    """A hint that changes holds from the next start on, for keyframes as for residuals."""
    encoder, decoder = ends("int4")
    for hint in (HINT, OTHER, None):
        assert seen(carry(encoder, decoder, values(), hint)) == (*HINT.shape, HINT.hint)
    assert carry(encoder, decoder, values(), OTHER, keyframe=False).layout == HINT.hint
    encoder.drop()
    decoder.drop()
    assert carry(encoder, decoder, values(), OTHER).layout == OTHER.hint
    encoder.announce_keyframe = True
    carry(encoder, decoder, values(), HINT, keyframe=False)
    assert carry(encoder, decoder, values(), HINT).layout == OTHER.hint
    half = values(HINT.numel // 2)
    assert carry(encoder, decoder, half, HEADS.resolve(half.numel())).rows == 50, "another size begins anew"


@pytest.mark.timeout(60)
def test_a_view_that_was_found_is_for_residuals():
    encoder, decoder = ends("int4")
    x = torch.randn(200, 80) * torch.logspace(-2, 2, 80)
    carry(encoder, decoder, x.reshape(-1), None)
    assert carry(encoder, decoder, 2 * x.reshape(-1), None, keyframe=False).next_channels == 80
    assert encoder.view == MatrixView(x.numel(), 1, 200, 80)
    assert seen(carry(encoder, decoder, x.reshape(-1), None)) == (*blocks(x.numel()).shape, 0)


@pytest.mark.timeout(60)
def test_a_hint_whose_scales_are_larger_than_the_tensor_is_left_aside():
    numel = 4096
    tiny = Layout("(g c) -> g 1 c", c=2).resolve(numel)
    assert codecs.get("int8").payload_nbytes(tiny.shape, torch.float32) >= raw_nbytes(numel, torch.bfloat16)
    encoder, decoder = ends("int8")
    header = carry(encoder, decoder, torch.randn(numel).bfloat16(), tiny)
    assert seen(header) == (*blocks(numel).shape, 0)
    assert header.payload_nbytes + HEADER_NBYTES < raw_nbytes(numel, torch.bfloat16)
    assert carry(encoder, decoder, torch.randn(numel).bfloat16(), tiny, keyframe=False).layout == tiny.hint


@pytest.mark.timeout(60)
def test_ends_with_different_hints_refuse_each_other():
    for ours, theirs in ((HINT, None), (None, HINT), (HINT, OTHER)):
        encoder, decoder = ends("int4")
        frame = encoder.stage(values(), CODEC, Wanted(hint=ours), keyframe=True).frame
        with pytest.raises(FrameError, match="wrong layout"):
            decoder.decode(frame, CODEC, HINT.numel, torch.float32, hint=theirs)
        assert decoder.live is None
