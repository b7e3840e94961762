"""Kernels compiled for a GPU that need not be there: each launch of a step gives machine code instead of running."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from compactdist.codecs import Codec
from compactdist.kernels.spec import BOARD_WORDS, MatrixView
from compactdist.wire import HEAD_PLACES, HEADER_NBYTES

CAPABILITIES = (80, 89, 90, 100)
"""A100, RTX 4090, H100 and H200, B200."""

_TYPES = {
    torch.int16: "*i16",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.uint8: "*u8",
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
        ptx, cubin: what Triton made of it.
    """

    name: str
    programs: int
    warps: int
    values: tuple[Any, ...]
    ptx: str
    cubin: bytes


class Compiler:
    """Takes the place of a launch: compiles the kernel as the launch would, and keeps what came out.

    Args:
        capability: of the GPU, 90 for ``sm_90``.
    """

    def __init__(self, capability: int = 90) -> None:
        self.capability = capability
        self.launches: list[Compiled] = []

    @property
    def ptx(self) -> dict[str, str]:
        """By name of the kernel; of the last one of a name."""
        return {one.name: one.ptx for one in self.launches}

    def launch(self, kernel: Any, *args: Any, grid: Any, warmup: bool, num_warps: int, **others: Any) -> Any:
        """What Triton's dispatch is called with; returns Triton's compiled kernel."""
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        options = {"num_warps": num_warps, "enable_fp_fusion": others.pop("enable_fp_fusion")}
        given = {**dict(zip((one.name for one in kernel.params), args, strict=False)), **others}
        signature: dict[str, str] = {}
        constants: dict[str, Any] = {}
        attributes: dict[tuple[int, ...], list[list[Any]]] = {}
        values = []
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
            values.append(value)
        source = ASTSource(kernel, signature, constants, attributes)
        made = triton.compile(source, target=GPUTarget("cuda", self.capability, 32), options=options)
        code = made.asm["ptx"], made.asm["cubin"]
        self.launches.append(Compiled(kernel.fn.__name__, grid[0], num_warps, tuple(values), *code))
        return made


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


def step(
    codec: Codec, view: MatrixView, dtype: torch.dtype, compiler: Any, *, terms: int = 1
) -> tuple[list[Compiled], list[Compiled]]:
    """The launches of one encode and of one decode, as a group's steady call makes them.

    Args:
        codec: of the stream.
        view: of its tensors.
        dtype: of its tensors.
        compiler: a :class:`Compiler`.
        terms: of the prediction, 0 to 2.
    """
    from compactdist.kernels.gpu.plan import plan_of
    from compactdist.kernels.gpu.steps import TritonSteps

    cpu = torch.device("cpu")
    plan = plan_of(codec.spec, view, cpu)
    if plan is None:
        raise ValueError(f"no kernels for {codec.codec_id} and {view}")
    steps = TritonSteps(plan, dtype, cpu)
    x, out = torch.zeros(view.numel, dtype=dtype), torch.zeros(view.numel, dtype=dtype)
    given = tuple(torch.zeros(view.numel, dtype=dtype) for _ in range(terms))
    payload = torch.zeros(plan.sections.total_nbytes, dtype=torch.uint8)
    flag, accepted = torch.zeros(1, dtype=torch.int32), torch.ones(2, dtype=torch.uint8)
    before = len(compiler.launches)
    with compiling(compiler):
        assert steps.encode(x, given, out, payload, flag=flag)
        between = len(compiler.launches)
        assert steps.decode(payload, given, out, accepted=accepted)
    return compiler.launches[before:between], compiler.launches[between:]


def frames(payload_nbytes: int, compiler: Any, *, stream: int = 3, call: tuple[int, int, int] = (7, 3, 5)) -> None:
    """Seal and check one frame."""
    from compactdist.kernels.gpu.frames import FrameKernels

    board, digests = torch.zeros(BOARD_WORDS, dtype=torch.int32), torch.zeros(2, dtype=torch.int64)
    with compiling(compiler):
        kernels = FrameKernels(bytes(HEADER_NBYTES), HEAD_PLACES, payload_nbytes, board, stream)
        frame = torch.zeros(HEADER_NBYTES + payload_nbytes, dtype=torch.uint8)
        kernels.seal(frame, kernels.flag(), digests, call, 2, 2**64 - 1)
        kernels.check(frame, digests, call, 1, 0)
