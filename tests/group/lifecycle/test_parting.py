"""A rank that leaves by an error says which, at once: a launcher may end the process before Python shows it."""

from __future__ import annotations

import logging

import pytest
import torch.distributed

from compactdist.errors import NonFiniteError
from tests.group.kit import told
from tests.group.lifecycle import kit
from tests.launch import run_ranks


def heard(body):
    """Run ``body(rank)`` on two ranks, where it may raise; the messages of level error on each."""

    def listening(rank, size):
        lines = told(logging.ERROR)
        body(rank)
        return lines

    return run_ranks(listening, 2, timeout=40)


@pytest.mark.parametrize("destroyed", [False, True])
def test_an_error_of_ours_is_told_with_its_rank(destroyed):
    def body(rank):
        dist = kit.wrap()

        def loop():
            try:
                for t in range(3):
                    with dist.step():
                        kit.gather(dist, kit.tensor(rank, t) * (float("nan") if t == rank == 1 else 1))
            finally:
                torch.distributed.destroy_process_group(dist) if destroyed else dist.close()

        with pytest.raises(NonFiniteError):
            loop()

    for rank, lines in enumerate(heard(body)):
        assert len(lines) == 1
        assert f"rank {rank}, site 'all_gather#0'" in lines[0]
        assert "NaN" in lines[0]


def test_another_error_is_told_with_rank_and_step():
    def body(rank):
        error = ZeroDivisionError("a user's own") if rank else RuntimeError("Connection closed by peer")

        def loop():
            with kit.wrap() as dist:
                for _ in range(3):
                    dist.step()
                raise error

        with pytest.raises(type(error)):
            loop()

    lost, own = heard(body)
    assert "rank 0: closed at step 2 by RuntimeError('Connection closed by peer')" in lost[0]
    assert "a message larger than it expected" in lost[0]
    assert "rank 1: closed at step 2 by ZeroDivisionError" in own[0]
    assert own[0].endswith(")")


def test_closing_without_an_error_tells_nothing():
    def body(rank):
        with kit.wrap() as dist, dist.step():
            kit.gather(dist, kit.tensor(rank))
        kit.wrap().close()

    assert heard(body) == [[], []]
