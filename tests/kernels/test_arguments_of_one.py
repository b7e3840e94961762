"""Triton makes a Python constant of every integer argument that equals 1: the kernels must compile with those too.

The interpreter passes such arguments as they are, so only a compilation can show it. Nothing is run here.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.gpu.compiled import Compiler, components
from compactdist import codecs
from compactdist.codecs.transform.transform import Transform
from compactdist.kernels.spec import MatrixView
from compactdist.state.matrix_view import Layout, blocks, plain
from tests.quick import quick_for

gpu = pytest.importorskip("compactdist.kernels.gpu.steps")

CASES = {
    "by row and channel": ({"id": "int4"}, plain(128 * 256, 1, 256)),
    "many tiles, one scale a group": ({"id": "ternary"}, blocks(300)),
    "more than 64 tiles": ({"id": "int8"}, plain(5000 * 72, 1, 72)),
    "scattered": ({"id": "fp8"}, Layout("(h s d) -> 1 s (d h)", h=3, d=8).resolve(3 * 70 * 8)),
    "by block": ({"id": "int2", "scales": "block"}, plain(128 * 256, 1, 256)),
    "by block, units across ends": ({"id": "int3", "scales": "block", "block": 33}, plain(3 * 40 * 65, 3, 65)),
}
QUICK = "many tiles, one scale a group", "by block, units across ends"


def _run_both_ends(form: dict[str, Any], view: MatrixView, dtype: torch.dtype) -> None:
    from compactdist.kernels.gpu.plan import plan_of

    plan = plan_of(codecs.get(form).spec, view, torch.device("cpu"))
    steps = gpu.TritonSteps(plan, dtype, torch.device("cpu"))
    x, base = torch.zeros(view.numel, dtype=dtype), torch.zeros(view.numel, dtype=dtype)
    payload = torch.zeros(plan.sections.total_nbytes, dtype=torch.uint8)
    steps.encode(x, (base,), torch.zeros_like(x), payload)
    steps.decode(payload, (base, x), base)


class _WithOnes(Compiler):
    """Compiles each launch with all of its plain integers set to 1; what the kernel specializes becomes a constant."""

    def launch(self, kernel: Any, *args: Any, **others: Any) -> Any:
        assert any(type(value) is int for value in args), kernel.fn.__name__
        return super().launch(kernel, *(1 if type(value) is int else value for value in args), **others)


@pytest.mark.skipif(gpu.INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("case", quick_for(QUICK, CASES))
def test_kernels_compile_with_every_integer_equal_to_one(case, monkeypatch):
    from triton.runtime.jit import JITFunction

    compiler = _WithOnes()
    monkeypatch.setattr(JITFunction, "run", lambda kernel, *args, **others: compiler.launch(kernel, *args, **others))
    _run_both_ends(*CASES[case], torch.bfloat16)
    assert {"decode_codes"} < set(compiler.ptx)


@pytest.mark.skipif(gpu.INTERPRETED, reason="the interpreter compiles nothing")
def test_tensors_of_one_channel_compile(monkeypatch):
    """What sets such arguments in use: one channel, one row, one group, one block."""
    from triton.runtime.jit import JITFunction

    compiler = Compiler()
    monkeypatch.setattr(JITFunction, "run", lambda kernel, *args, **others: compiler.launch(kernel, *args, **others))
    for form, view in (
        ({"id": "int4"}, plain(1, 1, 1)),
        ({"id": "int4"}, blocks(1)),
        ({"id": "int8"}, plain(5000, 1, 1)),
        ({"id": "int2", "scales": "block", "block": 8}, plain(8, 1, 8)),
    ):
        _run_both_ends(form, view, torch.float32)
    assert {"encode_blocks", "encode_codes", "decode_codes", "fold_many_tiles"} <= set(compiler.ptx)


@pytest.mark.slow
@pytest.mark.skipif(gpu.INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("trellis", [False, True])
@pytest.mark.parametrize("make", [_WithOnes, Compiler], ids=["all", "one channel and one row"])
def test_kernels_of_components_compile_with_integers_equal_to_one(make, trellis):
    compiler = make()
    components(Transform(trellis=trellis), plain(1, 1, 1), torch.bfloat16, compiler)
    chooses = "choose_on_trellis" if trellis else "choose_components"
    ends = {"allot", "read_rows", "weigh_basis", "decode_components", "order_components", "correlate"}
    sender = {"largest_residuals", "take_in", "fit_rows", "component_powers", "weigh_rows", "write_scales", chooses}
    assert set(compiler.ptx) == {*ends, *sender, "gather_basis", "sweep_matrices", "scatter_basis"}
