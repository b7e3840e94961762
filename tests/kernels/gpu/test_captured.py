"""Captured calls on two or three ranks: each replay is the site's next call, and one too many or too few is noticed.

What is recorded here in place of a CUDA graph: ``recorded.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import compactdist
from compactdist import Rule, _torch, codecs, kernels
from compactdist.errors import CaptureError, FrameError, NonFiniteError
from compactdist.kernels import use
from compactdist.state import not_captured, plain
from compactdist.testing import act_like_nccl
from tests.kernels.gpu.conftest import INTERPRETED
from tests.kernels.gpu.recorded import Recorded, like_a_gpu, recording
from tests.launch import run_ranks
from tests.quick import quick_for, quick_rows

pytestmark = [
    pytest.mark.skipif(not INTERPRETED, reason="plays graphs on CPU tensors"),
    pytest.mark.timeout(240),
]

NUMEL, REPLAYS = 20 * 64, 3


class Calls:
    """The calls of a step of a wrapped group on an inner one with NCCL's manners: of one kind, see ``KINDS``."""

    def __init__(self, rank: int, name: str, codec: str = "int4", kind: str = "all_gather", **options: Any) -> None:
        self.rank, self.kind = rank, kind
        inner = act_like_nccl(dist.group.WORLD, name=f"{name} {kind}")
        policy = [Rule(op=op, codec=codec) for op in ("all_reduce", "reduce_scatter")]
        # what arrived is sent on from CPU tensors, though never from those of a device
        options = {"min_numel": 64, "find_layout": False, "forward": False, "policy": policy, **options}
        self.group: Any = compactdist.wrap(inner, codec, **options)
        self.x, self.out = torch.zeros(NUMEL), torch.zeros(inner.size() * NUMEL)
        self.step = 0

    def fill(self, step: int) -> None:
        """The input of a step, which changes little from one to the next."""
        generator = torch.Generator().manual_seed(1000 * self.rank)
        base = torch.randn(NUMEL, generator=generator)
        self.out.zero_()  # the input may lie in it
        self.x.copy_(base + 0.05 * torch.randn(NUMEL, generator=torch.Generator().manual_seed(7 + step + self.rank)))

    def call(self, steps: int = 1, *, async_op: bool = False) -> Tensor:
        for _ in range(steps):
            self.fill(self.step)
            self.group.step()
            self.make(async_op)
            self.step += 1
        return self.out.clone()

    def make(self, async_op: bool = False) -> None:
        """Make the calls of one step, and wait for them."""
        for work in KINDS[self.kind](self, async_op):
            if work is not None:
                work.wait()

    def capture(self, *, async_op: bool = False) -> Recorded:
        self.group.step()  # so that the call is the first of a step, as those before it were
        with recording(self.group) as made:
            self.make(async_op)
        return made

    def replay(self, graph: Recorded, *, counts_step: bool = True) -> Tensor:
        self.fill(self.step)
        if counts_step:
            self.group.step()
        graph.replay()
        self.step += 1
        return self.out.clone()

    @property
    def histories(self) -> list[Tensor]:
        return [held for site in self.group._engine.store.sites() for s in site.streams for held in s.predictor.held]


def _all_gather(calls: Calls, async_op: bool) -> Iterator[Any]:
    yield calls.group.all_gather_into_tensor(calls.out, calls.x, async_op=async_op)


def _even(calls: Calls, async_op: bool) -> Iterator[Any]:
    numel = NUMEL // calls.group.size() * calls.group.size()
    yield dist.all_to_all_single(calls.out[:numel], calls.x[:numel], group=calls.group, async_op=async_op)


def _parts_of(x: Tensor, sizes: list[int]) -> list[Tensor]:
    return list(x[: sum(sizes)].split(sizes))


def _sizes_to(source: int, ranks: int) -> list[int]:
    """Elements that a rank sends to each; of three ranks, one gets too few to be coded, or none."""
    sizes = [64 * (1 + (source + 2 * target) % 4) for target in range(ranks)]
    if ranks > 2:
        sizes[source - 1] = 16 * (source % 2)
    return sizes


def _uneven(calls: Calls, async_op: bool) -> Iterator[Any]:
    ranks = calls.group.size()
    into = [_sizes_to(source, ranks)[calls.rank] for source in range(ranks)]
    x, sizes = calls.x, _sizes_to(calls.rank, ranks)
    out = calls.out[: sum(into)]
    yield dist.all_to_all_single(out, x[: sum(sizes)], into, sizes, group=calls.group, async_op=async_op)


def _lists(calls: Calls, async_op: bool) -> Iterator[Any]:
    ranks = calls.group.size()
    outs, ins = ([64 * (1 + a + b) for a in (calls.rank,) for b in range(ranks)] for _ in range(2))
    yield dist.all_to_all(_parts_of(calls.out, outs), _parts_of(calls.x, ins), group=calls.group, async_op=async_op)


def _broadcast(calls: Calls, async_op: bool) -> Iterator[Any]:
    x = calls.x if calls.rank == 1 else calls.out[:NUMEL]
    yield dist.broadcast(x, 1, group=calls.group, async_op=async_op)


def _reductions(calls: Calls, async_op: bool) -> Iterator[Any]:
    ranks = calls.group.size()
    each = NUMEL // ranks
    x = calls.x[: each * ranks]
    yield _torch.public_function("reduce_scatter_single")(calls.out[:each], x, group=calls.group, async_op=async_op)
    sums = calls.out[each : each + x.numel()]
    sums.copy_(x)
    yield dist.all_reduce(sums, group=calls.group, async_op=async_op)


def _neighbours(calls: Calls) -> tuple[int, int]:
    ranks = calls.group.size()
    return (calls.rank + 1) % ranks, (calls.rank - 1) % ranks


def _ring(calls: Calls, async_op: bool) -> Iterator[Any]:
    """Two hops of a ring: K and V go on to the next rank, in one batch."""
    following, previous = _neighbours(calls)
    kept = [calls.x[: 3 * 64], calls.x[3 * 64 : 8 * 64]]
    arriving = [_parts_of(part, [3 * 64, 5 * 64]) for part in (calls.out[: 8 * 64], calls.out[8 * 64 : 16 * 64])]
    for arrived in arriving:
        sends = [dist.P2POp(dist.isend, part, following, calls.group) for part in kept]
        receives = [dist.P2POp(dist.irecv, part, previous, calls.group) for part in arrived]
        for work in dist.batch_isend_irecv([op for pair in zip(sends, receives, strict=True) for op in pair]):
            work.wait()
        kept = arrived
    yield None


def _pairs(calls: Calls, async_op: bool) -> Iterator[Any]:
    """One message to each neighbour, each by itself."""
    following, previous = _neighbours(calls)
    for number, (to, source) in enumerate(((following, previous), (previous, following))):
        x, out = calls.x[: 4 * 64] * (1 + number), calls.out[number * 256 : (number + 1) * 256]
        if async_op:
            yield from (dist.isend(x, to, calls.group), dist.irecv(out, source, calls.group))
        elif calls.rank % 2:
            dist.recv(out, source, calls.group)
            dist.send(x, to, calls.group)
        else:
            dist.send(x, to, calls.group)
            dist.recv(out, source, calls.group)


def _together(calls: Calls, async_op: bool) -> Iterator[Any]:
    """A group of calls."""
    ranks = calls.group.size()
    device = calls.x.device
    following, previous = _neighbours(calls)
    calls.group.start_coalescing(device)
    for number in range(2):
        out = calls.out[number * ranks * 64 : (number + 1) * ranks * 64]
        calls.group.all_gather_into_tensor(out, calls.x[number * 64 :][:64], async_op=async_op)
    calls.group.send([calls.x[:128]], following)
    calls.group.recv([calls.out[-128:]], previous)
    yield calls.group.end_coalescing(device)


def _several(calls: Calls, async_op: bool) -> Iterator[Any]:
    ranks = calls.group.size()
    outs, ins = _parts_of(calls.out, [64 * ranks, 128 * ranks]), _parts_of(calls.x, [64, 128])
    yield calls.group.all_gather_single_coalesced(outs, ins)


KINDS: dict[str, Callable[[Calls, bool], Iterator[Any]]] = {
    "ring": _ring,
    "to both neighbours": _pairs,
    "a group of calls": _together,
    "several all-gathers in one call": _several,
    "all_gather": _all_gather,
    "all_to_all_single": _even,
    "all_to_all_single of unequal splits": _uneven,
    "all_to_all": _lists,
    "broadcast": _broadcast,
    "reductions": _reductions,
}


def on_ranks(body: Callable[[int], Any], ranks: int = 2) -> list[Any]:
    def started(rank: int, size: int) -> Any:
        with use("gpu"), like_a_gpu():
            return body(rank)

    return run_ranks(started, world_size=ranks, timeout=200)


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@contextmanager
def both(rank: int, codec: str = "int4", kind: str = "all_gather", **options: Any) -> Iterator[tuple[Calls, Calls]]:
    """Calls that will be captured and calls that never are, each after three steps; checked and closed at the end."""
    ours, plain = (Calls(rank, name, codec, kind, **options) for name in ("captured", "uncaptured"))
    assert same(ours.call(3), plain.call(3))
    yield ours, plain
    ours.group.check()
    assert _counts(ours) == _counts(plain)
    ours.group.close(), plain.group.close()


def _counts(calls: Calls) -> list[Any]:
    """What statistics say of each call site."""
    sites = calls.group.stats().sites.values()
    return [
        (site.key, site.op, site.calls, site.wire_bytes, site.raw_bytes, site.received, site.received_wire_bytes)
        for site in sites
    ]


@contextmanager
def alone(rank: int, **options: Any) -> Iterator[Calls]:
    """Calls that will be captured, after three steps; checked and closed at the end."""
    ours = Calls(rank, "captured", **options)
    ours.call(3)
    yield ours
    ours.group.check()
    ours.group.close()


CASES = {
    "int2:scales=block": {},
    "fp8": {"local": "exact", "order": 0},
    "topk": {"keyframe": "raw"},
    "binary": {"order": "auto"},
    "int3": {"order": 2},
    "int2": {"state": "int8"},
    "int8:scales=block": {"state": "fp8", "order": 2},
    "int4": {"state": "int8", "order": "auto"},
}


@pytest.mark.parametrize("codec", CASES)
def test_replays_are_the_calls_that_would_have_been_made(codec):
    def body(rank):
        with both(rank, codec, **CASES[codec]) as (ours, plain):
            before = [kept.clone() for kept in ours.histories]
            graph = ours.capture()
            assert all(map(same, before, ours.histories)), "a capture moves nothing"
            assert ours.group.stats().compressed_calls == 3
            for _ in range(REPLAYS):
                assert same(ours.replay(graph), plain.call())
                assert all(map(same, ours.histories, plain.histories))
            ours.group.check()
            stats, others = ours.group.stats(), plain.group.stats()
            assert stats.compressed_calls == 3 + REPLAYS
            assert stats.wire_bytes == others.wire_bytes
            for calls, replays in ((2, 1), (1, 2)):  # they take turns
                assert same(ours.call(calls), plain.call(calls))
                for _ in range(replays):
                    assert same(ours.replay(graph), plain.call())
            ours.group.check()
            assert ours.group.stats().compressed_calls == plain.group.stats().compressed_calls
        return graph.launched

    first, second = on_ranks(body)
    assert first == second
    assert first.count("seal_frame") == first.count("check_frame") == 1


# Three ranks take three times as long as two: those where a third rank is another peer, or another root.
AMONG = {
    2: [*list(KINDS)[2:6], "reductions"],
    3: ["ring", "to both neighbours", "all_to_all_single of unequal splits", "all_to_all", "broadcast"],
}
assert set(AMONG[2] + AMONG[3]) == set(KINDS)


@pytest.mark.parametrize("ranks", AMONG)
def test_calls_of_each_kind_are_replayed(ranks):
    def body(rank):
        for number, kind in enumerate(AMONG[ranks]):
            with both(rank, "int4:scales=block", kind, order=1 + number % 2) as (ours, plain):
                _replayed_and_called(ours, plain)

    on_ranks(body, ranks)


def _replayed_and_called(ours: Calls, plain: Calls) -> None:
    first, second = ours.capture(), ours.capture(async_op=True)  # of the same streams
    assert same(ours.replay(first), plain.call()), ours.kind
    assert all(map(same, ours.histories, plain.histories)), ours.kind
    assert same(ours.call(), plain.call()), ours.kind
    for graph in (second, first):
        assert same(ours.replay(graph), plain.call()), ours.kind
    assert all(map(same, ours.histories, plain.histories)), ours.kind


def _values(nodes: list[Any]) -> list[Any]:
    """Names, and all arguments that are no tensors."""

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            return tuple(value.shape), value.dtype
        if isinstance(value, list | tuple):
            return [plain(one) for one in value]
        return {key: plain(one) for key, one in value.items()} if isinstance(value, dict) else repr(value)

    return [(name, plain(args)) for name, args in nodes]


def test_a_capture_knows_no_step_and_no_sequence():
    """Recordings of two steps are equal in all but what lies in a graph's own memory; histories and clocks stay."""

    def body(rank):
        ours = Calls(rank, "captured")
        ours.call(3)
        first = ours.capture()
        ours.group.reset("nothing of this name")  # another epoch
        ours.call(2)
        second = ours.capture()
        assert _values(first.nodes) == _values(second.nodes)
        lasting = {kept.data_ptr() for kept in ours.histories}
        lasting |= {s.clock.words.data_ptr() for site in ours.group._engine.store.sites() for s in site.streams}
        used = []
        for graph in (first, second):
            tensors = [one for _, args in graph.nodes for one in args if isinstance(one, Tensor)]
            used.append({tensor.data_ptr() for tensor in tensors} & lasting)
        assert used[0] == used[1] == lasting
        ours.group.close()

    on_ranks(body)


def test_an_asynchronous_call_and_lists_and_strided_outputs_are_captured():
    def body(rank):
        with both(rank) as (ours, plain):
            graph = ours.capture(async_op=True)
            for _ in range(2):
                assert same(ours.replay(graph), plain.call())
            spread = torch.zeros(2, NUMEL, 2)
            with recording(ours.group) as made:
                ours.group.step()
                ours.group.all_gather([spread[0, :, 0], spread[1, :, 1]], ours.x)
            expected = plain.call()
            ours.replay(made, counts_step=False)
            assert same(torch.cat([spread[0, :, 0], spread[1, :, 1]]), expected)

    on_ranks(body)


@pytest.mark.parametrize("over", [False, True])
def test_a_graph_is_over_its_input_where_the_calls_before_were_not_or_the_other_way_round(over):
    def body(rank):
        ours, plain = Calls(rank, "captured"), Calls(rank, "uncaptured")
        inputs = [ours.x, ours.out.view(-1, NUMEL)[rank]]
        ours.x = inputs[over]
        assert same(ours.call(3), plain.call(3))
        ours.x = inputs[not over]
        graph = ours.capture()
        for _ in range(REPLAYS):
            assert same(ours.replay(graph), plain.call())
        ours.x = inputs[over]
        assert same(ours.call(), plain.call())
        ours.group.check()
        ours.group.close(), plain.group.close()

    on_ranks(body)


def test_two_calls_of_a_step_and_several_steps_in_one_graph():
    def body(rank):
        ours, plain = Calls(rank, "captured"), Calls(rank, "uncaptured")
        outs = [torch.zeros(2 * NUMEL) for _ in range(4)]

        def two_steps(calls, outs):
            for number in range(2):
                calls.group.step()
                for layer in range(2):
                    with calls.group.key(f"layer {layer}"):
                        calls.group.all_gather_into_tensor(outs[2 * number + layer], calls.x * (1 + layer))

        for _ in range(2):
            two_steps(ours, outs), two_steps(plain, outs)
        with recording(ours.group) as graph:
            two_steps(ours, outs)
        for step in range(2):
            ours.fill(step), plain.fill(step)
            graph.replay()
            expected = [torch.zeros(2 * NUMEL) for _ in range(4)]
            two_steps(plain, expected)
            assert all(map(same, outs, expected))
        ours.group.check()
        assert ours.group.stats().compressed_calls == plain.group.stats().compressed_calls
        ours.group.close(), plain.group.close()

    on_ranks(body)


def test_a_replay_that_one_rank_leaves_out_is_noticed():
    """Both ranks see it at the next replay, whose frames are of other turns: outputs hold NaN, and a step raises."""

    def body(rank):
        with alone(rank) as ours:
            graph = ours.capture()
            ours.replay(graph)
            if rank == 0:
                ours.replay(graph, counts_step=False)
            else:  # all of its replay is missing but the exchange itself
                graph.replay(inner_only=True)
            out = ours.replay(graph, counts_step=False)
            theirs = out.view(2, NUMEL)[1 - rank]
            assert theirs.isnan().all()
            with pytest.raises(FrameError, match=r"wrong step \(and sequence.*reset\(\)"):
                ours.group.step()
            ours.group.reset()
            ours.step = 0
            assert ours.call(3).isfinite().all()

    on_ranks(body)


def test_a_replay_on_one_rank_and_a_call_on_the_other_are_one_exchange():
    def body(rank):
        with both(rank) as (ours, plain):
            for _ in range(2):
                if rank:
                    graph = ours.capture()
                    out = ours.replay(graph, counts_step=False)
                else:
                    out = ours.call()
                assert same(out, plain.call())
                ours.call(), plain.call()

    on_ranks(body)


def _refused(calls: Calls, graph: Recorded) -> None:
    """A replay of an ended graph gives NaN, moves no history, and is reported."""
    before = [kept.clone() for kept in calls.histories]
    assert calls.replay(graph, counts_step=False).isnan().all()
    assert all(map(same, before, calls.histories))
    with pytest.raises(CaptureError, match=r"a CUDA graph was replayed that had ended .*NaN.*capture it again"):
        calls.group.stats()


def test_a_reset_ends_a_graph_and_another_one_is_captured():
    def body(rank):
        with both(rank) as (ours, plain):
            old = ours.capture()
            assert same(ours.replay(old), plain.call())
            for calls in (ours, plain):
                calls.group.reset()
                calls.step = 0
            assert len(ours.group._engine.store.ended) == 1
            _refused(ours, old)
            ours.step = 0
            assert same(ours.call(3), plain.call(3))  # nothing that goes on was touched
            _refused(ours, old)
            ours.step = 3
            new = ours.capture()
            assert not ours.group._engine.store.ended  # the old graph is to be deleted by now
            for _ in range(3):
                assert same(ours.replay(new), plain.call())

    on_ranks(body)


def test_a_restored_snapshot_ends_a_graph_and_goes_on_from_its_moment():
    def body(rank):
        with both(rank) as (ours, plain):
            saved = [calls.group.snapshot() for calls in (ours, plain)]
            old = ours.capture()
            expected = [ours.replay(old) for _ in range(2)]
            assert all(same(one, plain.call()) for one in expected)
            for calls, one in zip((ours, plain), saved, strict=True):
                calls.group.restore(one)
            _refused(ours, old)
            ours.step = plain.step = 3
            assert same(ours.call(), expected[0])
            assert same(plain.call(), expected[0])
            new = ours.capture()
            assert same(ours.replay(new), expected[1])
            assert same(plain.call(), expected[1])

    on_ranks(body)


def test_graphs_of_all_to_alls_and_messages_end_too():
    def body(rank):
        for kind in ("ring", "all_to_all_single of unequal splits"):
            with both(rank, "int4", kind) as (ours, plain):
                old = ours.capture()
                assert same(ours.replay(old), plain.call())
                for calls in (ours, plain):
                    calls.group.reset()
                    calls.step = 0
                assert same(ours.call(2), plain.call(2))
                before = [kept.clone() for kept in ours.histories]
                out = ours.replay(old, counts_step=False)
                assert out[out != 0].isnan().all()  # the rest is not written to
                assert out.isnan().any()
                assert all(map(same, before, ours.histories))
                with pytest.raises(CaptureError, match="a CUDA graph was replayed that had ended"):
                    ours.group.stats()
                ours.step = 2
                assert same(ours.call(), plain.call())

    on_ranks(body)


def _another_shape(calls: Calls) -> None:
    calls.group.step()
    calls.group.all_gather_into_tensor(torch.zeros(256), torch.linspace(0, 1, 128))


def _a_keyframe(calls: Calls) -> None:
    for stream in calls.group._engine.store.sites()[0].streams:
        stream.keyframe_announced = True
        stream._changes.count += 1
    calls.call()


@pytest.mark.parametrize("end", [_another_shape, _a_keyframe])
def test_what_ends_a_graph_without_a_reset(end):
    def body(rank):
        with alone(rank, agree="off") as ours:
            graph = ours.capture()
            ours.replay(graph)
            end(ours)
            _refused(ours, graph)
            ours.group.reset()
            ours.step = 0
            ours.call(3)

    on_ranks(body)


def test_a_frame_of_the_host_ends_a_graph_until_the_next_one_of_the_device():
    def body(rank):
        with both(rank) as (ours, plain):
            graph = ours.capture()
            assert same(ours.replay(graph), plain.call())
            with use("reference"):
                ours.call(), plain.call()
            _refused(ours, graph)
            ours.step -= 1
            with pytest.raises(CaptureError, match="not a residual that the device made; make the call uncaptured"):
                ours.capture()
            assert same(ours.call(), plain.call())
            assert same(ours.replay(graph), plain.call())

    on_ranks(body)


def test_a_tensor_that_is_not_finite_is_noticed_in_a_replay():
    def body(rank):
        with alone(rank) as ours:
            graph = ours.capture()
            ours.fill(3)
            if rank == 0:
                ours.x[5] = math.nan
            graph.replay()
            theirs = ours.out.view(2, NUMEL)[1 - rank]
            assert theirs.isnan().all() == (rank == 1)
            with pytest.raises(NonFiniteError, match="step 3"):
                ours.group.stats()
            ours.step = 4
            assert ours.replay(graph).isfinite().all()

    on_ranks(body)


@pytest.mark.parametrize("replays", [0, 1], ids=["a call comes next", "a replay comes next"])
def test_a_call_that_was_not_sent_ends_a_graph_until_the_next_call(replays, monkeypatch):
    def body(rank):
        ours, plain = Calls(rank, "captured"), Calls(rank, "uncaptured")
        ours.call(3), plain.call(3)
        graph = ours.capture()
        assert same(ours.replay(graph), plain.call())

        def broken(*args: Any) -> Any:
            raise RuntimeError("the link is down")

        with monkeypatch.context() as patch:
            patch.setattr(ours.group._engine.link, "all_gather", broken)
            with pytest.raises(RuntimeError, match="the link is down"):
                ours.call()
        if replays:
            assert ours.replay(graph).isnan().all()
            with pytest.raises((CaptureError, FrameError), match=r"capture it again|wrong digest"):
                ours.group.stats()
        else:
            assert same(ours.call(), plain.call())
            assert same(ours.replay(graph), plain.call())
            ours.group.check()
        ours.group.close(), plain.group.close()

    on_ranks(body)


def test_a_reset_during_a_capture_is_refused_and_forgets_nothing(monkeypatch):
    def body(rank):
        ours, plain = Calls(rank, "captured"), Calls(rank, "uncaptured")
        ours.call(3), plain.call(3)
        graph = ours.capture()
        assert same(ours.replay(graph), plain.call())
        known = dict(ours.group._engine.store.known)
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "captures", lambda device: True)
            with pytest.raises(CaptureError, match=r"reset\(\).* cannot be part of a CUDA graph"):
                ours.group.reset()
        assert ours.group._engine.store.known == known
        assert same(ours.replay(graph), plain.call())
        assert same(ours.call(), plain.call())
        ours.group.check()
        ours.group.close(), plain.group.close()

    on_ranks(body)


def test_a_frame_off_16_bytes_is_refused_with_its_reason():
    """Rank 0 sends chunks of 12 bytes that are not compressed; the frames behind them are the host's."""

    def body(rank):
        sizes = [[0, 3, 3], [128, 0, 128], [128, 128, 0]]
        into, calls = [row[rank] for row in sizes], Calls(rank, "captured")

        def call():
            calls.group.step()
            x, out = calls.x[: sum(sizes[rank])], calls.out[: sum(into)]
            dist.all_to_all_single(out, x, into, sizes[rank], group=calls.group)

        for step in range(3):
            calls.fill(step)
            call()
        with recording(calls.group):
            if rank == 0:
                call()
            else:
                with pytest.raises(CaptureError, match=r"3 x torch.float32 from rank 0 .* from rank [12] .* multiple"):
                    call()
        calls.group.close()

    on_ranks(body, 3)


def test_an_all_reduce_whose_second_leg_is_refused_uses_no_ordinal():
    def body(rank):
        with alone(rank, kind="reductions") as ours:
            site = next(one for one in ours.group._engine.store.sites() if "sums" in one.key)
            for stream in site.streams:
                stream.clock.stop()
            ours.group.step()
            with recording(ours.group), pytest.raises(CaptureError, match="sums"):
                dist.all_reduce(ours.x, group=ours.group)
            assert not any(ours.group._keys.clock.counts.values())

    on_ranks(body)


@pytest.mark.parametrize("codec", ["transform", "lowrank_int4", "int4:scales=token_history", "rates"])
def test_no_codec_that_learns_or_has_several_rates_is_captured(codec):
    made = codecs.get(codec)
    session = made.open(plain(512 * 256, 1, 256), torch.float32, torch.device("cpu"))
    form: Any = SimpleNamespace(codec=made, session=session, frames=object())
    stream: Any = SimpleNamespace(known_form=form, clock=SimpleNamespace(right=True))
    expected = "several rates" if codec == "rates" else "keeps a memory between two frames"
    assert expected in not_captured(stream, made)


def test_a_work_is_waited_for_while_its_graph_is_captured():
    def body(rank):
        with alone(rank) as ours:
            ours.group.step()
            pending = ours.group.all_gather_into_tensor(ours.out, ours.x, async_op=True)
            ours.group.step()
            with recording(ours.group), pytest.raises(CaptureError, match="an earlier call has not been finished"):
                ours.make()
            pending.wait()
            with recording(ours.group):
                work = ours.group.all_gather_into_tensor(ours.out, ours.x, async_op=True)
            with pytest.raises(CaptureError, match="waited for before the capture ends"):
                work.wait()

    on_ranks(body)


def _uneven_with(sizes: list[list[int]]) -> Callable[[Calls, bool], Iterator[Any]]:
    """An all-to-all whose chunks have these elements, by sender and receiver."""

    def made(calls: Calls, async_op: bool) -> Iterator[Any]:
        into, mine = [row[calls.rank] for row in sizes], sizes[calls.rank]
        out = calls.out[: sum(into)]
        yield dist.all_to_all_single(out, calls.x[: sum(mine)], into, mine, group=calls.group, async_op=async_op)

    return made


def test_graphs_of_one_site_with_other_chunks_that_are_not_compressed_count_their_own_bytes(monkeypatch):
    coded = [[64, 128, 192], [64, 0, 128], [128, 64, 0]]
    forms = [coded, [[64, 128, 16], [64, 0, 128], [128, 64, 0]], [[64, 128, 0], [64, 0, 128], [32, 64, 0]]]
    for number, form in enumerate(forms):
        monkeypatch.setitem(KINDS, f"form {number}", _uneven_with(form))

    def body(rank):
        with both(rank, "int4:scales=block", "form 0") as (ours, plain):
            graphs = []
            for number in (0, 1, 2):
                for calls in (ours, plain):
                    calls.kind = f"form {number}"
                ours.call(), plain.call()  # ranks agree on it
                graphs.append((number, ours.capture()))
            for at in (0, 1, 1, 2, 0):
                number, graph = graphs[at]
                plain.kind = f"form {number}"
                assert same(ours.replay(graph), plain.call())
                if at == 2:
                    assert _counts(ours) == _counts(plain)
            assert _counts(ours) == _counts(plain)

    on_ranks(body, 3)


def test_replays_are_counted_before_a_site_is_forgotten_whose_shapes_vary():
    def body(rank):
        with both(rank) as (ours, plain):
            graph = ours.capture()
            assert same(ours.replay(graph), plain.call())
            for calls in (ours, plain):  # more changes than a site may make
                plans = calls.group._plans
                plans._changes.update(dict.fromkeys(plans._tensors, 8))
                _another_shape(calls)

    on_ranks(body)


@pytest.mark.parametrize("kind", quick_for(["ring"], ["ring", "several all-gathers in one call"]))
def test_captured_calls_of_a_batch_that_fails_use_no_ordinals(kind, monkeypatch):
    def body(rank):
        with both(rank, "int4:scales=block", kind) as (ours, plain):
            ours.group.step()
            link, broken = ours.group._engine.link, []

            def fails(real: Any) -> Any:
                def second(*args: Any) -> Any:
                    broken.append(real)
                    if len(broken) == 2:
                        raise RuntimeError("the link is down")
                    return real(*args)

                return second

            with monkeypatch.context() as patch, recording(ours.group):
                for name in ("send", "receive", "all_gather"):
                    patch.setattr(link, name, fails(getattr(link, name)))
                with pytest.raises(RuntimeError, match="the link is down"):
                    ours.make()
            assert not any(ours.group._keys.clock.counts.values())
            with recording(ours.group) as graph:
                ours.make()
            plain.group.step()
            for calls in (ours, plain):
                calls.fill(3)
            graph.replay(), plain.make()
            assert same(ours.out, plain.out)

    on_ranks(body)


QUICK = {("broadcast", 0)}
ALIKE = {"to both neighbours", "several all-gathers in one call", "all_to_all_single", "all_to_all"}
"""What a replay left out does is that of another kind: messages, all-gathers, chunks of different sizes."""
KINDS["all_to_all_single of coded chunks"] = _uneven_with([[64, 128, 192], [64, 64, 128], [128, 64, 64]])
"""Chunks without frames are as in torch: nobody tells what came from what should have come."""


class Moving(Calls):
    """Calls whose inputs change much from one step to the next, and all elements alike."""

    def fill(self, step: int) -> None:
        super().fill(step)
        self.x += 0.6 * step


@pytest.mark.parametrize(
    ("kind", "lacking"),
    quick_rows(
        QUICK,
        [
            (kind, lacking)
            for number, kind in enumerate(KINDS)
            if kind not in {*ALIKE, "all_to_all_single of unequal splits"}
            for lacking in (range(3) if kind == "broadcast" else [number % 3])  # of the others all ranks do the same
        ],
    ),
)
def test_a_replay_of_any_kind_that_one_rank_leaves_out_is_noticed(kind, lacking):
    """That rank's inner calls are made, or nobody's would end, with the frames of the replay before.

    What others get of it then, and all of the next replay, is NaN or near what calls that never were captured get.
    """

    def body(rank):
        ours, plain = (Moving(rank, name, "int4:scales=block", kind) for name in ("captured", "uncaptured"))
        ours.call(3), plain.call(3)
        graph = ours.capture()
        assert same(ours.replay(graph), plain.call())
        if rank == lacking:
            graph.replay(inner_only=True)
            plain.call()
        else:
            _right_or_nan(ours.replay(graph, counts_step=False), plain.call())
        ours.step = plain.step
        got, expected = ours.replay(graph, counts_step=False), plain.call()
        _right_or_nan(got, expected)
        met = bool(got.isnan().any())
        if met:
            with pytest.raises((FrameError, NonFiniteError)):
                ours.group.stats()
        for calls in (ours, plain):
            calls.group.reset()
            calls.step = 0
        assert same(ours.call(2), plain.call(2))
        ours.group.check()
        ours.group.close(), plain.group.close()
        return met

    assert any(on_ranks(body, 3))


def _right_or_nan(got: Tensor, expected: Tensor) -> None:
    assert not ((got - expected).abs() > 0.3).any()  # values of another step are off by more
