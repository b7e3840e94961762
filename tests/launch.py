"""Runs a test function on several ranks, each a process of its own.

Every test that needs more than one rank goes through `run_ranks`:

    def test_sum():
        def body(rank, world_size):
            x = torch.full((4,), float(rank))
            torch.distributed.all_reduce(x)
            return x
        for x in run_ranks(body, world_size=3):
            assert x.sum() == 12

Ranks are forked, so `body` may be a closure and nothing is imported again: a call costs tens of milliseconds.
Forking is sound because the parent runs torch on one thread (see conftest.py) and never joins a process group
itself; both are checked. Where the parent holds a CUDA context, fork cannot work: pass `start_method="spawn"`
and a module-level function.

What a test can rely on:

* Results come back in rank order, by value (`pickle`); each rank starts with `torch.manual_seed(rank)`.
* MASTER_ADDR, MASTER_PORT, RANK, LOCAL_RANK, WORLD_SIZE are set, so `init=False` bodies can call
  `init_process_group("compactdist")` themselves. The port is held by the parent and cannot be lost to a race.
* No rank begins before the group stands on every rank, and none exits (closing its connections) before all
  have finished. After a failure, the finished ones are let go `LINGER` seconds later, and those still running
  have `GRACE` seconds to end by themselves.
* A hang ends after `timeout` seconds with the stack of every thread of every rank that was still running.
* When `run_ranks` returns or raises, for whatever reason, none of its processes exists any more.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed

START = 30.0  # seconds to form a group, however short its own timeout: ranks of a busy machine begin late
LINGER = 1.0  # seconds a failed rank stays connected, so that the others can meet their own error first
GRACE = 5.0  # seconds the others then have to finish before they are killed
READY = b"ready"  # what a rank sends before it begins
DUMP = 0.5  # seconds a rank has to write its stacks before it is killed


@dataclass
class Outcome:
    """How one rank ended."""

    rank: int
    value: Any = None
    error_type: str | None = None
    """Class name of the exception; `"Killed"` for a rank ended by a signal, `"Hang"` for one ended by the
    launcher, `"Exited"` for one that left without a result; None for success."""
    error_text: str = ""
    """The traceback, or what is known instead."""
    exitcode: int | None = None
    """As in `multiprocessing`: 0, a positive exit status, or minus the signal that ended the rank."""

    @property
    def ok(self) -> bool:
        return self.error_type is None


def run_ranks(
    fn: Callable[..., Any],
    world_size: int = 2,
    *,
    backend: str = "gloo",
    args: tuple[Any, ...] = (),
    timeout: float = 120.0,
    init: bool = True,
    pg_timeout: float | None = None,
    expect_error: bool = False,
    start_method: str = "fork",
) -> list[Any]:
    """Run `fn(rank, world_size, *args)` on `world_size` ranks and return their results in rank order.

    Args:
        fn: The body of a rank; any callable with "fork", else a module-level function.
        world_size: How many ranks.
        backend: For `init_process_group`.
        args: Further arguments of `fn`.
        timeout: Seconds after which ranks still running are shown and killed.
        init: Whether the default group exists when `fn` begins.
        pg_timeout: Timeout of that group in seconds once it stands; `timeout` when None.
        expect_error: Return an `Outcome` per rank and raise nothing.
        start_method: "fork", "spawn", or "forkserver", which forks from a process that was started before.

    Raises:
        AssertionError: A rank failed, died or hung; the message holds every failing rank's traceback.
    """
    __tracebackhide__ = True
    group = (backend, pg_timeout or timeout) if init else None
    outcomes = _run(fn, world_size, group, args, timeout, start_method)
    if expect_error:
        return outcomes
    failed = [o for o in outcomes if not o.ok]
    if failed:
        raise AssertionError(_report(failed, world_size))
    return [o.value for o in outcomes]


def _report(failed: list[Outcome], world_size: int) -> str:
    summary = ", ".join(f"rank {o.rank}: {o.error_type}" for o in failed)
    parts = [f"{len(failed)} of {world_size} ranks failed ({summary})"]
    parts += [f"--- rank {o.rank} ---\n{o.error_text.rstrip()}" for o in failed]
    return "\n".join(parts)


# ---- the parent's side


@dataclass
class _Rank:
    process: Any  # multiprocessing's Process types differ per start method
    conn: Connection
    dump: Path
    ready: bool = False
    outcome: Outcome | None = None


def _run(
    fn: Callable[..., Any],
    world_size: int,
    group: tuple[str, float] | None,
    args: tuple[Any, ...],
    timeout: float,
    start_method: str,
) -> list[Outcome]:
    _check_parent(start_method)
    context: Any = multiprocessing.get_context(start_method)
    deadline = time.monotonic() + timeout
    ranks: list[_Rank] = []
    with tempfile.TemporaryDirectory(prefix="ranks-") as tmp, _held_port() as port:
        try:
            for rank in range(world_size):
                ours, theirs = context.Pipe()
                dump = Path(tmp, f"rank{rank}.txt")
                env = _environment(rank, world_size, port)
                parent = None if start_method == "forkserver" else os.getpid()
                process = context.Process(
                    target=_child,
                    args=(fn, rank, world_size, group, args, theirs, env, str(dump), parent),
                    name=f"rank{rank}",
                )
                ranks.append(_Rank(process, ours, dump))
                process.start()
                theirs.close()
            _collect(ranks, deadline)
            return _finish(ranks, timeout)
        finally:
            _reap(ranks)


def _check_parent(start_method: str) -> None:
    if start_method != "fork":
        return
    if torch.distributed.is_initialized():
        raise RuntimeError("run_ranks forks, so the parent must not hold a process group")
    if torch.cuda.is_initialized():
        raise RuntimeError('run_ranks forks, but the parent holds a CUDA context; pass start_method="spawn"')
    if torch.get_num_threads() != 1:
        raise RuntimeError("run_ranks forks: call torch.set_num_threads(1) in the parent first")


@contextlib.contextmanager
def _held_port() -> Iterator[int]:
    """A TCP port that is bound, but not listened on, until the ranks have ended.

    Linux lets rank 0's store bind it as well, for both sockets carry SO_REUSEADDR; nobody else is handed it.
    """
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


def _environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    return {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "GLOO_SOCKET_IFNAME": "lo",
        # torch asks for the name of every address that it connects to; a name server that is away would take 5 s each
        "RES_OPTIONS": "attempts:0",
        "OMP_NUM_THREADS": "1",
    }


def _collect(ranks: list[_Rank], deadline: float) -> None:
    """Wait until every rank has reported or died, a failure's grace is over, or time is up."""
    started = released = False
    release_at = float("inf")
    while pending := [r for r in ranks if r.outcome is None]:
        now = time.monotonic()
        if now >= deadline:
            return
        if not started and all(r.ready for r in ranks):
            started = True
            _send_go(ranks)
        if now >= release_at and not released:
            released = True
            deadline = min(deadline, now + GRACE)
            _send_go(ranks)
        until = deadline if released else min(deadline, release_at)
        wait([w for r in pending for w in (r.conn, r.process.sentinel)], timeout=max(0.0, until - now))
        for r in pending:
            _poll(r)
            if r.outcome is not None and not r.outcome.ok:
                release_at = min(release_at, time.monotonic() + LINGER)


def _poll(r: _Rank) -> None:
    """Take the rank's report if there is one, or note its death."""
    rank = int(r.process.name.removeprefix("rank"))
    # Asked before the pipe is read, so that a report sent just before death is not missed.
    dead = not r.process.is_alive()
    with contextlib.suppress(EOFError, OSError):
        if r.conn.poll():
            message = r.conn.recv_bytes()
            if message == READY:
                r.ready = True
                return
            value, error_type, error_text = pickle.loads(message)
            r.outcome = Outcome(rank, value, error_type, error_text)
            return
    if not dead:
        return
    r.process.join()
    code = r.process.exitcode
    if code < 0:
        kind, text = "Killed", f"killed by {signal.Signals(-code).name} (signal {-code})"
    else:
        kind, text = "Exited", f"exited with status {code} and no result"
    r.outcome = Outcome(rank, None, kind, f"{text}\n{_read(r.dump)}", code)


def _finish(ranks: list[_Rank], timeout: float) -> list[Outcome]:
    """Let ranks that reported go, show and kill those that did not, and complete every outcome."""
    hung = [r for r in ranks if r.outcome is None]
    failure = any(r.outcome is not None and not r.outcome.ok for r in ranks)
    for r in hung:
        with contextlib.suppress(ProcessLookupError):
            os.kill(r.process.pid, signal.SIGUSR1)
    if hung:
        time.sleep(DUMP)
    for r in hung:
        r.process.kill()
    _send_go(ranks)
    for rank, r in enumerate(ranks):
        r.process.join(GRACE)
        if r.process.exitcode is None:  # reported, but does not end: a stuck exit is not the test's subject
            r.process.kill()
            r.process.join()
        if r.outcome is None:
            when = "another rank failed" if failure else f"{timeout:g} s"
            text = f"still running after {when}; killed. Its stacks:\n{_read(r.dump)}"
            r.outcome = Outcome(rank, None, "Hang", text)
        r.outcome.exitcode = r.process.exitcode
    return [r.outcome for r in ranks if r.outcome is not None]


def _send_go(ranks: list[_Rank]) -> None:
    """A rank waits for one go to begin and for another to exit."""
    for r in ranks:
        with contextlib.suppress(OSError):
            r.conn.send_bytes(b"go")


def _reap(ranks: list[_Rank]) -> None:
    for r in ranks:
        if r.process.pid is not None:
            r.process.kill()
            r.process.join()
            r.process.close()
        r.conn.close()


def _read(dump: Path) -> str:
    return dump.read_text(errors="replace") if dump.exists() else "(no stacks: the rank had not begun)"


# ---- a rank's side


def _child(
    fn: Callable[..., Any],
    rank: int,
    world_size: int,
    group: tuple[str, float] | None,
    args: tuple[Any, ...],
    conn: Connection,
    env: dict[str, str],
    dump: str,
    parent: int | None,
) -> None:
    _die_with(parent)
    gc.freeze()  # else each collection walks all that the parent had, and copies the pages it lies on
    stacks = open(dump, "w")  # noqa: SIM115 - faulthandler writes to it until the process ends
    faulthandler.enable(file=stacks)
    faulthandler.register(signal.SIGUSR1, file=stacks)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.environ.update(env)
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    try:
        if group is not None:
            _form(*group)
        conn.send_bytes(READY)
        conn.recv_bytes()
        report = pickle.dumps((fn(rank, world_size, *args), None, ""))
        status = 0
    except BaseException as error:  # pytest.fail and SystemExit too: the parent must hear of it
        report = pickle.dumps((None, type(error).__name__, traceback.format_exc()))
        status = 1
    with contextlib.suppress(OSError, EOFError):
        conn.send_bytes(report)
        conn.recv_bytes()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # no exit handlers: they belong to the parent, and torch's may block on a dead peer


def _form(backend: str, seconds: float) -> None:
    """Join the default group, whose operations wait for so many seconds; all ranks are there before it is formed."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # the store keeps its own time: clones of it connect with it too, however short the group's is
    store = torch.distributed.TCPStore(address, port, size, rank == 0, timedelta(seconds=max(seconds, START)))
    # gloo keeps the timeout it was formed with for point-to-point messages, whatever the group's is set to later
    torch.distributed.init_process_group(
        backend, timeout=timedelta(seconds=seconds), store=store, rank=rank, world_size=size
    )


def _die_with(parent: int | None) -> None:
    """Have the kernel kill this rank when the parent dies, even by SIGKILL. Linux only; elsewhere nothing.

    ``None``: the parent is a fork server, which ends with the process that uses it.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1 is PR_SET_PDEATHSIG
    if parent is not None and os.getppid() != parent:
        os._exit(1)
