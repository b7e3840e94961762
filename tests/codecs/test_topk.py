"""The places and values on the wire, by hand."""

from __future__ import annotations

import torch

from compactdist import codecs
from tests.codecs import kit


def test_known_bytes():
    x = torch.tensor([[1.0, -2.0, 0.5, 3.0, 0.0, 0.0]])
    payload = codecs.get("topk", m=2).encode(x)
    # places 1, 1, 0; values -2, 3, 0
    assert payload.tolist() == [0x11, 0x00, *[0] * 14, 0x00, 0xC0, 0x40, 0x40, *[0] * 12]


def test_keeps_the_largest_and_nothing_else():
    x = kit.sample("gaussian", (2, 7, 9))
    y = kit.round_trip(codecs.get("topk", m=5), x)
    for group in range(2):
        for run, back in zip(x[group].reshape(-1).split(5), y[group].reshape(-1).split(5), strict=True):
            place = int(run.abs().argmax())
            assert back[place] == run[place].bfloat16().float()
            assert int(back.count_nonzero()) == 1


def test_sections():
    topk, hybrid = codecs.get("topk"), codecs.get("topk_int4")
    assert topk.payload_nbytes((1088, 3072), torch.float16) == 1088 * 3072 * 20 // 8 // 8
    assert hybrid.payload_nbytes((1088, 3072), torch.float16) == 1088 * 3072 // 8 + 2 * 1088 * 3072 // 8 // 128
    assert topk.payload_nbytes((3, 5, 3), torch.float16) == 16 + 16


def test_a_place_out_of_range_writes_nothing():
    codec = codecs.get("topk", m=3)
    payload = codec.encode(torch.ones(3))
    payload[0] = 9
    assert not codec.decode(payload, (3,), torch.float32).any()
