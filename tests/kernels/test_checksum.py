"""The compiled checksum gives the sum that the reference defines, wherever data and copy begin and end."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from compactdist import codecs, kernels
from compactdist.kernels.cpu.steps import STREAMED_NBYTES
from compactdist.kernels.reference.checksum import weighted_sum
from compactdist.state import plain
from tests.quick import quick_rows

CPU = torch.device("cpu")
SIZES = (0, 4, 60, 256, 260, 4100, STREAMED_NBYTES - 4, STREAMED_NBYTES + 252)
STARTS = (0, 1, 4, 64)
ROOM = 64
"""Bytes around a copy, which it must leave as they are. Memory of torch begins a cache line."""


def data(nbytes: int) -> Tensor:
    g = torch.Generator().manual_seed(nbytes)
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=g)


@pytest.mark.parametrize("nbytes", SIZES)
def test_sums_and_copies_from_anywhere_to_anywhere(nbytes: int) -> None:
    with kernels.use("cpu"):
        checksum = kernels.checksum_for(nbytes, CPU)
    assert checksum is not weighted_sum
    for start in STARTS:
        words = data(start + nbytes)[start:]
        expected = weighted_sum(words.clone())
        assert checksum(words) == expected
        for to in STARTS:
            room = torch.full((to + nbytes + ROOM,), 0xA5, dtype=torch.uint8)
            assert checksum(words, room[to : to + nbytes]) == expected
            assert room[to : to + nbytes].equal(words)
            assert (room[:to] == 0xA5).all()
            assert (room[to + nbytes :] == 0xA5).all()


def test_every_word_counts() -> None:
    words = torch.zeros(65 * 4, dtype=torch.uint8)
    with kernels.use("cpu"):
        checksum = kernels.checksum_for(words.numel(), CPU)
    for at in range(words.numel()):
        words[at] = 255
        assert checksum(words) == weighted_sum(words) != 0
        words[at] = 0


def test_the_reference_copies_too() -> None:
    words, room = data(1001), torch.zeros(1001, dtype=torch.uint8)
    assert weighted_sum(words, room) == weighted_sum(words)
    assert room.equal(words)


@pytest.mark.parametrize(
    ("codec_id", "scales"),
    quick_rows([("int4", "block")], itertools.product(["int4", "int8"], ["token_channel", "block"])),
)
def test_encoders_sum_up_what_they_write(codec_id: str, scales: str) -> None:
    for rows, channels in ((300, 64), (300, 96), (100, 77), (1, 70_000), (3, 5)):
        view = plain(rows * channels, 1, channels)
        x, base = torch.randn(2, view.numel, generator=torch.Generator().manual_seed(channels)).bfloat16()
        with kernels.use("cpu"):
            session = codecs.get(codec_id, scales=scales).open(view, x.dtype, CPU)
            payload = torch.empty(session.payload_nbytes, dtype=torch.uint8)
            for out in (torch.empty_like(x), None):
                session.encode(x, (base,), out, payload)
                assert session.checksum == (None if rows > 1 and channels % 16 else weighted_sum(payload))


@pytest.mark.parametrize("writes", [False, True])
def test_signs_are_summed_up_by_the_pass_that_writes_the_reconstruction(writes: bool) -> None:
    with kernels.use("cpu"):
        session = codecs.get("binary").open(plain(1 << 14, 1, 128), torch.float32, CPU)
        x, out = torch.randn(2, 1 << 14)
        payload = torch.empty(session.payload_nbytes, dtype=torch.uint8)
        session.encode(x, (), out if writes else None, payload)
    assert session.checksum == (weighted_sum(payload) if writes else None)
