"""A steady call on a device that is not there: the same launches every step, and no value that a host waits for."""

from __future__ import annotations

import os
import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

import compactdist
from compactdist import Layout, Rule, _torch, kernels
from compactdist.errors import CaptureError
from compactdist.kernels.spec import FROM_CLOCK
from tests.launch import run_ranks

gpu = pytest.importorskip("compactdist.kernels.gpu.steps")
pytestmark = pytest.mark.skipif(gpu.INTERPRETED, reason="the interpreter has no launcher")

ROWS, CHANNELS, STEPS = 1088, 3072, 4
KERNELS = {
    "int4": ["row_statistics", "tile_sums", "settle", "encode_codes", "seal_frame", "check_frame", "decode_codes"],
    "int4:scales=block": ["encode_held_blocks", "seal_frame", "check_frame", "decode_codes"],
    "topk": ["pick_of_runs", "seal_frame", "check_frame", "spread_over_runs"],
    "topk_int4": [
        "pick_of_runs",
        "encode_held_blocks",
        "spread_over_runs",
        "seal_frame",
        "check_frame",
        "decode_codes",
        "spread_over_runs",
    ],
}
MOST_PYTHON_CALLS = {"int4": 60, "int4:scales=block": 60}
"""Of the package's own functions, in one steady call: a count, which no load of the machine changes."""
SEALED_AT = 4
"""Where seal_frame and check_frame have step, epoch and sequence, then which digest, among their arguments."""


def _address(x: Tensor) -> int:
    """In place of an address, which these tensors have not: another one for each storage, 16 MB from all others."""
    return (x.untyped_storage()._cdata << 20) + x.storage_offset() * x.element_size()


def _matrix(info: Any) -> Layout:
    return Layout("(r c) -> 1 r c", r=ROWS, c=CHANNELS)


def _steps(codec: str, monkeypatch: pytest.MonkeyPatch, steps: int = STEPS) -> list[list[Any]]:
    """What each steady step launches: one call, with other tensors of the caller in each."""
    from benchmarks.gpu.stub import DEVICE, stub

    numel, seen = ROWS * CHANNELS, []
    monkeypatch.setattr(torch.Tensor, "data_ptr", _address)
    with stub() as device:
        group = device.wrap(dist.group.WORLD, codec, layouts=_matrix, min_numel=1)
        kept = []  # so that no two steps' tensors have one address
        for step in range(2 + steps):
            x, out = (torch.empty(n * numel, dtype=torch.bfloat16, device=DEVICE) for n in (1, 2))
            kept.append((x, out))
            device.recorded.clear()
            device.dispatched.clear()
            group.step()
            group.all_gather_into_tensor(out, x)
            if step >= 2:
                assert not device.dispatched
                assert device.gathers == step + 1
                seen.append([*device.launched, _address(x), _address(out)])
        assert group.stats().compressed_calls == 2 + steps
        group.close()
    return seen


def _on_a_fake_group(body: Any) -> None:
    def started(rank: int, size: int) -> None:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
        with pytest.MonkeyPatch.context() as patch:
            body(patch)

    run_ranks(started, 1, init=False, timeout=60)


@pytest.mark.parametrize("codec", KERNELS)
def test_a_steady_step_repeats_its_launches(codec):
    def body(patch):
        steps = _steps(codec, patch)
        changing: dict[tuple[int, int], list[Any]] = {}
        for *launched, x, out in steps:
            assert [one.name for one in launched] == KERNELS[codec]
            assert [one.programs for one in launched] == [one.programs for one in steps[0][:-2]]
            for number, one in enumerate(launched):
                theirs = {x: "x", out: "out", out + 2 * ROWS * CHANNELS: "the peer's part of out"}
                for at, value in enumerate(one.values):
                    changing.setdefault((number, at), []).append(theirs.get(value, value))
        found = {key: values for key, values in changing.items() if len(set(values)) > 1}
        names = KERNELS[codec]
        seal, check = names.index("seal_frame"), names.index("check_frame")
        # step, sequence, and which of the digests; and the sender's history, which is the last frame's and the next's
        # memory in turn: nothing else changes but the caller's tensors
        expected = {(launch, SEALED_AT + at) for launch in (seal, check) for at in (0, 2, 3)}
        assert expected <= set(found)
        in_turn = [values for key, values in found.items() if key not in expected]
        assert in_turn
        assert all(launch < seal for launch, _ in set(found) - expected)
        one, other = in_turn[0][:2]
        assert one != other
        for values in in_turn:
            assert values in ([one, other] * (STEPS // 2), [other, one] * (STEPS // 2))
        for launch in (seal, check):
            first = found[launch, SEALED_AT][0]
            assert found[launch, SEALED_AT] == list(range(first, first + STEPS))
            assert sorted(set(found[launch, SEALED_AT + 3])) == [0, 1]
        assert any("the peer's part of out" in values for (launch, _), values in changing.items() if launch > check)

    _on_a_fake_group(body)


@pytest.mark.parametrize("order", [2, "auto"])
def test_a_velocity_takes_launches(order):
    """Kernels work it out as they read: only what a frame says of it is a launch of its own."""
    said = ["weigh_run", "choose_coefficient"] if order == "auto" else []
    expected = [*said, *KERNELS["int4"][:5], *(["take_coefficient"] if said else []), *KERNELS["int4"][5:]]

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            operations.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    operations: list[str] = []

    def body(patch):
        from benchmarks.gpu.stub import DEVICE, stub

        patch.setattr(torch.Tensor, "data_ptr", _address)
        with (
            stub() as device,
            device.wrap(dist.group.WORLD, "int4", layouts=_matrix, min_numel=1, order=order) as group,
        ):
            for step in range(4):
                x, out = (torch.empty(n * ROWS * CHANNELS, dtype=torch.bfloat16, device=DEVICE) for n in (1, 2))
                device.recorded.clear()
                operations.clear()
                with Count():
                    group.step()
                    group.all_gather_into_tensor(out, x)
                if step > 1:
                    assert [one.name for one in device.launched] == expected
                    assert set(operations) <= {"split", "empty", "clone", "zero_"}

    _on_a_fake_group(body)


@pytest.mark.parametrize(("codec", "most"), MOST_PYTHON_CALLS.items())
def test_a_steady_call_crosses_few_methods(codec, most):
    def body(patch):
        from benchmarks.gpu.stub import DEVICE, stub

        home, calls, counting = os.path.dirname(compactdist.__file__) + os.sep, [], False

        def profile(frame: Any, event: str, _: Any) -> None:
            if counting and event == "call" and frame.f_code.co_filename.startswith(home):
                calls.append(frame.f_code.co_qualname)

        x, out = (torch.empty(n * ROWS * CHANNELS, dtype=torch.bfloat16, device=DEVICE) for n in (1, 2))
        layout = Layout("(r c) -> 1 r c", r=ROWS, c=CHANNELS)
        with stub() as device, device.wrap(dist.group.WORLD, codec, layouts=lambda info: layout, min_numel=1) as group:
            sys.setprofile(profile)
            for step in range(4):
                group.step()
                counting = step == 3
                group.all_gather_into_tensor(out, x)
                counting = False
            sys.setprofile(None)
            assert group.stats().compressed_calls == 4
        assert 0 < len(calls) <= most, calls

    _on_a_fake_group(body)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize(("codec", "fills"), [("int4", 1), ("int4:scales=block", 0)])
def test_a_steady_call_copies_nothing_but_what_is_gathered_over_its_input(codec, fills, in_place):
    """An operation of torch is a launch, and a copy reads and writes the tensor once more."""

    class Counted(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            found.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    found: list[str] = []

    def body(patch):
        from benchmarks.gpu.stub import DEVICE, stub

        numel = ROWS * CHANNELS
        patch.setattr(torch.Tensor, "data_ptr", _address)
        with stub() as device, device.wrap(dist.group.WORLD, codec, layouts=_matrix, min_numel=1) as group:
            x, out = (torch.empty(n * numel, dtype=torch.bfloat16, device=DEVICE) for n in (1, 2))
            x = out[:numel] if in_place else x
            for _ in range(4):
                group.step()
                with Counted():
                    found.clear()
                    group.all_gather_into_tensor(out, x)
            # views of the output are no launches
            work = [name for name in found if name in ("copy_", "zero_", "clone", "empty", "fill_")]
            assert sorted(work) == ["copy_"] * in_place + ["zero_"] * fills

    _on_a_fake_group(body)


def test_the_stream_of_a_call_waits_for_its_own_output_where_another_stream_copies_it():
    """The copy reads the sender's history, whose memory is that of the next frame but one.

    What is gathered over its input is copied at the end.
    """

    class Stream:
        def wait_stream(self, other: Stream) -> None:
            waited.append((self, other))

    waited: list[tuple[Stream, Stream]] = []

    def body(patch):
        from benchmarks.gpu.stub import DEVICE, STREAM, stub

        streams = {STREAM: Stream(), 8: Stream()}
        now, recorded = [STREAM], []
        with stub() as device, device.wrap(dist.group.WORLD, "int4", layouts=_matrix, min_numel=1) as group:
            patch.setattr(kernels, "queue_of", lambda device: now[0])
            patch.setattr(kernels, "stream_of", lambda queue, device: streams[queue])
            patch.setattr(torch.cuda, "current_stream", lambda device=None: streams[now[0]])
            patch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: recorded.append(stream))
            patch.setattr(torch.Tensor, "data_ptr", _address)
            out = torch.empty(2 * ROWS * CHANNELS, dtype=torch.bfloat16, device=DEVICE)
            x = out[: ROWS * CHANNELS]
            for queue, waits in ((STREAM, []), (8, [(streams[STREAM], streams[8])])):
                now[0] = STREAM
                group.step()
                work = group.all_gather_into_tensor(out, x, async_op=True)
                now[0] = queue
                work.wait()
                assert waited == waits
            assert recorded[-1] is streams[8]
            now[0] = STREAM

    _on_a_fake_group(body)


def test_no_first_call_is_captured():
    """A capture is refused before anything is launched, sent, agreed on or counted."""

    def body(patch):
        from benchmarks.gpu.stub import DEVICE, stub

        x, out = (torch.empty(n * ROWS * CHANNELS, dtype=torch.bfloat16, device=DEVICE) for n in (1, 2))
        layout = Layout("(r c) -> 1 r c", r=ROWS, c=CHANNELS)
        with stub() as device, device.wrap(dist.group.WORLD, "int4", layouts=lambda info: layout, min_numel=1) as group:
            group.step()
            patch.setattr(_torch, "is_capturing", lambda: True)
            with pytest.raises(CaptureError) as refused:
                group.all_gather_into_tensor(out, x)
            for said in ("rank 0", "all_gather#0", "step 0", "keyframes", "uncaptured first", "policy"):
                assert said in str(refused.value)
            assert not device.launched
            assert not device.dispatched
            assert device.gathers == 0
            patch.setattr(_torch, "is_capturing", bool)
            group.all_gather_into_tensor(out, x)  # the same step, and the ordinal that was given back
            stats = group.stats()
            assert stats.compressed_calls == 1
            assert list(stats.sites) == ["all_gather#0"]

    _on_a_fake_group(body)


@pytest.mark.parametrize("codec", KERNELS)
def test_a_captured_call_launches_what_is_compiled_and_moves_nothing_on_the_host(codec, monkeypatch):
    def body(patch):
        from benchmarks.gpu.stub import DEVICE, stub

        monkeypatch.setattr(torch.Tensor, "data_ptr", _address)
        patch.setattr(compactdist.state, "catch_up", lambda stream: 0)  # there is no clock to be read
        x, out = (torch.empty(n * ROWS * CHANNELS, dtype=torch.bfloat16, device=DEVICE) for n in (1, 2))
        layout = Layout("(r c) -> 1 r c", r=ROWS, c=CHANNELS)
        captured = []
        with stub() as device, device.wrap(dist.group.WORLD, codec, layouts=lambda info: layout, min_numel=1) as group:

            def call(capturing: bool) -> list[Any]:
                patch.setattr(_torch, "is_capturing", lambda: capturing)
                patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
                device.recorded.clear()
                device.dispatched.clear()
                group.step()
                group.all_gather_into_tensor(out, x)
                return device.launched

            for _ in range(3):
                call(False)
            (site,) = group._engine.store.sites()
            for step in range(2):
                turns = [(stream.sequence, stream.clock.source) for stream in site.streams]
                captured.append(call(True))
                assert not device.dispatched, "nothing is compiled while a graph is captured"
                assert [(stream.sequence, stream.clock.source) for stream in site.streams] == turns
                assert group.stats().compressed_calls == 3 + step
                launched = call(False)
                seal = KERNELS[codec].index("seal_frame")
                assert launched[seal].values[SEALED_AT : SEALED_AT + 3] == (4 + 2 * step, 0, 4 + step)
            kept = [one for stream in site.streams for one in (stream.clock.words, *stream.predictor.held)]
            lasting = set(map(_address, kept))
        names = KERNELS[codec]
        assert [one.name for one in captured[0]] == [one.name for one in captured[1]] == names
        for first, second in zip(*captured, strict=True):
            told = [
                (one, other)
                for one, other in zip(first.values, second.values, strict=True)
                if isinstance(one, int | float) and (one in lasting or one < 4096)
            ]
            assert all(one == other for one, other in told)
            if first.name in ("seal_frame", "check_frame"):
                assert first.values[SEALED_AT : SEALED_AT + 6] == (0, 0, 0, FROM_CLOCK, 0, 0)
                assert first.values[2] in lasting

    _on_a_fake_group(body)


@pytest.mark.parametrize("over", [False, True])
def test_a_capture_compiles_nothing_where_it_is_over_its_input_and_the_calls_before_were_not(over, monkeypatch):
    """Or the other way round: then another kernel would write the rank's own output than ran before."""

    def body(patch):
        from benchmarks.gpu.stub import DEVICE, stub

        monkeypatch.setattr(torch.Tensor, "data_ptr", _address)
        patch.setattr(compactdist.state, "catch_up", lambda stream: 0)  # there is no clock to be read
        x, out = (torch.empty(n * ROWS * CHANNELS, dtype=torch.bfloat16, device=DEVICE) for n in (1, 2))
        inputs = [x, out[: ROWS * CHANNELS]]
        with stub() as device, device.wrap(dist.group.WORLD, "int4", layouts=_matrix, min_numel=1) as group:
            for capturing in (False, False, False, True):
                patch.setattr(_torch, "is_capturing", lambda capturing=capturing: capturing)
                device.dispatched.clear()
                device.recorded.clear()
                group.step()
                group.all_gather_into_tensor(out, inputs[over == capturing])
            assert [one.name for one in device.launched] == KERNELS["int4"]
            assert not device.dispatched
            patch.setattr(_torch, "is_capturing", bool)

    _on_a_fake_group(body)


PREDICTS = [Rule(op="all_gather", codec="int4", mode="predict-now")]
REFUSED = {
    "open loop": ({"error_feedback": False}, "leave error feedback on"),
    "parts": ({"parts": 2}, "parts=1"),
    "budget": ({"state_budget_bytes": 1 << 40}, "without a budget"),
    "samples": ({"sample_errors_every": 2}, "take 0"),
    "predict-now": ({"policy": PREDICTS}, "mode='wait'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_captured_says_why(name):
    options, said = REFUSED[name]

    def body(patch):
        from benchmarks.gpu.stub import DEVICE, stub

        x, out = (torch.empty(n * ROWS * CHANNELS, dtype=torch.bfloat16, device=DEVICE) for n in (1, 2))
        with stub() as device, device.wrap(dist.group.WORLD, "int4", min_numel=1, **options) as group:
            group.step()
            patch.setattr(_torch, "is_capturing", lambda: True)
            with pytest.raises(CaptureError) as refused:
                group.all_gather_into_tensor(out, x)
            assert said in str(refused.value)
            assert not device.dispatched
            patch.setattr(_torch, "is_capturing", bool)

    _on_a_fake_group(body)


def test_calls_of_a_request_and_of_compiled_code_are_not_captured():
    def body(patch):
        from benchmarks.gpu.stub import DEVICE, stub

        x, out = (torch.empty(n * ROWS * CHANNELS, dtype=torch.bfloat16, device=DEVICE) for n in (1, 2))
        with stub() as device, device.wrap(dist.group.WORLD, "int4", min_numel=1) as group:
            group.step()
            patch.setattr(_torch, "is_capturing", lambda: True)
            with group.request("a"):
                group.step()
                with pytest.raises(CaptureError, match=r"outside of request\(\)"):
                    group.all_gather_into_tensor(out, x)
            called = {"__name__": "torch._inductor.cudagraph_trees"}
            exec("def record(call): call()", called)
            with pytest.raises(CaptureError, match=r"mode='default', or capture with torch\.cuda\.graph"):
                called["record"](lambda: group.all_gather_into_tensor(out, x))
            assert not device.dispatched
            patch.setattr(_torch, "is_capturing", bool)

    _on_a_fake_group(body)


CALLS = {
    "all_to_all_single": lambda group, x, out: dist.all_to_all_single(out, x, group=group),
    "all_reduce": lambda group, x, out: dist.all_reduce(x, group=group),
    "reduce_scatter_single": lambda group, x, out: _torch.public_function("reduce_scatter_single")(
        out[: x.numel() // 2], x, group=group
    ),
    "broadcast": lambda group, x, out: dist.broadcast(x, 0, group=group),
    "send": lambda group, x, out: dist.send(x, 1, group=group),
    "recv": lambda group, x, out: dist.recv(x, 1, group=group),
}


@pytest.mark.parametrize("name", CALLS)
def test_no_first_call_of_any_kind_is_captured(name):
    def body(patch):
        from benchmarks.gpu.stub import DEVICE, stub

        x, out = (torch.empty(4096, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
        # reductions are compressed only where a policy names a codec
        policy = [Rule(op=op, codec="int4") for op in ("all_reduce", "reduce_scatter")]
        with stub() as device, device.wrap(dist.group.WORLD, "int4", min_numel=1, policy=policy) as group:
            group.step()
            patch.setattr(_torch, "is_capturing", lambda: True)
            with pytest.raises(CaptureError, match="rank 0"):
                CALLS[name](group, x, out)
            patch.setattr(_torch, "is_capturing", bool)
            assert not device.dispatched
            assert group.stats().compressed_calls == 0

    _on_a_fake_group(body)


def test_a_call_that_passes_through_may_be_captured():
    def body(patch):
        from benchmarks.gpu.stub import DEVICE, stub

        x, out = (torch.empty(n * 64, dtype=torch.bfloat16, device=DEVICE) for n in (1, 2))
        with stub() as device, device.wrap(dist.group.WORLD, "int4", min_numel=65) as group:
            patch.setattr(_torch, "is_capturing", lambda: True)
            group.step()
            group.all_gather_into_tensor(out, x)
            assert group.stats().passed_through == 1

    _on_a_fake_group(body)


def test_a_call_on_a_cpu_does_not_ask_for_captures():
    def body(patch):
        def asked():
            raise AssertionError("asked on a CPU")

        patch.setattr(_torch, "is_capturing", asked)
        x, out = torch.ones(4096), torch.empty(8192)
        with compactdist.wrap(dist.group.WORLD, "int4", min_numel=1) as group:
            group.step()
            group.all_gather_into_tensor(out, x)
            assert group.stats().compressed_calls == 1

    _on_a_fake_group(body)


def test_what_the_host_would_wait_for_raises():
    def body(patch):
        from benchmarks.gpu.stub import DEVICE, stub

        with stub():
            for read in (lambda x: x.item(), bool, lambda x: x.cpu(), lambda x: x.tolist()):
                with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
                    read(torch.empty(1, device=DEVICE))

    _on_a_fake_group(body)
