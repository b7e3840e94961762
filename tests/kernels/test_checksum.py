"""The compiled checksum gives the sum that the reference defines, wherever data and copy begin and end."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compactdist import kernels
from compactdist.kernels.cpu.steps import STREAMED_NBYTES
from compactdist.kernels.reference.checksum import weighted_sum

CPU = torch.device("cpu")
SIZES = (0, 4, 60, 64, 256, 260, 4096, 4100, 1_000_004, STREAMED_NBYTES - 4, STREAMED_NBYTES, STREAMED_NBYTES + 252)
STARTS = (0, 1, 2, 4, 16, 64)
ROOM = 64
"""Bytes around a copy, which it must leave as they are. Memory of torch begins a cache line."""


def data(nbytes: int) -> Tensor:
    g = torch.Generator().manual_seed(nbytes)
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=g)


@pytest.mark.parametrize("nbytes", SIZES)
@pytest.mark.parametrize("threads", [1, 2])
def test_sums_and_copies_from_anywhere_to_anywhere(nbytes: int, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
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
    finally:
        torch.set_num_threads(before)


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
