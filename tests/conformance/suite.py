"""torch's own DistributedTest, pointed at a plain group (gloo, or one with NCCL's manners) or at a compressed one.

Importing this module imports torch's test-suite, which reads its configuration from the environment; so it belongs in a
process of its own (``python -m tests.conformance``).

What differs from the way torch runs it:

* ``BACKEND`` is ``gloo`` while torch's file is imported, whatever is tested, so that the gates evaluated there (``skip
  if not gloo``, ``require backend``) let a compressed group try everything that gloo can do.
* Tests gated on MPI only because gloo once had no all-to-all on CPUs lose that gate.
* Ranks are forked, not spawned: 0.3 s a test instead of 3 s. Sound, as the parent has no threads and no group.
"""

from __future__ import annotations

import atexit
import functools
import json
import logging
import os
import re
import shutil
import tempfile
import time
import unittest
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WORLD_SIZE = 2
_SCRATCH = Path(tempfile.mkdtemp(prefix="conformance-"))
atexit.register(shutil.rmtree, _SCRATCH, ignore_errors=True)  # forked ranks run no exit handlers
os.environ.update(
    BACKEND="gloo",
    WORLD_SIZE=str(WORLD_SIZE),
    TEMP_DIR=str(_SCRATCH),
    INIT_METHOD="env://",
    OMP_NUM_THREADS="1",
    GLOO_SOCKET_IFNAME="lo",
    # what new_group() and everything else that takes no options gets from the backend named "compactdist"
    COMPACTDIST_CODEC="raw",
    COMPACTDIST_MIN_NUMEL="1",
)

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch.distributed import distributed_c10d as c10d  # noqa: E402
from torch.testing._internal import common_distributed  # noqa: E402
from torch.testing._internal.distributed import distributed_test  # noqa: E402

import compactdist  # noqa: E402
from compactdist.testing import act_like_nccl  # noqa: E402

RAW = compactdist.Options(codec="raw", min_numel=1)
TEST_TIMEOUT = 60
_MPI_ONLY = {"Only MPI supports CPU all_to_all_single", "Only MPI supports all_to_all"}
_NAME = "asks for the name 'gloo', 'mpi' or 'nccl'"
_BARRIER = "torch offers monitored_barrier only to a backend named 'gloo'"
_ANY_SOURCE = "NCCL cannot receive from any source"
_NOT_ON_NCCL = {
    "test_send_recv_any_source": _ANY_SOURCE,
    "test_send_recv_any_source_autograd_profiler": _ANY_SOURCE,
    "test_send_recv_any_source_torch_profiler": _ANY_SOURCE,
    "test_sparse_all_reduce_sum": "NCCL sums no sparse tensors",
}
# By kind of group: tests that are not run, with the reason that the document shows.
EXCLUDED: dict[str, dict[str, str]] = {
    "gloo": {},
    "wrapped": {},
    "int8": {},
    "nccl": _NOT_ON_NCCL,
    "nccl-wrapped": _NOT_ON_NCCL,
    "nccl-int8": _NOT_ON_NCCL,
    "backend": {
        "test_accumulate_gradients_no_sync": _NAME,
        "test_accumulate_gradients_no_sync_allreduce_hook": _NAME,
        "test_accumulate_gradients_no_sync_allreduce_with_then_hook": _NAME,
        "test_accumulate_gradients_no_sync_grad_is_view": _NAME,
        "test_monitored_barrier_gloo": _BARRIER,
        "test_monitored_barrier_gloo_subgroup": _BARRIER,
    },
}


@dataclass
class Outcome:
    """What became of one test under one kind of group.

    Attributes:
        status: ``passed``, ``skipped`` or ``failed``.
        reason: why it was skipped, or the first line of the failure.
        seconds: how long it took.
        compressed: calls that went through frames, all ranks and groups together, by operation.
        passed_through: calls that went to the inner group, by reason.
    """

    status: str
    reason: str = ""
    seconds: float = 0.0
    compressed: Counter[str] = field(default_factory=Counter)
    passed_through: Counter[str] = field(default_factory=Counter)

    def as_dict(self) -> dict[str, Any]:
        """Without times, and without what is empty, so that two runs give the same."""
        values = {
            "status": self.status,
            "reason": self.reason,
            "compressed": dict(sorted(self.compressed.items())),
            "passed_through": dict(sorted(self.passed_through.items())),
        }
        return {key: value for key, value in values.items() if value}


# ---- the rank's side: which group torch's tests get


_groups: list[Any] = []


def _observe(group: Any) -> Any:
    """Begin a step on a compressed group, so that its calls are compressed, and remember it."""
    if isinstance(group, compactdist.CompressedProcessGroup) and all(group is not g for g in _groups):
        _groups.append(group)
        group.step()
    return group


def _plain() -> None:
    """Gloo as it is."""


def integers_pass(info: compactdist.CallInfo) -> Any:
    """int8, for reductions too; with ``min_numel=1`` nothing but integers is left alone."""
    return "int8" if info.dtype.is_floating_point else compactdist.PASS


INT8 = compactdist.Options(codec="int8", keyframe="raw", min_numel=1, policy=integers_pass)


def _nccl(group: Any) -> Any:
    """A group with NCCL's manners over one that torch made, where this rank is a member."""
    return group if group is c10d.GroupMember.NON_GROUP_MEMBER else act_like_nccl(group)


def _over(make: Callable[[Any], Any]) -> Callable[[], None]:
    """Every group that torch makes is replaced by what ``make`` makes of it, the default group too."""

    def replace() -> None:
        init, new = dist.init_process_group, dist.new_group

        def init_process_group(*args: Any, **kwargs: Any) -> None:
            init(*args, **kwargs)
            c10d._update_default_pg(_observe(make(dist.group.WORLD)))

        def new_group(*args: Any, **kwargs: Any) -> Any:
            return _observe(make(new(*args, **kwargs)))

        _replace(init_process_group, new_group)

    return replace


def _backend() -> None:
    """The backend name "compactdist"; tests that compare names see it."""
    distributed_test.BACKEND = os.environ["BACKEND"] = "compactdist"
    init, new = dist.init_process_group, dist.new_group

    def init_process_group(*args: Any, **kwargs: Any) -> None:
        init(*args, **kwargs)
        _observe(dist.group.WORLD)

    def new_group(*args: Any, **kwargs: Any) -> Any:
        return _observe(new(*args, **kwargs))

    _replace(init_process_group, new_group)


def _replace(init_process_group: Callable[..., None], new_group: Callable[..., Any]) -> None:
    # torch's lists of backends whose profiler events it checks: what the backend records are frames
    for backends in (
        distributed_test.PROFILING_SUPPORTED_BACKENDS,
        distributed_test.CUDA_PROFILING_SUPPORTED_BACKENDS,
        distributed_test.SEND_RECV_PROFILING_SUPPORTED_BACKENDS,
    ):
        backends.clear()
    for module in (dist, c10d):
        module.init_process_group = init_process_group
        module.new_group = new_group


GROUPS: dict[str, Callable[[], None]] = {
    "gloo": _plain,
    "wrapped": _over(lambda group: compactdist.wrap(group, options=RAW)),
    "backend": _backend,
    "int8": _over(lambda group: compactdist.wrap(group, options=INT8)),
    "nccl": _over(_nccl),
    "nccl-wrapped": _over(lambda group: compactdist.wrap(_nccl(group), options=RAW)),
    "nccl-int8": _over(lambda group: compactdist.wrap(_nccl(group), options=INT8)),
}


def _write_counts(path: Path) -> None:
    compressed: Counter[str] = Counter()
    passed: Counter[str] = Counter()
    for group in _groups:
        stats = group.stats()
        passed.update(stats.passed_reasons)
        for site in stats.sites.values():
            compressed[site.op] += site.calls
    path.write_text(json.dumps({"compressed": +compressed, "passed_through": passed}))


# ---- the parent's side


def _ungated(test: Callable[..., Any]) -> Callable[..., Any]:
    """The test without its "only MPI" gate, which is an attribute that unittest looks for."""
    if getattr(test, "__unittest_skip_why__", None) not in _MPI_ONLY:
        return test

    @functools.wraps(test)
    def ungated(*args: Any, **kwargs: Any) -> Any:
        return test(*args, **kwargs)

    del ungated.__unittest_skip__, ungated.__unittest_skip_why__
    return ungated


def _suite_class(kind: str) -> type[unittest.TestCase]:
    class Conformance(distributed_test.TestDistBackend, distributed_test.DistributedTest._DistTestBase):
        def setUp(self) -> None:
            super().setUp()
            self._start_processes(torch.multiprocessing.get_context("fork").Process)

        @classmethod
        def _run(cls, rank: int, test_name: str, file_name: str, pipe: Any, **kwargs: Any) -> None:
            with open(_SCRATCH / "output.txt", "ab") as output:  # torch's profiler prints a lot
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
            try:
                GROUPS[kind]()
                super()._run(rank, test_name, file_name, pipe, **kwargs)
            finally:
                _write_counts(_SCRATCH / f"counts.{rank}.json")

    for name in test_names():
        setattr(Conformance, name, _ungated(getattr(Conformance, name)))
    return Conformance


def test_names() -> list[str]:
    """All tests of torch's class."""
    return sorted(name for name in dir(distributed_test.DistributedTest._DistTestBase) if name.startswith("test_"))


def _first_line(text: str) -> str:
    """What failed, on one line that is the same in every run."""
    if "terminated or timed out" in text and "Traceback" not in text.split("terminated or timed out", 1)[1]:
        return f"no end within {TEST_TIMEOUT} s"
    blocks = text.split("Traceback (most recent call last):")
    blocks = blocks[2:] if len(blocks) > 2 and "exited with error code" in text else blocks[-1:]
    for line in blocks[0].splitlines():
        if re.match(r"[A-Za-z_][\w.]*(: |$)", line):
            return re.sub(r":\d{4,5}\b", "", line)[:200]
    return text.strip().splitlines()[-1][:200]


def run_test(cls: type[unittest.TestCase], name: str) -> Outcome:
    """Run one test on two ranks."""
    for old in _SCRATCH.glob("counts.*.json"):
        old.unlink()
    result = unittest.TestResult()
    case = cls(name)
    began = time.monotonic()
    case.run(result)
    seconds = time.monotonic() - began
    for process in getattr(case, "processes", ()):
        process.kill()
    wrong = result.failures + result.errors
    if wrong:
        outcome = Outcome("failed", _first_line(wrong[0][1]), seconds)
    elif result.skipped:
        outcome = Outcome("skipped", " ".join(result.skipped[0][1].split()), seconds)
    else:
        outcome = Outcome("passed", "", seconds)
    for path in _SCRATCH.glob("counts.*.json"):
        counts = json.loads(path.read_text())
        outcome.compressed.update(counts["compressed"])
        outcome.passed_through.update(counts["passed_through"])
    return outcome


def run(kind: str, names: Sequence[str], report: Callable[[str, Outcome], None]) -> dict[str, Outcome]:
    """Run tests under one kind of group, one after the other."""
    torch.set_num_threads(1)
    logging.getLogger(common_distributed.__name__).setLevel(logging.WARNING)
    common_distributed.TIMEOUT_DEFAULT = TEST_TIMEOUT
    common_distributed.TIMEOUT_OVERRIDE.clear()
    cls = _suite_class(kind)
    outcomes = {}
    for name in names:
        excluded = EXCLUDED[kind].get(name)
        outcomes[name] = Outcome("skipped", excluded) if excluded else run_test(cls, name)
        report(name, outcomes[name])
    return outcomes
