"""What both ends compute is compiled without a rounding left open: read from the code of decoders and of new bases."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from benchmarks.gpu.compiled import Compiler, frames, step
from benchmarks.gpu.machine_code import listing
from compactdist import codecs
from compactdist.state.matrix_view import plain

gpu = pytest.importorskip("compactdist.kernels.gpu.steps")


pytestmark = pytest.mark.skipif(gpu.INTERPRETED, reason="the interpreter compiles nothing")
OPEN = re.compile(r"\b(fma\.|div\.(full|approx)|sqrt\.approx|rsqrt\.|rcp\.approx|ex2\.|lg2\.|[a-z0-9.]+\.ftz)")
VIEW = plain(32 * 256, 1, 256)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FORMS = [
    {"id": codec_id, "scales": scales}
    for scales in ("token_channel", "block")
    for codec_id in ("binary", "ternary", "int2", "int3", "int4", "int8", "fp8")
]


def _check(form: dict[str, Any], dtype: torch.dtype, terms: int, capability: int = 90) -> None:
    compiler = Compiler(capability)
    _, decoding = step(codecs.get(form), VIEW, dtype, compiler, terms=terms)
    for one in compiler.launches:  # encoding writes the sender's new base
        found = OPEN.search(one.ptx)
        assert not found, f"{one.name} of {form}: {found and found[0]}"
    for one in decoding:  # no division in them, so that ptxas has no use for a fused multiply-add of its own
        fused = [line for line in listing(one.cubin, capability).instructions if re.match("[FD]FMA", line.opcode)]
        assert not fused, f"{one.name} of {form}: {fused[0]}"


@pytest.mark.parametrize("form", FORMS[1::3], ids=lambda form: f"{form['id']}-{form['scales']}")
def test_decoders_and_new_bases_leave_no_rounding_open(form: dict[str, Any]) -> None:
    index = FORMS.index(form)
    _check(form, DTYPES[index % 3], 1 + index % 2)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("capability", [80, 89, 90, 100])
def test_on_every_gpu_and_of_every_dtype(capability: int) -> None:
    for form in FORMS:
        for dtype in DTYPES:
            _check(form, dtype, 2, capability)


def test_frames_are_integers() -> None:
    compiler = Compiler()
    frames(1 << 16, compiler)
    for one in compiler.launches:
        assert not re.search(r"\.(f16|bf16|f32|f64)\b", one.ptx), one.name
