"""The codec with several rates: which rungs it takes, and sessions that change the rate."""

from __future__ import annotations

import pytest
import torch

from compactdist import codecs
from compactdist.errors import CodecConfigError
from compactdist.kernels.spec import MatrixView

VIEW = MatrixView(40 * 64, 1, 40, 64)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"rungs": "int4"}, "takes 2 to 255 rungs, got 1"),
        ({"rungs": "int4+int2"}, "ascending order"),
        ({"rungs": "int2+transform:bits=4"}, "all scalar quantizers"),
        ({"rungs": "int2:scales=token_history+int4"}, "without scales='token_history'"),
        ({"rungs": "transform:bits=1+transform:bits=2,block=64"}, "one block"),
        ({"rungs": "lowrank_int4+lowrank"}, "all scalar quantizers"),
        ({"start": 99}, "start must be an integer from 0"),
        ({"start": True}, "start must be an integer from 0"),
    ],
)
def test_ladders_that_do_not_hold(options, text):
    with pytest.raises(CodecConfigError, match=text):
        codecs.get("rates", **options)


def test_ladders_as_text_and_as_configuration():
    ladder = codecs.get("rates:rungs=binary+int2:scales=block+int8,start=1")
    assert ladder == codecs.get({"id": "rates", **ladder.get_config()})
    assert ladder.start_rate == 1
    assert [ladder.at(rate).codec_id for rate in (1, 2, 3)] == ["binary", "int2", "int8"]
    assert codecs.get("rates").get_config() == {"rungs": "transform"}
    assert codecs.get("rates").fingerprint() != ladder.fingerprint()


@pytest.mark.parametrize("ladder", ["transform", "scalar"])
def test_a_session_is_that_of_the_rung_and_keeps_its_basis(ladder):
    codec = codecs.get({"id": "rates", "rungs": ladder})
    ends = [codec.open(VIEW, torch.float32, torch.device("cpu")) for _ in range(2)]
    g = torch.Generator().manual_seed(0)
    base = torch.randn(VIEW.numel, generator=g)
    for rate in (1, codec.rates, 2, 2):
        for end in ends:
            end.set_rate(rate)
        assert ends[0].payload_nbytes == codec.at(rate).payload_nbytes(VIEW.shape, torch.float32)
        held = [one.clone() for one in ends[0].shared_memory]
        x = base + 0.1 * torch.randn(VIEW.numel, generator=g)
        payload, ours, theirs = torch.empty(ends[0].payload_nbytes, dtype=torch.uint8), x.clone(), x.clone()
        ends[0].encode(x, (base,), ours, payload)
        ends[1].decode(payload, (base,), theirs)
        assert torch.equal(ours, theirs)
        if not held:  # nothing learnt: the frame is one of the rung alone
            alone = codec.at(rate).open(VIEW, torch.float32, torch.device("cpu"))
            alone.decode(payload, (base,), theirs)
            assert torch.equal(ours, theirs)
        for end in ends:
            end.commit()
        assert all(map(torch.equal, *(end.shared_memory for end in ends)))
        base = ours
    assert bool(ends[0].shared_memory) == (ladder == "transform")
    assert ends[0].held_bytes == sum(one.nbytes for one in ends[0].shared_memory)


def test_a_codec_of_one_rate_changes_none():
    session = codecs.get("int4").open(VIEW, torch.float32, torch.device("cpu"))
    with pytest.raises(CodecConfigError, match="just one rate, and 2 was asked for"):
        session.set_rate(2)
