"""Kernels compiled for a GPU that need not be there: each launch of a step gives machine code instead of running."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Literal

import torch

from compactdist.codecs import Codec
from compactdist.codecs.lowrank.thin_factors import LowRankCodec
from compactdist.codecs.topk import TopK, TopKInt4
from compactdist.codecs.transform.on_device import spec_of, tables_of
from compactdist.codecs.transform.transform import Transform
from compactdist.kernels.spec import (
    BOARD_WORDS,
    CLOCK_WORDS,
    ROUNDED,
    ROUNDED_BLOCK,
    EightBits,
    MatrixView,
    Rounded,
    Velocity,
)
from compactdist.wire import COEFFICIENT_PLACE, HEAD_PLACES, HEADER_NBYTES

CAPABILITIES = (80, 89, 90, 100)
"""A100, RTX 4090, H100 and H200, B200."""

_TYPES = {
    torch.int8: "*i8",
    torch.int16: "*i16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.float16: "*fp16",
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass(frozen=True)
class Compiled:
    """A kernel as a launch would run it.

    Attributes:
        name: of its Triton function.
        programs: of the launch.
        warps: of a program.
        values: what the machine code gets, in order: an integer, a float, or a tensor for its address.
        compile: lets Triton compile it; once.
        known: numbers of tensors among the values on which branches depend, and what all of their elements are.
    """

    name: str
    programs: int
    warps: int
    values: tuple[Any, ...]
    compile: Callable[[], Any]
    known: Mapping[int, int] = field(default_factory=dict)

    @cached_property
    def made(self) -> Any:
        """Triton's compiled kernel."""
        return self.compile()

    @property
    def ptx(self) -> str:
        return str(self.made.asm["ptx"])

    @property
    def cubin(self) -> bytes:
        return bytes(self.made.asm["cubin"])


class Compiler:
    """Takes the place of a launch: compiles the kernel as the launch would, and keeps what came out.

    Args:
        capability: of the GPU, 90 for ``sm_90``.
        lazy: compile only what somebody looks at.

    Attributes:
        known: as ``Compiled.known``, by the parameter's name.
    """

    def __init__(self, capability: int = 90, *, lazy: bool = False) -> None:
        self.capability, self.lazy = capability, lazy
        self.known: Mapping[str, int] = {}
        self.launches: list[Compiled] = []

    @property
    def ptx(self) -> dict[str, str]:
        """By name of the kernel; of the last one of a name."""
        return {one.name: one.ptx for one in self.launches}

    def launch(self, kernel: Any, *args: Any, grid: Any, warmup: bool, num_warps: int, **others: Any) -> Any:
        """What Triton's dispatch is called with; returns Triton's compiled kernel, unless that waits."""
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        options = {"num_warps": num_warps, "enable_fp_fusion": others.pop("enable_fp_fusion")}
        given = {**dict(zip((one.name for one in kernel.params), args, strict=False)), **others}
        signature: dict[str, str] = {}
        constants: dict[str, Any] = {}
        attributes: dict[tuple[int, ...], list[list[Any]]] = {}
        values, known = [], {}
        for index, parameter in enumerate(kernel.params):
            value = given[parameter.name]
            specialized = isinstance(value, int) and not parameter.do_not_specialize
            if parameter.is_constexpr or (specialized and value == 1):
                signature[parameter.name], constants[parameter.name] = "constexpr", value
                continue
            tensor = isinstance(value, torch.Tensor)
            signature[parameter.name] = _TYPES[value.dtype] if tensor else "fp32" if isinstance(value, float) else "i32"
            if tensor or (specialized and value % 16 == 0):
                attributes[index,] = [["tt.divisibility", 16]]
            if parameter.name in self.known:
                known[len(values)] = self.known[parameter.name]
            values.append(value)
        source = ASTSource(kernel, signature, constants, attributes)
        target = GPUTarget("cuda", self.capability, 32)
        compile_it = partial(triton.compile, source, target=target, options=options)
        made = Compiled(kernel.fn.__name__, grid[0], num_warps, tuple(values), compile_it, known)
        self.launches.append(made)
        return None if self.lazy else self.launches[-1].made


@contextmanager
def compiling(compiler: Any) -> Iterator[None]:
    """Inside the block Triton's dispatch calls ``compiler.launch`` and nothing runs."""
    from triton.runtime.jit import JITFunction

    run = JITFunction.run
    JITFunction.run = lambda kernel, *args, **others: compiler.launch(kernel, *args, **others)
    try:
        yield
    finally:
        JITFunction.run = run


def _plan_of(codec: Codec, view: MatrixView) -> Any:
    from compactdist.kernels.gpu.plan import plan_of

    plan = plan_of(codec.spec, view, torch.device("cpu"))
    if plan is None:
        raise ValueError(f"no kernels for {codec.codec_id} and {view}")
    return plan


def _checks() -> tuple[dict[str, Any], dict[str, Any]]:
    """What a group gives to an encode and to a decode beside tensors, so that nothing waits for the device."""
    return {"flag": torch.zeros(1, dtype=torch.int32)}, {"accepted": torch.ones(2, dtype=torch.uint8)}


Given = int | Literal["int8", "fp8", "velocity", "int8 velocity", "fp8 velocity"]
"""So many tensors; a history in eight bits; a tensor and a velocity between it and another; two histories likewise."""


def _rounded(numel: int, dtype: torch.dtype, form: EightBits) -> Rounded:
    """A history of zeros."""
    scales = torch.zeros(-(-numel // ROUNDED_BLOCK), dtype=torch.bfloat16)
    return Rounded(torch.zeros(numel, dtype=ROUNDED[form].codes), scales, dtype)


def _both(
    steps: Any,
    numel: int,
    dtype: torch.dtype,
    payload_nbytes: int,
    compiler: Any,
    terms: Given,
    for_encode: dict[str, Any],
    for_decode: dict[str, Any],
) -> tuple[list[Compiled], list[Compiled]]:
    """The launches of one encode and of one decode of zeros."""
    x, out = (torch.zeros(numel, dtype=dtype) for _ in range(2))
    given: list[Any]
    if isinstance(terms, int):
        given = [torch.zeros_like(x) for _ in range(terms)]
    elif terms in ROUNDED:
        given = [_rounded(numel, dtype, terms)]
    else:
        form: Any = terms.removesuffix("velocity").strip()
        base, previous = (_rounded(numel, dtype, form) if form else torch.zeros_like(x) for _ in range(2))
        given = [base, Velocity(base, previous, torch.zeros(()))]
    payload = torch.zeros(payload_nbytes, dtype=torch.uint8)
    before = len(compiler.launches)
    with compiling(compiler):
        assert steps.encode(x, tuple(given), out, payload, **for_encode)
        between = len(compiler.launches)
        assert steps.decode(payload, tuple(given), out, **for_decode)
    return compiler.launches[before:between], compiler.launches[between:]


def step(
    codec: Codec,
    view: MatrixView,
    dtype: torch.dtype,
    compiler: Any,
    *,
    terms: Given = 1,
    copies: bool = False,
) -> tuple[list[Compiled], list[Compiled]]:
    """The launches of one encode and of one decode, as a group's steady call makes them.

    Args:
        codec: of the stream.
        view: of its tensors.
        dtype: of its tensors.
        compiler: a :class:`Compiler`.
        terms: of the prediction, see ``Given``.
        copies: both write a second output, too.
    """
    from compactdist.kernels.gpu.steps import TritonSteps

    plan = _plan_of(codec, view)
    steps = TritonSteps(plan, dtype, torch.device("cpu"))
    checks = _checks()
    for one in checks if copies else ():
        one["copy"] = torch.zeros(view.numel, dtype=dtype)
    return _both(steps, view.numel, dtype, plan.sections.total_nbytes, compiler, terms, *checks)


def history_step(
    codec: Codec, view: MatrixView, dtype: torch.dtype, compiler: Any, *, terms: Given = 1
) -> tuple[list[Compiled], list[Compiled]]:
    """As ``step``, for ``scales="token_history"``: of a frame that is not the first."""
    from compactdist.kernels.gpu.history_steps import TritonHistorySteps

    plan = _plan_of(codec, view)
    steps = TritonHistorySteps(plan, dtype, torch.device("cpu"))
    scales = {"scales": (torch.zeros(view.groups, view.channels), torch.zeros(view.groups, view.channels))}
    return _both(steps, view.numel, dtype, plan.sections.total_nbytes, compiler, terms, scales, scales)


def components(
    codec: Transform, view: MatrixView, dtype: torch.dtype, compiler: Any, *, terms: int = 1
) -> tuple[list[Compiled], list[Compiled]]:
    """As ``step``, for the transform codec. The launches of an encode are those that a decode has not: the sender
    decodes what it sends. The last three are of a commit, a sweep between two others. Each component has all bits that
    there are.
    """
    from compactdist.kernels.gpu.component_steps import ComponentSteps

    cpu = torch.device("cpu")
    layout, groups = codec.layout_of(view.shape), view.groups
    n, count = layout.width, layout.components
    steps = ComponentSteps(spec_of(layout), tables_of(layout.levels, cpu), view, cpu)
    given, payload = torch.zeros(view.numel, dtype=dtype), torch.zeros(groups * layout.nbytes, dtype=torch.uint8)
    before = len(compiler.launches)
    compiler.known = {"depths": layout.levels.deepest}
    with compiling(compiler):
        _, squares, exponents = steps.sender.take_in(given, (given,) * terms, torch.zeros(1, dtype=torch.int32))
        steps.sender.encode(torch.zeros(groups, count, layout.rows), squares, exponents, payload)
        between = len(compiler.launches)
        parts = steps.read(payload)
        weights = steps.weigh(torch.zeros(groups, layout.blocks, n, n, dtype=torch.int16), parts.units)
        steps.decode(payload, parts.allotment, weights, parts.rows, (given,) * terms, torch.zeros_like(given))
        learnt, basis = steps.learnt(payload, parts), torch.zeros(groups, layout.blocks, n, n, dtype=torch.int16)
        steps.followed(basis, torch.zeros(basis.shape[:3]), learnt)
    return compiler.launches[before:between], compiler.launches[between:]


def one_of_m(
    codec: TopK | TopKInt4, view: MatrixView, dtype: torch.dtype, compiler: Any, *, terms: int = 1
) -> tuple[list[Compiled], list[Compiled]]:
    """As ``step``, for the codecs that keep one of every m elements."""
    from compactdist.kernels.gpu.steps import TritonSteps
    from compactdist.kernels.gpu.topk import Runs
    from compactdist.kernels.gpu.topk_steps import TopKSteps

    cpu = torch.device("cpu")
    (groups, runs), values = codec.runs_of(view.shape), None
    if codec.quantizer is not None:
        of_values = MatrixView(groups * runs, groups, 1, runs)
        values = TritonSteps(_plan_of(codec.quantizer, of_values), torch.float32, cpu)
    steps = TopKSteps(Runs(view, codec.m, cpu), values, dtype, cpu)
    return _both(steps, view.numel, dtype, codec.payload_nbytes(view.shape, dtype), compiler, terms, *_checks())


def thin_factors(
    codec: LowRankCodec, view: MatrixView, dtype: torch.dtype, compiler: Any, *, terms: int = 1
) -> tuple[list[Compiled], list[Compiled]]:
    """As ``step``, for the low-rank codecs."""
    from compactdist.kernels.gpu.lowrank_steps import LowRankSteps, Sizes

    spec, cpu = codec.factor_spec, torch.device("cpu")
    if spec is None:
        raise ValueError(f"no kernels for {codec}")
    steps = LowRankSteps(spec, Sizes(view, spec), view, dtype, cpu)
    return _both(steps, view.numel, dtype, codec.payload_nbytes(view.shape, dtype), compiler, terms, *_checks())


def frames(payload_nbytes: int, compiler: Any, *, stream: int = 3, call: tuple[int, int, int] = (7, 3, 5)) -> None:
    """Seal and check one frame."""
    from compactdist.kernels.gpu.frames import FrameKernels, sums_of

    board, clock = torch.zeros(BOARD_WORDS, dtype=torch.int32), torch.zeros(CLOCK_WORDS, dtype=torch.int64)
    with compiling(compiler):
        kernels = FrameKernels(bytes(HEADER_NBYTES), HEAD_PLACES, payload_nbytes, board, stream)
        frame = torch.zeros(HEADER_NBYTES + payload_nbytes, dtype=torch.uint8)
        sums, flag = sums_of(board.device, None)
        kernels.launch(kernels.sealing, (frame, sums, clock, flag), (*call, 2, 2**64 - 1), None)
        kernels.launch(kernels.checking, (frame, sums, clock, kernels.accepted), (*call, 1, 0), None)


def velocities(numel: int, dtype: torch.dtype, compiler: Any) -> None:
    """Choose a velocity for a tensor, take it from a frame, and make it.

    Args:
        numel: elements.
        dtype: of the tensors.
        compiler: a :class:`Compiler`.
    """
    from compactdist.kernels.gpu.velocities import Rule, choose, expect, write_out
    from compactdist.state.adaptive import samples_of

    base, previous, coefficient = torch.zeros(numel, dtype=dtype), torch.zeros(numel, dtype=dtype), torch.zeros(())
    frame, rule = torch.zeros(HEADER_NBYTES, dtype=torch.uint8), Rule(1.0, 16, 1.0)
    with compiling(compiler):
        write_out(Velocity(base, previous, coefficient), torch.empty_like(base))
        choose(base, (base, previous), samples_of(numel), rule, coefficient)
        expect(frame, COEFFICIENT_PLACE.start, rule, coefficient)


def measured(numel: int, dtype: torch.dtype, compiler: Any) -> None:
    """Sum up what a sender measures of a frame that is predicted from one tensor.

    Args:
        numel: elements.
        dtype: of the tensors.
        compiler: a :class:`Compiler`.
    """
    from compactdist.kernels.gpu.energies import energies

    x = torch.zeros(numel, dtype=dtype)
    with compiling(compiler):
        energies(x, (x,), x)


def history(numel: int, dtype: torch.dtype, form: EightBits, compiler: Any) -> None:
    """Round a history to eight bits for each element, and read it.

    Args:
        numel: elements.
        dtype: of the values.
        form: of the history.
        compiler: a :class:`Compiler`.
    """
    from compactdist.kernels.gpu.rounding import Rounding

    values, kept = torch.zeros(numel, dtype=dtype), _rounded(numel, dtype, form)
    with compiling(compiler):
        rounding = Rounding(numel, dtype, kept.codes.dtype, torch.device("cpu"))
        rounding.quantize(values, kept.codes, kept.scales)
        rounding.dequantize(kept.codes, kept.scales, values)
