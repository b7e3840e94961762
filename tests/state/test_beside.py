"""A receiver in a group sums up a residual while it decodes it beside its history, which a wrong sum leaves alone."""

from __future__ import annotations

import pytest
import torch

from compactdist import codecs, kernels
from compactdist.errors import FrameError
from compactdist.state import StateStore, StreamConfig, StreamEncoder
from tests.state import kit

N = 1 << 14


@pytest.fixture(autouse=True)
def compiled():
    with kernels.use("cpu"):
        yield


def ends(**config):
    """A sender, and a receiver that shares spare buffers with the other streams of a group."""
    config = StreamConfig(find_layout=False, **config)
    store = StateStore(config, "a group", None)
    decoder = store.site("site").decoder(0)
    return StreamEncoder(config, store.site("site").fingerprint, "a"), decoder, store.spares


@pytest.mark.parametrize("order", [1, 2, "auto"])
@pytest.mark.parametrize("state", ["exact", "int8"])
@pytest.mark.parametrize("scales", ["token_channel", "block"])
@pytest.mark.parametrize("codec_id", ["binary", "int2", "int4", "int8"])
def test_both_ends_stay_equal_and_damage_moves_nothing(codec_id, scales, state, order):
    codec = codecs.get(codec_id, scales=scales)
    encoder, decoder, _ = ends(state=state, order=order)
    x = torch.randn(N)
    for step in range(5):
        staged = encoder.stage(x, codec, keyframe=not step)
        before = [held.clone() for held in decoder.predictor.held]
        for at in range(0, staged.frame.numel(), 997) if step else ():
            damaged = staged.frame.clone()
            damaged[at] ^= 1 << at % 8
            with pytest.raises(FrameError):
                decoder.decode(damaged, codec, N, x.dtype)
            assert all(map(kit.same_bytes, before, decoder.predictor.held))
            assert decoder.sequence == step
        encoder.commit(staged)
        value = decoder.decode(staged.frame, codec, N, x.dtype)
        assert all(map(kit.same_bytes, encoder.predictor.held, decoder.predictor.held))
        assert encoder.digest == decoder.digest
        assert torch.equal(value, staged.value)
        x = x + 0.1 * torch.randn(N)


def test_the_history_is_decoded_beside_in_one_buffer_for_all_sites():
    codec, x = codecs.get("int8"), torch.randn(N)
    encoder, decoder, spares = ends()
    places = set()
    for step in range(6):
        staged = encoder.stage(x * (1 + step), codec, keyframe=not step)
        encoder.commit(staged)
        decoder.decode(staged.frame, codec, N, x.dtype)
        places.add(decoder.predictor.base.data_ptr())
        assert spares.nbytes == (x.nbytes if step > 1 else 0)  # the first residual is looked into
    assert len(places) == 2


def test_an_interrupt_leaves_the_history_and_the_frame_decodes_after_it(monkeypatch):
    codec, x = codecs.get("int8"), torch.randn(N)
    encoder, decoder, _ = ends()
    for step in range(3):
        staged = encoder.stage(x * (1 + step), codec, keyframe=not step)
        encoder.commit(staged)
        if step == 2:
            session = decoder._form.session

            def interrupted(*args):
                raise KeyboardInterrupt

            with monkeypatch.context() as patch:
                patch.setattr(type(session), "decode_and_sum", interrupted)
                with pytest.raises(KeyboardInterrupt):
                    decoder.decode(staged.frame, codec, N, x.dtype)
        decoder.decode(staged.frame, codec, N, x.dtype)
    assert kit.same_bytes(encoder.predictor.base, decoder.predictor.base)
