"""What a codec's encoder remembers of a stream: committed with the frame, gone with the history, never needed."""

from __future__ import annotations

import pytest
import torch

from compactdist import codecs
from compactdist.codecs.base import Session
from compactdist.codecs.lowrank.lowrank_int4 import LowRankInt4
from compactdist.errors import NonFiniteError
from compactdist.state import ResidualDecoder, ResidualEncoder, StreamConfig, StreamEncoder, plain
from compactdist.state.staged import Wanted

SHAPE = (96, 160)
HINT = plain(SHAPE[0] * SHAPE[1], 1, SHAPE[1])
CODECS = ("lowrank", "lowrank_int4")


class Forgetful(LowRankInt4):
    """The same wire format without a memory."""

    def open(self, view, dtype, device):
        return Session(self, view, dtype, device)


def opened(codec):
    return codec.open(HINT, torch.float32, torch.device("cpu"))


def step(session, x, terms=()):
    """One committed step: what the receiver reconstructs."""
    out, payload = torch.empty_like(x), torch.empty(session.payload_nbytes, dtype=torch.uint8)
    session.encode(x, terms, out, payload)
    session.commit()
    return out


def walk(steps: int, rank: int = 40, seed: int = 0) -> list[torch.Tensor]:
    """A tensor whose changes share a space of slowly turning directions, more of them than are sent."""
    g = torch.Generator().manual_seed(seed)
    left, right = torch.randn(SHAPE[0], rank, generator=g), torch.randn(rank, SHAPE[1], generator=g)
    x, values = torch.randn(SHAPE, generator=g), []
    for _ in range(steps):
        left = 0.98 * left + 0.2 * torch.randn(SHAPE[0], rank, generator=g)
        x = x + left * torch.rand(rank, generator=g) @ right / rank + 0.02 * torch.randn(SHAPE, generator=g)
        values.append(x)
    return values


def started(codec, order: int = 1) -> tuple[StreamEncoder, list[torch.Tensor]]:
    """An encoder with two residuals behind it, and what is to come."""
    encoder = StreamEncoder(StreamConfig(order, find_layout=False), 0, "here")
    values = walk(6)
    for step, x in enumerate(values[:3]):
        encoder.commit(encoder.stage(x, codec, Wanted(hint=HINT), keyframe=step == 0))
    return encoder, values[3:]


@pytest.mark.parametrize("order", [0, 1, 2, "auto"])
@pytest.mark.parametrize("codec_id", CODECS)
def test_a_frame_that_is_not_committed_changes_nothing(codec_id, order):
    codec = codecs.get(codec_id)
    encoder, (x, other, _) = started(codec, order)
    first = encoder.stage(x, codec, keyframe=False).frame
    encoder.stage(other, codec, keyframe=False)
    with pytest.raises(NonFiniteError):
        encoder.stage(torch.full_like(x, float("nan")), codec, keyframe=False)
    again = encoder.stage(x, codec, keyframe=False)
    assert torch.equal(again.frame, first)
    encoder.commit(again)
    twin, (x, other, _) = started(codec, order)
    twin.commit(twin.stage(x, codec, keyframe=False))
    assert torch.equal(
        encoder.stage(other, codec, keyframe=False).frame, twin.stage(other, codec, keyframe=False).frame
    )


def test_it_is_used():
    """Where it was forgotten, the same residual is coded otherwise."""
    codec = codecs.get("lowrank_int4", rank=4)
    encoder, (x, *_) = started(codec)
    remembered = encoder.stage(x, codec, keyframe=False).frame
    encoder._form = None
    assert not torch.equal(encoder.stage(x, codec, keyframe=False).frame, remembered)


@pytest.mark.parametrize("codec_id", CODECS)
def test_random_numbers_of_others_play_no_part(codec_id):
    def frames(seed: int) -> list[torch.Tensor]:
        torch.manual_seed(seed)
        encoder = ResidualEncoder(codec_id)
        made = []
        for x in walk(5):
            torch.rand(seed)
            made.append(encoder.encode(x))
        return made

    assert all(torch.equal(a, b) for a, b in zip(frames(1), frames(2), strict=True))


def test_reset_forgets_it():
    encoder = ResidualEncoder("lowrank_int4")
    first = [encoder.encode(x) for x in walk(4)]
    encoder.reset()
    assert encoder.state_bytes == 0
    fresh = ResidualEncoder("lowrank_int4")
    fresh.reset()
    again, expected = ([each.encode(x) for x in walk(4)] for each in (encoder, fresh))
    assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))
    assert all(torch.equal(a[-100:], b[-100:]) for a, b in zip(again, first, strict=True))


def test_another_codec_or_arrangement_starts_anew():
    codec, other = codecs.get("lowrank", rank=4), codecs.get("lowrank", rank=6)
    encoder, (x, y, _) = started(codec)
    assert encoder._form.codec == codec
    encoder.commit(encoder.stage(x, other, keyframe=False))
    assert encoder._form.codec == other
    assert encoder._form.session._memory["calls"] == 1
    said = encoder.header_of(other, x.numel(), x.dtype, next_groups=1, next_channels=2 * SHAPE[1])
    encoder.follow(said)
    encoder.commit(encoder.stage(y, other, keyframe=False))
    assert encoder._form.session._memory["calls"] == 1
    encoder.commit(encoder.stage(y, codecs.get("int4"), keyframe=False))
    assert encoder._form.session.held_bytes == 0


def test_its_bytes_are_counted():
    codec = codecs.get("lowrank_int4", rank=8)
    encoder, _ = started(codec)
    assert encoder.state_bytes - encoder.predictor.held_bytes == 12 * SHAPE[1] * 2  # 1.5 rank directions in bfloat16


@pytest.mark.parametrize("codec_id", CODECS)
def test_both_ends_stay_equal_and_the_receiver_needs_none(codec_id):
    encoder, decoder = ResidualEncoder(codec_id, order=2), ResidualDecoder(codec_id, order=2)
    for x in walk(6):
        y = decoder.decode(encoder.encode(x))
        assert torch.equal(y.view(-1), encoder.state)


def loop_error(codec, values: list[torch.Tensor]) -> float:
    base, session, total = values[0].reshape(-1), opened(codec), 0.0
    for x in values[1:]:
        base = step(session, x.reshape(-1), (base,))
        total += float((x.reshape(-1) - base).square().sum())
    return total


def test_two_products_do_what_six_do_without_it():
    values = walk(24)
    assert loop_error(codecs.get("lowrank_int4", rank=6), values) < 1.01 * loop_error(Forgetful(6), values)


def test_residuals_that_change_their_character():
    """Everything remembered is useless: the first residual of another kind loses little, the next ones nothing."""
    session = opened(codecs.get("lowrank", rank=6))
    for x in walk(5):
        step(session, x.reshape(-1))
    g = torch.Generator().manual_seed(7)
    new = torch.randn(SHAPE[0], 6, generator=g) @ torch.randn(6, SHAPE[1], generator=g)
    x = (new + 0.05 * torch.randn(SHAPE, generator=g)).reshape(-1)
    out = step(session, x)
    best = torch.linalg.svdvals(x.view(SHAPE))[6:].square().sum()
    assert (x - out).square().sum() < 1.1 * best


@pytest.mark.parametrize("codec_id", CODECS)
def test_contraction_from_any_start(codec_id):
    """Directions that a residual has nothing of, or that are all one, cost quality and never more than the input."""
    codec = codecs.get(codec_id, rank=4)
    x = walk(1)[0].reshape(-1)
    for held in (torch.zeros(1, 6, SHAPE[1]), torch.ones(1, 6, SHAPE[1])):
        session = opened(codec)
        session._memory = {"calls": 3, "directions": held.bfloat16(), "shares": [0.5]}
        out = step(session, x)
        assert (x - out).square().sum() < x.square().sum()
