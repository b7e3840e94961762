"""A steady call on a device reads nothing back: every collective, on two ranks."""

from __future__ import annotations

import sys
import threading
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

import compactdist
from benchmarks.gpu.collectives import CALLS, Run
from compactdist.errors import FrameError, NonFiniteError
from compactdist.kernels import use
from compactdist.state import decoder, encoder
from compactdist.state.host_copy import HostCopy
from compactdist.testing import act_like_nccl
from tests.kernels.gpu.conftest import INTERPRETED
from tests.launch import run_ranks

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="on a GPU benchmarks.gpu.host counts what waits")

READS = ("cpu", "numpy", "item", "tolist", "__bool__", "__int__", "__float__", "__index__")
BY_ADDRESS = ((decoder, "bytes_at"), (encoder, "seal"), (encoder, "write_head"))
"""Where the host itself looks at a header, or writes one with a checksum that it knows."""
READ_BY_TORCH = "all_gather_object"
"""torch itself reads how long the pickles are, and their bytes."""
STEADY = 2
"""The step from which on nothing is compiled, searched or learnt."""
TRANSFORMS = {"id": "rates", "rungs": ["transform:block=8,bits=1,trellis=true", "transform:block=8,bits=4"]}


class NoReads(TorchDispatchMode):
    """An error for every value that this thread takes from a tensor, but for what the interpreter of kernels takes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        from triton.runtime.interpreter import InterpretedFunction

        self.armed, self.thread, self.launches = False, threading.get_ident(), 0
        self.torch_may, self.step = False, 0
        for name in READS:
            monkeypatch.setattr(torch.Tensor, name, self._guarded(name, getattr(torch.Tensor, name)))
        for module, name in BY_ADDRESS:  # not through a tensor, where its memory is the host's
            monkeypatch.setattr(module, name, self._guarded(name, getattr(module, name)))
        self._let_copies_be_read(monkeypatch)
        run = InterpretedFunction.run

        def launched(*args: Any, **kwargs: Any) -> Any:
            armed, self.armed = self.armed, False
            self.launches += 1
            try:
                return run(*args, **kwargs)
            finally:
                self.armed = armed

        monkeypatch.setattr(InterpretedFunction, "run", launched)

    def _let_copies_be_read(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """What was copied to the host in an earlier step may be read: nobody waits for it."""
        begun: dict[int, tuple[HostCopy, int]] = {}
        begin, real = HostCopy.__init__, HostCopy.read

        def init(copy: HostCopy, values: torch.Tensor) -> None:
            begin(copy, values)
            begun[id(copy)] = copy, self.step

        def read(copy: HostCopy) -> list[float]:
            if not self.armed or threading.get_ident() != self.thread:
                return real(copy)
            assert begun[id(copy)][1] < self.step, "the host reads what was copied in this step"
            self.armed = False
            try:
                return real(copy)
            finally:
                self.armed = True

        monkeypatch.setattr(HostCopy, "__init__", init)
        monkeypatch.setattr(HostCopy, "read", read)

    def _guarded(self, name: str, real: Any) -> Any:
        def read(*args: Any, **kwargs: Any) -> Any:
            if not self.armed or threading.get_ident() != self.thread:
                return real(*args, **kwargs)
            caller = sys._getframe(1).f_globals["__name__"]
            of_torch = self.torch_may and caller.startswith("torch.distributed.")
            assert of_torch, f"the host reads by {name}"
            self.armed = False
            try:
                return real(*args, **kwargs)
            finally:
                self.armed = True

        return read

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not (self.armed and "_local_scalar_dense" in str(func)), "the host reads a scalar"
        return func(*args, **(kwargs or {}))


@pytest.mark.timeout(360)
@pytest.mark.parametrize(("codec", "part"), [*(("int8", part) for part in range(4)), ("int2:scales=block", 3)])
def test_no_collective_reads_in_a_keyframe_or_a_steady_step(codec, part):
    """Every collective with one codec; what another launches does not depend on the collective, so some are enough."""
    _reads_nothing(codec, dict(list(CALLS.items())[part::4]))


@pytest.mark.parametrize("codec", ["topk", "topk_int4", "lowrank_int4:rank=2", "int2:scales=token_history"])
def test_other_codecs_read_nothing_either(codec):
    name = "all_gather_into_tensor"
    _reads_nothing(codec, {name: CALLS[name]})


@pytest.mark.parametrize("name", ["all_gather_into_tensor", "all_to_all_single", "send, recv", "broadcast"])
def test_the_coefficient_of_a_frame_is_chosen_and_read_on_the_device(name):
    _reads_nothing("int8", {name: CALLS[name]}, order="auto")


@pytest.mark.parametrize(
    ("name", "codec", "target"),
    [
        ("all_gather_into_tensor", "rates:rungs=scalar", "nmse_db=-26"),
        ("all_to_all_single", "rates:rungs=scalar", "bits=3"),
        ("send, recv", "rates:rungs=scalar", "nmse_db=-26"),
        (
            "all_gather_into_tensor",
            TRANSFORMS,
            "bits=3",
        ),
        ("broadcast", "rates:rungs=scalar", None),
    ],
)
def test_rates_go_by_what_was_copied_in_earlier_steps(name, codec, target):
    _reads_nothing(codec, {name: CALLS[name]}, target=target)


def test_errors_are_sampled_without_a_read():
    _reads_nothing("int8", {name: CALLS[name] for name in ("broadcast", "all_to_all_single")}, sample_errors_every=1)


@pytest.mark.timeout(360)
@pytest.mark.parametrize("codec", ["int8", "raw"])
def test_no_keyframe_of_the_tensors_own_bytes_is_read(codec):
    _reads_nothing(codec, CALLS, steps=(0,), keyframe="raw")


def test_no_message_that_requires_grad_is_read_where_it_goes_as_it_is():
    calls = {"send, recv": (_send_with_grad, 0)}
    _reads_nothing("raw", calls, passed=calls)


def _send_with_grad(run):
    if run.rank:
        dist.recv(out := run.nothing(), group=run.group, group_src=0)
        assert torch.equal(out, run.x(0))
    else:
        dist.send(run.mine().requires_grad_(), group=run.group, group_dst=1)


@pytest.mark.parametrize(
    ("codec", "name", "options"),
    [
        ("int8", "all_gather_into_tensor", {"state_budget_bytes": 1 << 30}),
        ("int8", "all_gather_into_tensor", {"error_feedback": False}),
    ],
    ids=["a budget", "open loop"],
)
def test_where_the_host_looks_into_a_keyframe_it_is_noticed(codec, name, options):
    with pytest.raises(Exception, match="the host reads"):
        _reads_nothing(codec, {name: CALLS[name]}, steps=(0,), **options)


def _reads_nothing(codec, calls, steps=(0, STEADY), passed=(), **options):
    """No call reads in these steps of a second request; the first one has compiled and made tables.

    ``passed``: those that have frames and are counted as passed through.
    """

    def body(rank, world_size):
        warnings.simplefilter("ignore")
        launched: dict[str, list[int]] = {}
        with use("gpu"), pytest.MonkeyPatch.context() as patch, NoReads(patch) as reads:
            group = compactdist.wrap(act_like_nccl(dist.group.WORLD), codec, min_numel=64, **options)
            for name, (made, frames) in calls.items():
                reads.torch_may = name == READ_BY_TORCH
                run, launched[name] = Run(group, rank, torch.device("cpu"), numel=8 * 96), []
                for watched in (False, True):
                    group.reset()
                    for run.step in range(1 + (steps[-1] if watched else 0)):
                        group.step()
                        reads.step = run.step
                        reads.launches, counted = 0, group.stats().compressed_calls
                        reads.armed = watched and run.step in steps
                        made(run)
                        if reads.armed:
                            launched[name].append(reads.launches)
                        reads.armed = False
                        assert group.stats().compressed_calls - counted == frames, name
            group.close()
        return launched

    for launched in run_ranks(body, world_size=2, timeout=300):
        assert list(launched) == list(calls)
        for name, counts in launched.items():
            assert len(counts) == len(steps), name
            has_frames = calls[name][1] > 0 or name in passed
            assert all((count > 0) == has_frames for count in counts), (name, counts)


def test_reading_is_noticed():
    with pytest.MonkeyPatch.context() as patch, NoReads(patch) as reads:
        x = torch.ones(3)
        reads.armed = True
        for read in (lambda: x[0].item(), lambda: bool(x[0]), lambda: x.numpy(), lambda: x.sum().tolist()):
            with pytest.raises(AssertionError, match="the host reads"):
                read()
        reads.armed = False


def _gather(group: Any, x: torch.Tensor) -> torch.Tensor:
    out = torch.empty(2 * x.numel(), dtype=x.dtype)
    group.all_gather_into_tensor(out, x)
    return out


def test_a_group_raises_at_a_later_step_and_goes_on_after_a_reset():
    def body(rank, world_size):
        with use("gpu"):
            group = compactdist.wrap(dist.group.WORLD, "int4", min_numel=64, find_layout=False)
            x = torch.linspace(-1, 1, 1280)
            for step in range(3):
                group.step()
                _gather(group, x + 0.01 * step)
            group.step()
            x_bad = x.clone()
            if rank == 0:
                x_bad[5] = torch.inf
            out = _gather(group, x_bad)
            assert out.view(2, -1)[0].isnan().all() == (rank == 1)
            assert out.view(2, -1)[1].isfinite().all()
            with pytest.raises(NonFiniteError, match=r"in step 3 .*NaN or Inf"):
                group.step()
            group.step()
            assert (_gather(group, x) - torch.cat([x, x])).abs().max() < 0.1
            group.check()
            if rank == 1:  # as if a frame had been lost
                decoder = group._engine.store.sites()[0].decoder(0)
                decoder.sequence += 1
            group.step()
            out = _gather(group, x)
            if rank == 1:
                assert out.view(2, -1)[0].isnan().all()
                with pytest.raises(FrameError, match=r"frame from rank 0: wrong sequence .*reset\(\)"):
                    group.stats()
            group.reset()
            for _ in range(3):
                group.step()
                assert (_gather(group, x) - torch.cat([x, x])).abs().max() < 0.1
            group.check()
            group.close()

    run_ranks(body, world_size=2, timeout=120)


def test_no_rank_keeps_a_chunk_of_sums_that_are_not_finite():
    """Every rank gets NaN for it, the rank whose chunk it is, too, and none gets what it had before."""

    def body(rank, world_size):
        with use("gpu"):
            policy = [compactdist.Rule(op="all_reduce", codec="int8")]
            group = compactdist.wrap(dist.group.WORLD, "int4", min_numel=64, find_layout=False, policy=policy)
            for step in range(4):
                group.step()
                x = torch.linspace(-1, 1, 1280) + 0.01 * step
                if step == 3 and rank == 0:
                    x[5], x[700] = torch.inf, torch.nan
                group.all_reduce(x)
                assert x.isnan().all() if step == 3 else x.isfinite().all()
            with pytest.raises(NonFiniteError, match="in step 3"):
                group.step()
            group.reset()
            group.close()

    run_ranks(body, world_size=2, timeout=120)
