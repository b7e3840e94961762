"""The Triton kernels where there is no GPU: interpreted in a process of their own, and compiled but not run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from benchmarks.gpu.compiled import Compiler, history_step
from compactdist import codecs
from compactdist.kernels import steps_for, use
from compactdist.kernels.spec import BOARD_WORDS, CLOCK_WORDS
from compactdist.state.matrix_view import Layout, blocks, plain
from compactdist.wire import HEAD_PLACES, HEADER_NBYTES

gpu = pytest.importorskip("compactdist.kernels.gpu.steps")
ROOT = Path(__file__).parent.parent.parent
FOLDER = "tests/kernels/gpu"
BY_THEMSELVES = [
    [f"{FOLDER}/test_{name}.py" for name in names]
    for names in (("captured", "lowrank"), ("components", "host_reads", "keyframes"))
]
"""Files that the interpreter takes long for, in parts that take about as long as all the others."""


def _interpreted(*options: str, where: Sequence[str] = (FOLDER,)) -> None:
    """Run the tests of the kernels under the interpreter; all of those chosen must pass."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *where, *options]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1400)
    summary = done.stdout.strip().splitlines()[-1]
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert re.fullmatch(r"\d+ passed(, \d+ deselected)? in .*", summary), summary


def test_some_tests_pass_under_the_interpreter():
    _interpreted("-k", "zeros_is_no_change or buffers_anywhere or bases_are_those or sweeps_have")


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_all_tests_pass_under_the_interpreter():
    _interpreted(*(f"--ignore={path}" for paths in BY_THEMSELVES for path in paths))


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("paths", BY_THEMSELVES, ids=" ".join)
def test_all_tests_of_a_file_pass_under_the_interpreter(paths):
    _interpreted(where=paths)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_benchmark_checks_them_without_a_gpu(tmp_path):
    written = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "benchmarks.gpu.kernels", "--interpret", "--quick", "--json", str(written)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=500)
    result = json.loads(written.read_text())
    assert len(result["exact"]) == 8
    assert all(line["exact"] and line["cases"] for line in result["exact"])
    assert {line["name"]: line["equal"] for line in result["two_ranks"]} == {"int2": True}
    assert result["lines"] == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to time")
def test_the_benchmark_says_that_there_is_no_gpu():
    done = subprocess.run([sys.executable, "-m", "benchmarks.gpu.kernels"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "no CUDA device" in done.stdout


@pytest.mark.skipif(gpu.INTERPRETED or torch.cuda.is_available(), reason="the kernels can run here")
def test_forcing_them_says_what_is_missing():
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"), use("gpu"):
        pass


def test_cuda_tensors_get_them(monkeypatch):
    asked = []
    monkeypatch.setattr(gpu, "steps_of", lambda spec, view, dtype, device: asked.append(device.type))
    spec, view = codecs.get("int4").spec, plain(1 << 20, 1, 1 << 10)
    for device in ("cuda", "xpu"):
        assert steps_for(spec, view, torch.float32, torch.device(device)) is None
    assert asked == ["cuda"]
    for other in ("reference", "cpu"):
        with use(other):
            steps_for(spec, view, torch.float32, torch.device("cuda"))
    assert asked == ["cuda"]


def test_they_are_loaded_only_when_they_are_needed():
    script = (
        "import sys, compactdist, torch; from compactdist import codecs; "
        "codecs.get('int2').decode(codecs.get('int2').encode(torch.randn(4, 64)), (4, 64), torch.float32); "
        "assert 'compactdist.kernels.gpu.steps' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


def test_without_triton_it_is_said_once():
    script = """
import sys, logging
sys.modules["triton"] = None
import torch
from compactdist.codecs import Int4
from compactdist.kernels import steps_for, use
from compactdist.kernels.spec import MatrixView
seen = []
handler = logging.Handler()
handler.emit = lambda record: seen.append(record.getMessage())
logging.getLogger("compactdist").addHandler(handler)
logging.getLogger("compactdist").setLevel(logging.INFO)
for _ in range(2):
    assert steps_for(Int4().spec, MatrixView(256, 1, 16, 16), torch.float32, torch.device("cuda")) is None
assert len(seen) == 1 and "Triton" in seen[0], seen
try:
    with use("gpu"):
        raise AssertionError
except RuntimeError as error:
    assert "pip install triton" in str(error)
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


@pytest.mark.skipif(gpu.INTERPRETED, reason="the interpreter compiles nothing")
def test_frames_compile_for_an_h100_once_for_all_streams(monkeypatch):
    from triton.runtime.jit import JITFunction

    from compactdist.kernels.gpu.frames import FrameKernels, sums_of

    compiler = Compiler()
    monkeypatch.setattr(JITFunction, "run", lambda kernel, *args, **others: compiler.launch(kernel, *args, **others))
    seen = set()
    for stream, nbytes, call in ((1, 16, (1, 0, 0)), (16, 4096, (-1, 16, 2**31)), (7, 4 * 5000, (3, 1, 1))):
        board, clock = torch.zeros(BOARD_WORDS, dtype=torch.int32), torch.zeros(CLOCK_WORDS, dtype=torch.int64)
        frames = FrameKernels(bytes(HEADER_NBYTES), HEAD_PLACES, nbytes, board, stream)
        frame = torch.zeros(HEADER_NBYTES + nbytes, dtype=torch.uint8)
        sums, flag = sums_of(board.device, None)
        frames.launch(frames.sealing, (frame, sums, clock, flag), (*call, 2, 2**64 - 1), None)
        frames.launch(frames.checking, (frame, sums, clock, frames.accepted), (*call, 1, 0), None)
        seen.add((compiler.ptx["seal_frame"], compiler.ptx["check_frame"]))
    assert len(seen) == 1


CASES = [
    ({"id": "int4"}, plain(128 * 256, 1, 256), torch.bfloat16),
    ({"id": "int8"}, plain(5000 * 72, 1, 72), torch.float32),
    ({"id": "ternary"}, blocks(300), torch.float16),
    ({"id": "fp8"}, Layout("(h s d) -> 1 s (d h)", h=3, d=8).resolve(3 * 70 * 8), torch.bfloat16),
    ({"id": "binary"}, Layout("(b h s d) -> (b h) s d", b=2, h=3, d=64).resolve(2 * 3 * 70 * 64), torch.bfloat16),
    ({"id": "int2", "scales": "block"}, plain(128 * 256, 1, 256), torch.bfloat16),
    ({"id": "int3", "scales": "block", "block": 33}, plain(3 * 40 * 65, 3, 65), torch.bfloat16),
]
QUICK = ({"id": "int4"}, {"id": "int2", "scales": "block"})


@pytest.mark.skipif(gpu.INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize(
    ("form", "view", "dtype"),
    [case if case[0] in QUICK else pytest.param(*case, marks=pytest.mark.slow) for case in CASES],
    ids=lambda value: value.get("id") if type(value) is dict else "",
)
def test_they_compile_for_an_h100(form, view, dtype, monkeypatch):
    """What the interpreter cannot show: types, no contracted multiply-add, IEEE division, loads of 16 bytes."""
    from triton.runtime.jit import JITFunction

    from compactdist.kernels.gpu.plan import plan_of

    compiler = Compiler()
    monkeypatch.setattr(JITFunction, "run", lambda kernel, *args, **others: compiler.launch(kernel, *args, **others))
    codec, x, base = codecs.get(form), torch.zeros(view.numel, dtype=dtype), torch.zeros(view.numel, dtype=dtype)
    plan = plan_of(codec.spec, view, torch.device("cpu"))
    steps = gpu.TritonSteps(plan, dtype, torch.device("cpu"))
    payload = torch.zeros(plan.sections.total_nbytes, dtype=torch.uint8)
    assert steps.encode(x, (base,), torch.zeros_like(x), payload)
    assert steps.decode(payload, (base, x), base)
    expected = {"decode_codes"}
    if "block" in form.values():
        expected |= {"encode_blocks", "encode_codes"} if "block" in form else {"encode_held_blocks"}
    else:
        expected |= {"row_statistics", "tile_sums", "settle", "encode_codes"}
        expected |= {"fold_many_tiles"} if view.rows > 4096 else set()
    assert set(compiler.ptx) == expected
    for name, ptx in compiler.ptx.items():
        assert not re.search(r"\bfma\.", ptx), f"{name} contracts"
        assert not re.search(r"\b(div\.(full|approx)|sqrt\.approx|rcp\.approx|[a-z]+\.ftz)", ptx), (
            f"{name} is not exact"
        )
    if view.channels % 16 == 0 and view.numel % 8 == 0 and "block" not in form:
        for name in expected - {"settle"}:
            assert re.search(r"ld\.global\.v4\.b32", compiler.ptx[name]), f"{name} loads less than 16 bytes at a time"


@pytest.mark.skipif(gpu.INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("codec_id", ["int2", "int8"])
def test_kernels_of_histories_compile_for_an_h100(codec_id):
    compiler, view = Compiler(), plain(4200 * 256, 1, 256)
    history_step(codecs.get(codec_id, scales="token_history"), view, torch.bfloat16, compiler)
    encoding = {"take_scales", "settle_rows", "sum_squares", "fold_many_tiles", "settle_roots", "encode_codes"}
    assert set(compiler.ptx) == {*encoding, "next_scales", "decode_codes"}
    for name, ptx in compiler.ptx.items():
        assert not re.search(r"\bfma\.", ptx), f"{name} contracts"
        assert not re.search(r"\b(div\.(full|approx)|sqrt\.approx|rcp\.approx|[a-z]+\.ftz)", ptx), name
    for name in ("settle_rows", "sum_squares", "encode_codes"):
        assert re.search(r"ld\.global\.v4\.b32", compiler.ptx[name]), f"{name} loads less than 16 bytes at a time"
