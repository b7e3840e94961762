"""What both ends compute is compiled without a rounding left open: read from the code of decoders and of new bases."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from benchmarks.gpu.compiled import (
    CAPABILITIES,
    Compiler,
    compiling,
    components,
    frames,
    one_of_m,
    step,
    thin_factors,
)
from compactdist import codecs
from compactdist.codecs.lowrank.lowrank import LowRank
from compactdist.codecs.lowrank.lowrank_int4 import LowRankInt4
from compactdist.codecs.topk import TopK, TopKInt4
from compactdist.codecs.transform.transform import Transform
from compactdist.state.matrix_view import plain
from tests.kernels.rounding import MATRIX, fuses_nothing, leaves_none_open, multiplies_integers
from tests.quick import quick_for

gpu = pytest.importorskip("compactdist.kernels.gpu.steps")

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from compactdist.kernels.gpu.elements import read, write  # noqa: E402

pytestmark = pytest.mark.skipif(gpu.INTERPRETED, reason="the interpreter compiles nothing")
VIEW = plain(32 * 256, 1, 256)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FORMS = [
    {"id": codec_id, "scales": scales}
    for scales in ("token_channel", "block")
    for codec_id in ("binary", "ternary", "int2", "int3", "int4", "int8", "fp8")
]


def _check(form: dict[str, Any], dtype: torch.dtype, terms: int, capability: int = 90) -> None:
    compiler = Compiler(capability)
    _, decoding = step(codecs.get(form), VIEW, dtype, compiler, terms=terms, copies=terms == 2)
    for one in compiler.launches:  # encoding writes the sender's new base
        leaves_none_open(one, form)
    for one in decoding:
        fuses_nothing(one, capability, form)


@pytest.mark.parametrize("form", FORMS[1::3], ids=lambda form: f"{form['id']}-{form['scales']}")
def test_decoders_and_new_bases_leave_no_rounding_open(form: dict[str, Any]) -> None:
    index = FORMS.index(form)
    _check(form, DTYPES[index % 3], 1 + index % 2)


@pytest.mark.parametrize("capability", quick_for([90], CAPABILITIES))
def test_coded_keyframes_leave_no_rounding_open(capability: int) -> None:
    """The default codec of keyframes, without a term and with the flag of what is not finite."""
    _check({"id": "int8", "scales": "token_channel"}, torch.bfloat16, 0, capability)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_with_two_terms_and_of_every_dtype(capability: int) -> None:
    """Every form on one of the GPUs, neighbours of other dtypes; ``test_instructions`` has them in bfloat16."""
    for number in range(CAPABILITIES.index(capability), len(FORMS), len(CAPABILITIES)):
        _check(FORMS[number], DTYPES[number % 3], 2, capability)


def _check_components(capability: int, channels: int, dtype: torch.dtype, *, trellis: bool = False) -> None:
    compiler, view = Compiler(capability), plain(70 * channels, 1, channels)
    encoding, decoding = components(Transform(trellis=trellis), view, dtype, compiler, terms=2)
    for one in encoding:  # what a sender fits alone has logarithms
        leaves_none_open(one, (channels, dtype), but_logarithms=one.name in ("fit_rows", "allot"))
    for one in decoding:
        leaves_none_open(one, (channels, dtype))
    multiplies_integers(compiler.launches, capability, (channels, dtype))


def test_components_multiply_integers_and_leave_no_rounding_open() -> None:
    _check_components(90, 32, torch.bfloat16)
    _check_components(90, 32, torch.bfloat16, trellis=True)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("capability", "channels", "dtype"),
    [(80, 6, torch.float32), (89, 200, torch.float16), (90, 200, torch.float32), (100, 6, torch.float16)],
)
def test_components_of_other_widths_and_dtypes(capability: int, channels: int, dtype: torch.dtype) -> None:
    """``test_instructions`` has those of 128 channels in bfloat16."""
    _check_components(capability, channels, dtype)


def _check_one_of_m(capability: int, dtype: torch.dtype, **options: Any) -> None:
    for codec in (TopK(**options), TopKInt4(**options)):
        compiler = Compiler(capability)
        _, decoding = one_of_m(codec, VIEW, dtype, compiler, terms=2)
        assert {one.name for one in compiler.launches} >= {"pick_of_runs", "spread_over_runs"}
        for one in compiler.launches:
            leaves_none_open(one, codec)
        for one in [*decoding, *(one for one in compiler.launches if one.name == "pick_of_runs")]:
            fuses_nothing(one, capability, codec)


def test_one_of_m_leaves_no_rounding_open() -> None:
    _check_one_of_m(90, torch.bfloat16)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("capability", "m", "dtype"),
    [(80, 16, torch.bfloat16), (89, 5, torch.bfloat16), (90, 8, torch.float16), (100, 2, torch.float32)],
)
def test_one_of_any_m_and_of_every_dtype(capability: int, m: int, dtype: torch.dtype) -> None:
    """``test_instructions`` has one of eight in bfloat16."""
    _check_one_of_m(capability, dtype, m=m)


def _check_thin_factors(capability: int, dtype: torch.dtype, view: Any, rank: int) -> None:
    """The decoder, and the kernel that writes the new base; what searches is the sender's own."""
    for codec in (LowRank(rank), LowRankInt4(rank)):
        compiler = Compiler(capability, lazy=True)
        encoding, decoding = thin_factors(codec, view, dtype, compiler, terms=2)
        assert len(encoding) == 12
        assert [one.name for one in decoding] == ["decode_product"]
        for one in (encoding[-1], *decoding):
            leaves_none_open(one, codec)
        fuses_nothing(decoding[0], capability, codec, MATRIX)


@pytest.mark.slow
def test_thin_factors_leave_no_rounding_open() -> None:
    _check_thin_factors(90, torch.bfloat16, plain(70 * 136, 1, 136), 5)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_thin_factors_on_every_gpu(capability: int) -> None:
    """Large ones, whose products are of halves, on an older and on a newer GPU, and small ones on the two others."""
    if capability in (80, 90):
        _check_thin_factors(capability, torch.float16, plain(1088 * 3072, 1, 3072), 32)
    else:
        _check_thin_factors(capability, torch.float32, plain(2 * 33 * 7, 2, 7), 1)


def test_frames_are_integers() -> None:
    compiler = Compiler()
    frames(1 << 16, compiler)
    for one in compiler.launches:
        assert not re.search(r"\.(f16|bf16|f32|f64)\b", one.ptx), one.name


@triton.jit
def _to_float32_and_back(x, out, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    write(out, at, read(x, at, at < COUNT), at < COUNT)


@pytest.mark.parametrize("count", [1, 32, 64, 1024])
def test_bfloat16_is_converted_however_few_elements_a_thread_has(count: int) -> None:
    """By twos where a thread has two: there in one instruction each."""
    compiler, bits = Compiler(), torch.zeros(count, dtype=torch.int16)
    with compiling(compiler):
        _to_float32_and_back[(1,)](bits, bits, COUNT=count, num_warps=1, enable_fp_fusion=False)
    ptx = compiler.launches[0].ptx
    assert ("and.b32 %r" in ptx and "0xffff0000" in ptx) == (count >= 64)
    assert ("cvt.rn.satfinite.bf16x2.f32" in ptx) == (count >= 64)
