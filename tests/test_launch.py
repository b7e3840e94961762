"""The launcher itself: results, failures, hangs and deaths are told apart, and nothing is left running."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from multiprocessing import resource_tracker
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.launch import run_ranks


def children():
    """Every child of this process, running or a zombie."""
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()


@pytest.fixture(autouse=True)
def _no_process_left():
    resource_tracker.ensure_running()  # "spawn" starts it, once per process and for good
    before = children()
    yield
    assert multiprocessing.active_children() == []
    assert children() == before


def module_level(rank, world_size, offset):
    x = torch.full((2,), float(rank))
    dist.all_reduce(x)
    return rank + offset, x


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_results_come_in_rank_order(world_size):
    results = run_ranks(module_level, world_size, args=(10,))
    assert [r for r, _ in results] == [10 + rank for rank in range(world_size)]
    total = float(sum(range(world_size)))
    assert all(torch.equal(x, torch.full((2,), total)) for _, x in results)


def test_a_closure_can_be_run_and_large_results_come_back():
    shift = torch.arange(1_000_000)
    results = run_ranks(lambda rank, world_size: shift + rank)
    assert torch.equal(results[1], shift + 1)


def test_spawned_ranks_give_the_same_results():
    assert [r for r, _ in run_ranks(module_level, args=(1,), start_method="spawn")] == [1, 2]


def test_init_false_leaves_the_group_to_the_body_again_and_again(tmp_path):
    def body(rank, world_size):
        assert not dist.is_initialized()
        seen = []
        for turn in range(2):
            # a store each: behind one port, a rank that is early would meet the store that another has yet to close
            dist.init_process_group("gloo", f"file://{tmp_path}/{turn}", rank=rank, world_size=world_size)
            x = torch.ones(1)
            dist.all_reduce(x)
            seen.append(x.item())
            dist.barrier()
            dist.destroy_process_group()
        return seen

    assert run_ranks(body, 2, init=False) == [[2.0, 2.0]] * 2


def test_an_exception_names_its_rank_and_line():
    def body(rank, world_size):
        if rank == 1:
            raise ValueError("the reason")

    with pytest.raises(AssertionError) as info:
        run_ranks(body, 3)
    text = str(info.value)
    assert "1 of 3 ranks failed (rank 1: ValueError)" in text
    assert "ValueError: the reason" in text
    assert "test_launch.py" in text
    assert "--- rank 0 ---" not in text


def test_every_rank_that_fails_is_shown():
    def body(rank, world_size):
        time.sleep(0.2 * rank)
        raise RuntimeError(f"from {rank}")

    with pytest.raises(AssertionError, match="2 of 2 ranks failed") as info:
        run_ranks(body)
    assert "RuntimeError: from 0" in str(info.value)
    assert "RuntimeError: from 1" in str(info.value)


def test_a_failure_frees_the_ranks_that_wait_for_it():
    def body(rank, world_size):
        if rank == 0:
            raise KeyError("early")
        dist.barrier()

    started = time.monotonic()
    first, second = run_ranks(body, expect_error=True)
    assert time.monotonic() - started < 10
    assert first.error_type == "KeyError"
    assert second.error_type == "RuntimeError"  # gloo: connection closed by peer
    assert (first.exitcode, second.exitcode) == (1, 1)


def test_a_hang_is_killed_in_time_and_shows_its_stack():
    def stuck_here(rank, world_size):
        if rank == 1:
            time.sleep(3600)
        return "done"

    started = time.monotonic()
    with pytest.raises(AssertionError) as info:
        run_ranks(stuck_here, timeout=1.5)
    assert time.monotonic() - started < 5
    text = str(info.value)
    assert "rank 1: Hang" in text
    assert "still running after 1.5 s" in text
    assert "in stuck_here" in text


def test_a_hang_in_a_collective_shows_its_stack():
    def waits_alone(rank, world_size):
        if rank == 0:
            dist.barrier()

    zero, one = run_ranks(waits_alone, timeout=1.5, pg_timeout=30, expect_error=True)
    assert zero.error_type == "Hang"
    assert "waits_alone" in zero.error_text
    assert zero.exitcode == -signal.SIGKILL
    assert one.ok


@pytest.mark.parametrize("sig", [signal.SIGKILL, signal.SIGSEGV])
def test_a_rank_killed_by_a_signal_is_reported_as_such(sig):
    def body(rank, world_size):
        if rank == 0:
            os.kill(os.getpid(), sig)
        return "alive"

    zero, one = run_ranks(body, expect_error=True)
    assert zero.error_type == "Killed"
    assert sig.name in zero.error_text
    assert zero.exitcode == -sig
    assert (one.ok, one.value, one.exitcode) == (True, "alive", 0)


def test_a_rank_that_leaves_without_a_result_is_reported():
    zero, one = run_ranks(lambda rank, world_size: os._exit(7) if rank == 0 else None, expect_error=True)
    assert (zero.error_type, zero.exitcode) == ("Exited", 7)
    assert one.ok


def test_a_result_that_cannot_be_pickled_is_an_error_of_its_rank():
    zero, _ = run_ranks(lambda rank, world_size: lambda: None, expect_error=True)
    assert zero.error_type is not None
    assert "pickle" in zero.error_text.lower()


def test_a_group_in_the_parent_is_refused(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with pytest.raises(RuntimeError, match="must not hold a process group"):
            run_ranks(module_level, args=(0,))
    finally:
        dist.destroy_process_group()


def test_a_call_costs_little():
    run_ranks(lambda rank, world_size: None)
    started = time.monotonic()
    for _ in range(5):
        run_ranks(lambda rank, world_size: None)
    assert (time.monotonic() - started) / 5 < 1.0
