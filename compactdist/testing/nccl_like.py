"""An inner group on a CPU with NCCL's manners: what a GPU would show of a wrapped group's faults shows without one.

    from compactdist.testing import act_like_nccl, remove

    inner = act_like_nccl(dist.group.WORLD)     # every rank calls it
    wrapped = compactdist.wrap(inner)
    ...
    wrapped.close(); remove(inner)

gloo is more polite than NCCL, so code that is right on gloo may be wrong on NCCL. An :class:`NcclLikeGroup` sends over
gloo and

* returns ``None`` for synchronous calls (``asyncOp`` false), when they are done;
* runs calls on a clock of its own, in the order in which they were issued, late: inputs are read when a call runs, and
  nothing is in an output before the call's work was waited for;
* returns ``None``, or a work that cannot be waited for, for a call inside a group of calls (``start_coalescing``), and
  the work of them all from ``end_coalescing``, under the names of every torch version;
* gives no future of a call that has not been issued;
* raises :class:`UnequalSizesError` where ranks come with sizes that do not fit together, point-to-point included, and
  :class:`~compactdist.errors.ConfigError` for receives from any source, which NCCL does not know. Tags mean nothing.

It is kinder in one way: messages of different pairs of ranks, or of different directions, never wait for one another.
"""

from __future__ import annotations

import queue
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from compactdist import _torch
from compactdist.errors import CompactDistError, ConfigError
from compactdist.group.backend import group_on_gloo
from compactdist.group.check import differing_pairs
from compactdist.testing.over import METHODS, GroupOver, forwarding

__all__ = ["NcclLikeGroup", "NcclLikeWork", "UnequalSizesError", "act_like_nccl"]

_TAG = 0


class UnequalSizesError(CompactDistError, RuntimeError):
    """Ranks came to a call with sizes that do not fit together, which NCCL leaves undefined; nothing arrived."""


class _Call:
    """One call: issued, then done; its outputs are delivered by whoever waits for it.

    Args:
        outputs: the caller's tensors that the call writes to.
        run: makes the call; returns what is to be written to ``outputs``.
    """

    def __init__(self, outputs: list[Tensor], run: Callable[[list[Tensor]], list[Tensor]]) -> None:
        self.outputs = outputs
        self._run = run
        self._arrived: list[Tensor] | None = None
        self._lock = threading.Lock()
        self._then: list[Callable[[], None]] = []
        self._done = threading.Event()
        self.error: BaseException | None = None

    def run(self) -> None:
        """Make the call, on the clock's thread."""
        try:
            with _torch.without_autograd():
                self._arrived = self._run(self.outputs)
        except BaseException as error:
            self.error = error
        with self._lock:
            self._done.set()
            then, self._then = self._then, []
        for callback in then:
            callback()

    def when_done(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` once the call is done, at once if it is."""
        with self._lock:
            if not self._done.is_set():
                self._then.append(callback)
                return
        callback()

    def is_done(self, seconds: float | None = 0) -> bool:
        """Whether the call is done, within so many seconds; ``None``: wait for it."""
        return self._done.wait(seconds)

    def deliver(self) -> None:
        """Write what arrived to the caller's tensors. The call is done."""
        with self._lock:
            arrived, self._arrived = self._arrived, None
        if arrived is not None:
            with _torch.without_autograd():
                for output, value in zip(self.outputs, arrived, strict=True):
                    output.copy_(value)


class _Clock:
    """Runs calls in order on a thread of its own, each at least ``delay`` seconds after it was issued."""

    def __init__(self, delay: float) -> None:
        self._delay = delay
        self._calls: queue.SimpleQueue[tuple[float, _Call] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._tick, daemon=True, name="compactdist-nccl-like")
        self._thread.start()

    def issue(self, call: _Call) -> None:
        """Run the call after all that were issued before it."""
        self._calls.put((time.monotonic() + self._delay, call))

    def stop(self) -> None:
        """End once the calls issued so far have run."""
        self._calls.put(None)
        self._thread.join()

    def _tick(self) -> None:
        while (issued := self._calls.get()) is not None:
            at, call = issued
            time.sleep(max(0.0, at - time.monotonic()))
            call.run()


class NcclLikeWork(_torch.Work):
    """The work of one call, or of a group of calls.

    Args:
        calls: the calls; empty for a call inside a group, which never gets a work of its own.
    """

    def __init__(self, calls: Sequence[_Call] = (), *, issued: bool = True) -> None:
        super().__init__()
        self._calls = list(calls)
        self._issued = issued
        self._future: Any = None

    def _must_be_issued(self) -> None:
        if not self._issued:
            raise RuntimeError(
                "this call was made inside a group of calls: its work is what end_coalescing (_end_coalescing before "
                "torch 2.14) returns"
            )

    @torch.compiler.disable
    def wait(self, timeout: timedelta = _torch.NO_TIMEOUT) -> bool:
        """Wait for the calls and write their outputs.

        Raises:
            RuntimeError: this is a call inside a group of calls.
            TimeoutError: not within ``timeout``; wait again.
            UnequalSizesError, and whatever the inner group raises.
        """
        self._must_be_issued()
        until = time.monotonic() + timeout.total_seconds() if timeout else None
        for call in self._calls:
            if not call.is_done(None if until is None else max(0.0, until - time.monotonic())):
                raise TimeoutError(f"a call on a group that acts like NCCL is not done within {timeout}")
        error = self.exception()
        if error is not None:
            raise error
        for call in self._calls:
            call.deliver()
        return True

    def is_completed(self) -> bool:
        """Whether the calls are done; what they wrote can be read then."""
        if not self._issued or not all(call.is_done() for call in self._calls):
            return False
        for call in self._calls:
            call.deliver()
        return True

    def is_success(self) -> bool:
        """Whether the calls are done without an error."""
        return self.is_completed() and self.exception() is None

    def exception(self) -> BaseException | None:
        """The first error of a call that is done."""
        return next((call.error for call in self._calls if call.error is not None), None)

    def result(self) -> list[Tensor]:
        """The output tensors."""
        return [output for call in self._calls for output in call.outputs]

    def synchronize(self) -> None:
        """Same as ``wait``."""
        self.wait()

    def get_future(self) -> Any:
        """A future of the outputs, resolved when they are written.

        Raises:
            RuntimeError: this is a call inside a group of calls.
        """
        self._must_be_issued()
        if self._future is None:
            future: Any = torch.futures.Future()
            self._future = future
            left, lock = [len(self._calls)], threading.Lock()

            def one_is_done() -> None:
                with lock:
                    left[0] -= 1
                    if left[0]:
                        return
                try:
                    self.wait()
                    future.set_result(self.result())
                except BaseException as error:
                    future.set_exception(error)

            for call in self._calls:
                call.when_done(one_is_done)
        return self._future


@forwarding
class NcclLikeGroup(GroupOver):
    """A registered ProcessGroup over gloo, with NCCL's manners; made by :func:`act_like_nccl`.

    Attributes:
        inner: the group it was made over, whose members and store it has; its calls go over a gloo group of its own.
        nones: how many synchronous calls were answered with ``None``.
        issued: names of the methods called, with ``"start"`` and ``"end"`` where a group of calls begins and ends.
    """

    exact_sizes = True
    supports_coalescing = True

    def __init__(self, inner: Any, name: str, delay: float) -> None:
        super().__init__(inner, name)
        _torch.adopt_backends(self, inner)  # for DistributedDataParallel, which asks C++ for them
        self._transport = self._gloo(name)
        self.nones = 0
        self.issued: list[str] = []
        self._delay = delay
        self._clocks: dict[tuple[str, int | None], _Clock] = {}
        self._open: list[tuple[_Clock, _Call]] | None = None

    def _gloo(self, name: str) -> Any:
        """A gloo group of its own, so that late calls and those of ``inner`` do not change their order."""
        store = _torch.group_store(self.inner)
        turn = store.add(f"compactdist/{name}/{self.rank()}", 1)
        timeout = timedelta(seconds=_torch.timeout_of(self.inner))
        return group_on_gloo(_torch.prefix_store(f"{name}/{turn}", store), self.rank(), self.size(), timeout)

    def __repr__(self) -> str:
        return f"<NcclLikeGroup '{self._name}' over {self.inner!r}>"

    def start_coalescing(self, device: torch.device) -> None:
        """Begin a group of calls: nothing is issued before it ends."""
        if self._open is not None:
            raise RuntimeError("a group of calls was begun inside another")
        self.issued.append("start")
        self._open = []

    def end_coalescing(self, device: torch.device) -> NcclLikeWork:
        """Issue the calls made since ``start_coalescing``; returns their work."""
        if self._open is None:
            raise RuntimeError("no group of calls was begun")
        self.issued.append("end")
        calls, self._open = self._open, None
        for clock, call in calls:
            clock.issue(call)
        return NcclLikeWork([call for _, call in calls])

    def stop(self) -> None:
        """Let what was issued end, and the clocks with it."""
        for clock in self._clocks.values():
            clock.stop()
        self._clocks.clear()

    def _call(self, name: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
        op, _ = METHODS[name]
        if name == "recv_anysource":
            raise ConfigError("NCCL cannot receive from any source: name the sender")
        self.issued.append(name)
        pair = op in ("send", "recv")
        clock = self._clock(op if pair else "collectives", args[1] if pair else None)
        call = self._prepared(name, op, args, kwargs)
        is_async = pair or all(getattr(arg, "asyncOp", True) for arg in (*args, *kwargs.values()))
        if self._open is not None:
            self._open.append((clock, call))
            return NcclLikeWork(issued=False) if is_async and not pair else None
        clock.issue(call)
        work = NcclLikeWork([call])
        if is_async:
            return work
        work.wait()
        self.nones += 1
        return None

    def _clock(self, what: str, peer: int | None) -> _Clock:
        if (what, peer) not in self._clocks:
            self._clocks[what, peer] = _Clock(self._delay)
        return self._clocks[what, peer]

    def _prepared(self, name: str, op: str, args: list[Any], kwargs: dict[str, Any]) -> _Call:
        if op == "send":
            return _Call([], lambda _: self._send(args[0][0], args[1]))
        if op == "recv":
            return _Call([args[0][0]], lambda outputs: self._receive(outputs[0], args[1]))
        written = [] if op == "barrier" else _tensors(args[0])

        def run(outputs: list[Tensor]) -> list[Tensor]:
            self._compare_sizes(op, *_sizes(name, op, self.rank(), self.size(), args))
            copies = [output.clone(memory_format=torch.contiguous_format) for output in outputs]
            with_copies = [_replaced(args[0], iter(copies)), *args[1:]] if copies else args
            work = getattr(self._transport, name)(*with_copies, **kwargs)
            if work is not None:
                work.wait()
            return copies

        return _Call(written, run)

    def _compare_sizes(self, op: str, leaving: list[int], arriving: list[int]) -> None:
        """Make sure that every rank sends what the other end expects."""
        size = self.size()
        mine = torch.tensor([zlib.crc32(op.encode()), *leaving, *arriving], device="cpu")
        everyones = torch.empty(size * mine.numel(), dtype=torch.int64, device="cpu")
        _torch.all_gather_single(self._transport, everyones, mine).wait()
        table = everyones.view(size, -1)
        if len(table[:, 0].unique()) > 1:
            raise UnequalSizesError(f"rank {self.rank()} calls {op}, other ranks another collective")
        pairs = differing_pairs(table[:, 1:].view(size, 2, size))
        if pairs:
            (source, target), sizes = pairs[0], table[:, 1:].view(size, 2, size)
            raise UnequalSizesError(
                f"{op}: rank {source} sends {int(sizes[source, 0, target])} bytes to rank {target}, which expects "
                f"{int(sizes[target, 1, source])}"
            )

    def _send(self, x: Tensor, peer: int) -> list[Tensor]:
        self._transport.send([torch.tensor([x.nbytes], device="cpu")], peer, _TAG).wait()
        if x.numel():
            self._transport.send([x], peer, _TAG).wait()
        return []

    def _receive(self, output: Tensor, peer: int) -> list[Tensor]:
        nbytes = torch.empty(1, dtype=torch.int64, device="cpu")
        self._transport.recv([nbytes], peer, _TAG).wait()
        arrived = torch.empty(int(nbytes), dtype=torch.uint8, device="cpu")
        if arrived.numel():
            self._transport.recv([arrived], peer, _TAG).wait()
        if arrived.nbytes != output.nbytes:
            raise UnequalSizesError(
                f"recv: rank {peer} sends {arrived.nbytes} bytes to rank {self.rank()}, which expects {output.nbytes}"
            )
        return [arrived.view(output.dtype).view(output.shape)]


def act_like_nccl(group: Any, *, delay: float = 0.001, name: str | None = None) -> NcclLikeGroup:
    """Make a group over ``group`` with NCCL's manners.

    Every rank of the group calls this function at the same place.

    Args:
        group: a registered gloo group.
        delay: seconds between the issue of a call and its run, at least.
        name: name of the new group, equal on all ranks. ``None``: a name derived from the group's, so that a second
            such group over the same one needs a name.

    Raises:
        ConfigError: torch.distributed does not know ``group``.
    """
    return NcclLikeGroup(group, name or f"nccl-like:{group.group_name}", delay)


# --- tensors and sizes among the arguments of a call


def _tensors(value: Any) -> list[Tensor]:
    """The tensors of a tensor, of a list, or of a list of lists."""
    return [value] if isinstance(value, Tensor) else [t for part in value for t in _tensors(part)]


def _replaced(value: Any, by: Any) -> Any:
    """The same, with other tensors in their order."""
    return next(by) if isinstance(value, Tensor) else [_replaced(part, by) for part in value]


def _nbytes(value: Any) -> int:
    return sum(t.nbytes for t in _tensors(value))


def _sizes(name: str, op: str, me: int, size: int, args: list[Any]) -> tuple[list[int], list[int]]:
    """Bytes that leave for, and arrive from, each rank."""
    if op == "barrier":
        return [0] * size, [0] * size
    if op == "all_gather":
        return [_nbytes(args[1])] * size, _from_all(name, args[0], size)
    if op == "all_to_all":
        return _exchanged(name, args, size)
    if op == "reduce_scatter":
        lists = name == "reduce_scatter"
        chunks = [_nbytes([ins[rank] for ins in args[1]]) for rank in range(size)] if lists else None
        return chunks or [_nbytes(args[1]) // size] * size, [_nbytes(args[0])] * size
    if op == "all_reduce":
        return [_nbytes(args[0])] * size, [_nbytes(args[0])] * size
    root, nbytes = args[-1].rootRank, _nbytes(args[0])
    at_root = [nbytes if rank == root else 0 for rank in range(size)]
    if op == "broadcast":
        return [nbytes if me == root else 0] * size, at_root
    if op == "reduce":
        return at_root, [nbytes if me == root else 0] * size
    of_all = args[0] if op == "gather" else args[1]
    lists_of_all = [_nbytes([one[rank] for one in of_all]) if me == root else 0 for rank in range(size)]
    if op == "gather":
        return [_nbytes(args[1]) if rank == root else 0 for rank in range(size)], lists_of_all
    return lists_of_all, at_root


def _from_all(name: str, outputs: Any, size: int) -> list[int]:
    if name == "allgather":
        return [_nbytes([out[rank] for out in outputs]) for rank in range(size)]
    if name == "allgather_coalesced":
        return [_nbytes(outputs[rank]) for rank in range(size)]
    return [_nbytes(outputs) // size] * size


def _exchanged(name: str, args: list[Any], size: int) -> tuple[list[int], list[int]]:
    if name == "alltoall":
        return [t.nbytes for t in args[1]], [t.nbytes for t in args[0]]
    output, x, out_splits, in_splits = args[:4]

    def chunks(tensor: Tensor, splits: Sequence[int]) -> list[int]:
        if not splits:
            return [tensor.nbytes // size] * size
        row = tensor.nbytes // tensor.shape[0] if tensor.shape[0] else 0
        return [row * rows for rows in splits]

    return chunks(x, in_splits), chunks(output, out_splits)
