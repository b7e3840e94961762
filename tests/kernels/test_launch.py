"""Launches that go past Triton's dispatch, where there is no GPU: in place of compiled kernels there are recorders."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.gpu.compiled import Compiler
from compactdist import codecs
from compactdist.state.matrix_view import plain

gpu = pytest.importorskip("compactdist.kernels.gpu.steps")
pytestmark = pytest.mark.skipif(gpu.INTERPRETED, reason="the interpreter has no launcher")

BY_ROW, BY_BLOCK = {"id": "int2"}, {"id": "int2", "scales": "block"}
ACROSS = {"id": "int3", "scales": "block", "block": 33}
CASES = {
    "by row": (BY_ROW, plain(128 * 256, 1, 256), ["row_statistics", "tile_sums", "settle", "encode_codes"]),
    "by row, many tiles": (
        {"id": "int8"},
        plain(5000 * 72, 1, 72),
        ["row_statistics", "tile_sums", "fold_many_tiles", "settle", "encode_codes"],
    ),
    "by block": (BY_BLOCK, plain(128 * 256, 1, 256), ["encode_held_blocks"]),
    "by block, across ends": (ACROSS, plain(3 * 40 * 65, 3, 65), ["encode_blocks", "encode_codes"]),
}


class _Recorder:
    """A compiled kernel as Triton keeps it; ``run`` is what its launcher takes."""

    packed_metadata = ("packed",)

    def __init__(self, machine: _Machine, name: str, src: Any) -> None:
        self.machine, self.name, self.src = machine, name, src
        self.function = object()

    def launch_metadata(self, grid: Any, stream: int, *args: Any) -> Any:
        return {"name": self.name, "grid": grid, "stream": stream, "args": args}

    def run(self, x: int, y: int, z: int, stream: int, function: Any, packed: Any, about: Any, *rest: Any) -> None:
        enter, leave, *args = rest
        assert function is self.function
        assert packed is self.packed_metadata
        self.machine.launched.append((self.name, (x, y, z), stream, tuple(args)))
        for hook in (enter, leave):
            if hook is not None:
                hook(about)


class _Machine:
    """In place of a GPU: a current stream, what went through the dispatch, and what went to a launcher."""

    def __init__(self, *, compiles: bool = False) -> None:
        self.stream = 7
        self.capturing = False
        self.dispatched: list[tuple[str, tuple[int, ...], tuple[Any, ...]]] = []
        self.launched: list[tuple[str, tuple[int, ...], int, tuple[Any, ...]]] = []
        self.kernels: list[_Recorder] = []
        self._compiler = Compiler() if compiles else None

    def dispatch(self, kernel: Any, *args: Any, grid: Any, warmup: bool, **others: Any) -> _Recorder:
        values = [value.data_ptr() if isinstance(value, torch.Tensor) else value for value in args]
        values += [others[name] for name in kernel.arg_names[len(args) :]]
        self.dispatched.append((kernel.fn.__name__, grid, tuple(values)))
        compiled = self._compiler and self._compiler.launch(kernel, *args, grid=grid, warmup=warmup, **others)
        self.kernels.append(_Recorder(self, kernel.fn.__name__, compiled and compiled.src))
        return self.kernels[-1]

    def clear(self) -> None:
        self.dispatched.clear()
        self.launched.clear()


@pytest.fixture
def machine(monkeypatch, request):
    from triton.runtime.jit import JITFunction

    from compactdist.kernels.gpu import launched, plan

    made = _Machine(compiles=getattr(request, "param", False))
    monkeypatch.setattr(JITFunction, "run", lambda kernel, *args, **others: made.dispatch(kernel, *args, **others))
    monkeypatch.setattr(launched, "stream_getter", lambda device: lambda index: made.stream)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: made.capturing)
    monkeypatch.setattr(plan._here, "streams", {}, raising=False)
    return made


class _Ends:
    """One stream's steps with tensors to give them."""

    def __init__(self, form: dict[str, Any], view: Any, dtype: torch.dtype = torch.bfloat16) -> None:
        from compactdist.kernels.gpu.plan import plan_of

        plan = plan_of(codecs.get(form).spec, view, torch.device("cpu"))
        self.steps = gpu.TritonSteps(plan, dtype, torch.device("cpu"))
        self.x, self.base, self.out = (torch.zeros(view.numel + 8, dtype=dtype)[: view.numel] for _ in range(3))
        self.payload = torch.zeros(plan.sections.total_nbytes, dtype=torch.uint8)
        self.flag = torch.zeros(4, dtype=torch.int32)[:1]

    def encode(self, **other: Any) -> None:
        given = {"x": self.x, "out": self.out, "flag": self.flag, **other}
        x, out, flag = given["x"], given["out"], given["flag"]
        assert self.steps.encode(x, (self.base,), out, self.payload, flag=flag)

    def decode(self) -> None:
        assert self.steps.decode(self.payload, (self.base,), self.out)


def _direct(machine: _Machine) -> list[tuple[str, tuple[int, ...], tuple[Any, ...]]]:
    return [(name, (grid[0],), args) for name, grid, _, args in machine.launched]


@pytest.mark.parametrize("case", CASES)
def test_later_steps_launch_what_the_dispatch_launched_first(machine, case):
    form, view, kernels = CASES[case]
    ends = _Ends(form, view)
    ends.encode()
    ends.decode()
    first = list(machine.dispatched)
    assert [name for name, *_ in first] == [*kernels, "decode_codes"]
    assert not machine.launched
    for _ in range(2):
        machine.clear()
        ends.encode()
        ends.decode()
        assert not machine.dispatched
        assert _direct(machine) == first
        assert {(grid[1:], stream) for _, grid, stream, _ in machine.launched} == {((1, 1), 7)}


@pytest.mark.parametrize("machine", [True], indirect=True)
@pytest.mark.parametrize("case", CASES)
def test_arguments_are_in_the_order_of_the_compiled_signature(machine, case):
    """With all constants in their places: the launcher counts them, and passes over them."""
    form, view, _ = CASES[case]
    ends = _Ends(form, view)
    for _ in range(2):
        ends.encode()
        ends.decode()
    assert len(machine.launched) == len(machine.kernels)
    for kernel, (name, _, _, args) in zip(machine.kernels, machine.launched, strict=True):
        signature = kernel.src.signature
        assert kernel.name == name
        assert list(signature) == kernel.src.fn.arg_names
        for index, (kind, value) in enumerate(zip(signature.values(), args, strict=True)):
            if kind == "constexpr":
                assert kernel.src.constants[index,] == value
            else:
                assert type(value) is (float if kind == "fp32" else int)
                assert kind in ("fp32", "i32") or (kind[0] == "*" and value % 16 == 0)


def test_another_alignment_is_another_kernel(machine):
    ends = _Ends(BY_BLOCK, plain(128 * 256, 1, 256))
    ends.encode()
    shifted = torch.zeros(128 * 256 + 8, dtype=torch.bfloat16)[1 : 128 * 256 + 1]
    machine.clear()
    ends.encode(x=shifted)
    assert [name for name, *_ in machine.dispatched] == ["encode_held_blocks"]
    odd, even = machine.kernels[1], machine.kernels[0]
    ran: list[Any] = []
    for kernel in (odd, even):
        kernel.run = lambda *args, kernel=kernel: ran.append((kernel, args[9]))  # type: ignore[method-assign]
    machine.clear()
    ends.encode(x=shifted)
    ends.encode()
    assert not machine.dispatched
    assert ran == [(odd, shifted.data_ptr()), (even, ends.x.data_ptr())]


def test_another_stream_has_other_scratch_and_the_same_kernels(machine):
    ends = _Ends(BY_ROW, plain(128 * 256, 1, 256))
    ends.encode()
    launched = []
    for machine.stream in (7, 8, 7, 8):
        machine.clear()
        ends.encode()
        assert not machine.dispatched
        assert {stream for _, _, stream, _ in machine.launched} == {machine.stream}
        launched.append(_direct(machine))
    assert launched[0] == launched[2] != launched[1] == launched[3]


def test_a_captured_step_has_scratch_of_its_own(machine):
    ends = _Ends(BY_ROW, plain(128 * 256, 1, 256))
    ends.encode()
    machine.clear()
    ends.encode()
    before = _direct(machine)
    machine.clear()
    machine.capturing = True
    ends.encode()
    captured = _direct(machine)
    assert not machine.dispatched
    assert captured != before
    assert [name for name, *_ in captured] == [name for name, *_ in before]


def test_what_is_not_contiguous_is_copied_first(machine):
    ends = _Ends(BY_BLOCK, plain(128 * 256, 1, 256))
    ends.encode()
    machine.clear()
    spread = torch.zeros(2 * 128 * 256, dtype=torch.bfloat16)[::2]
    ends.encode(x=spread)
    assert machine.launched[0][3][0] != spread.data_ptr()


@pytest.mark.parametrize("which", ["x", "flag"])
def test_other_dtypes_are_not_taken(machine, which):
    ends = _Ends(BY_BLOCK, plain(128 * 256, 1, 256))
    other = {"x": ends.x.float(), "flag": ends.flag.bool()}[which]
    given = {"x": ends.x, "flag": ends.flag, which: other}
    assert not ends.steps.encode(given["x"], (ends.base,), ends.out, ends.payload, flag=given["flag"])
    assert not machine.dispatched


def test_hooks_on_launches_are_called(machine, monkeypatch):
    import triton

    ends = _Ends(BY_BLOCK, plain(128 * 256, 1, 256))
    ends.encode()
    seen: list[Any] = []
    hook = triton.knobs.runtime.launch_enter_hook
    monkeypatch.setattr(hook, "calls", [seen.append])
    ends.encode()
    (about,) = seen
    assert (about["name"], about["stream"]) == ("encode_held_blocks", 7)
    assert about["args"] == machine.launched[0][3]
    monkeypatch.setattr(hook, "calls", [])
    ends.encode()
    assert len(seen) == 1
