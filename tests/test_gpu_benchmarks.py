"""The GPU benchmarks run without a GPU as far as they can, go on after a failure, and print what fits a terminal."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import common, e2e, host, kernels, reference
from benchmarks.gpu.reference_steps import RANK, RECIPES
from benchmarks.quality import reference_formulas

ROOT = Path(__file__).parents[1]
COLUMNS = 100


def run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-m", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=110)


def fits(table: str) -> bool:
    return max(map(len, table.splitlines())) <= COLUMNS


def test_host_measures_every_kind_of_method_on_a_cpu(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    size = ("--device", "cpu", "--rows", "16", "--sites", "2", "--rounds", "2")
    only = ("plain", "passed through", "raw", "int8", "int8 block")
    done = run("benchmarks.gpu.host", *size, "--only", *only, "--json", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text())
    assert {"gpu", "driver", "nccl", "triton", "torch"} <= set(result)
    lines = {line["name"]: line for line in result["lines"]}
    assert list(lines) == list(only)
    assert all(line["host_us"] > 0 and line["host_waits"] is None for line in lines.values())
    assert lines["plain"]["python_calls"] < lines["passed through"]["python_calls"] < lines["int8"]["python_calls"]
    assert lines["passed through"]["compressed_calls"] == 0
    assert lines["int8"]["compressed_calls"] > 0 < lines["int8"]["state_bytes"]


@pytest.mark.slow
def test_host_records_launches_where_there_is_no_gpu(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    size = ("--rows", "64", "--sites", "2", "--rounds", "3", "--only", "int4", "int4 block")
    done = run("benchmarks.gpu.host", "--stub", *size, "--json", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    by_row, by_block = json.loads(out.read_text())["lines"]
    assert (by_row["launches"], by_block["launches"]) == (7, 4)
    assert 0 < by_row["host_us"] <= by_row["host_us_median"]
    assert by_block["python_calls"] <= by_row["python_calls"] <= 86
    refused = run("benchmarks.gpu.host", "--stub", "--only", "plain")
    assert refused.returncode == 1
    assert "no kernels to be recorded for plain" in refused.stderr


@pytest.mark.slow
def test_reference_times_and_plays_every_line_on_a_cpu(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    size = ("--device", "cpu", "--shapes", "64x96", "--steps", "3", "--rounds", "2", "--backend", "aot_eager")
    only = [name for name in reference.NAMES if name.startswith(("binary", "lowrank"))]
    done = run("benchmarks.gpu.reference", *size, "--only", *only, "--json", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    lines = {line["method"]: line for line in json.loads(out.read_text())["lines"]}
    assert list(lines) == only
    for line in lines.values():
        assert 0 < line["white_error"] < 0.1
        assert 0 < line["drift_error"] < 0.4
        assert line["white_ends_equal"]
        assert line["drift_ends_equal"]
        assert line["encode_host_us"] > 0 < line["decode_host_us"]
    eager, compiled, ours = (lines[f"binary {kind}"] for kind in ("eager", "compiled", "ours"))
    assert eager["white_error"] == pytest.approx(compiled["white_error"])
    assert eager["white_error"] == pytest.approx(ours["white_error"], rel=0.02)
    assert abs(eager["payload_bytes"] - ours["payload_bytes"]) < 300  # scales, and where they lie


@pytest.mark.parametrize("name", ["binary", "int2", "lowrank_int4"])
def test_the_recipe_is_what_its_formula_says(name: str) -> None:
    g = torch.Generator().manual_seed(1)
    base = torch.randn(66, 96, generator=g).half()
    x = (base + 0.1 * torch.randn(66, 96, generator=g)).half()
    r = x.float() - base.float()
    torch.manual_seed(3)
    payload, sent = RECIPES[name].encode(x, base)
    if name == "lowrank_int4":
        change, bits = reference_formulas.lowrank_int4(r, RANK, torch.Generator().manual_seed(3))
    else:
        change, bits = getattr(reference_formulas, name)(r)
    assert 8 * payload.numel() == bits
    assert torch.equal(sent, RECIPES[name].decode(payload, base))
    assert torch.allclose(sent.float(), base.float() + change, rtol=1e-3, atol=1e-3)
    assert (sent.float() - x.float()).norm() < 0.75 * r.norm()


@pytest.mark.slow
@pytest.mark.xdit
def test_e2e_runs_a_tiny_model_with_nccls_manners(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    tiny = ("--tiny", "--inner", "nccl_like", "--route", "ring", "--steps", "4")
    done = run("benchmarks.gpu.e2e", *tiny, "--methods", "passed through", "int8", "--json", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    plain, passed, int8 = json.loads(out.read_text())["lines"]
    assert plain["name"] == "plain"
    assert len(plain["steps_ms"]) == 4
    assert passed["error_of_latents"] == 0
    assert passed["wire_bytes"] == passed["raw_bytes"]
    assert 0 < int8["error_of_latents"] < 0.01
    assert int8["wire_bytes"] < int8["raw_bytes"] / 2
    assert int8["state_bytes"] > 0


@pytest.mark.parametrize("module", [host, e2e, reference], ids=lambda module: module.__name__)
def test_without_a_gpu_they_say_so(module: Any, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", [module.__file__])
    with pytest.raises(SystemExit) as stopped:
        module.main()
    assert stopped.value.code == common.EXIT_WITHOUT_GPU
    assert "no CUDA device" in capsys.readouterr().out


def test_a_method_that_raises_does_not_stop_the_others(tmp_path: Path, capsys, monkeypatch) -> None:
    def work(name: str) -> dict[str, Any]:
        if name == "bad":
            raise RuntimeError("out of luck")
        return {"us": 1.0} | ({"error": "wrong bytes"} if name == "wrong" else {})

    lines = common.lines_of(("bad", "wrong", "good"), work)
    assert [line.get("error") for line in lines] == ["RuntimeError: out of luck", "wrong bytes", None]
    out = tmp_path / "out.json"
    monkeypatch.setattr(sys, "argv", [kernels.__file__])
    with pytest.raises(SystemExit, match=r"2 of 3 failed: bad, wrong"):
        common.settle(out, {"lines": lines}, lines)
    assert len(json.loads(out.read_text())["lines"]) == 3
    assert "bad FAILED: RuntimeError: out of luck" in capsys.readouterr().out
    common.settle(None, {"lines": lines}, lines[2:])


def _of_a_rank(name: str, **found: Any) -> dict[str, Any]:
    counts = dict.fromkeys(("compressed_calls", "passed_through", "wire_bytes", "raw_bytes", "state_bytes"), 1)
    return {"name": name, "step_ms": 2.0, "first_ms": 3.0, "request_s": 1.0, "steps_ms": [3.0, 2.0], **counts, **found}


def test_e2e_goes_on_in_new_ranks() -> None:
    asked = []

    def ranks(left):
        asked.append(list(left))
        if left[0] == "raw":  # rank 1 raises, rank 0 hangs
            return [[_of_a_rank("plain")], [_of_a_rank("plain"), {"name": "raw", "error": "rank 1: no"}]]
        if left[0] == "int2":  # both are killed
            return [[_of_a_rank("plain", step_ms=9.0)], [_of_a_rank("plain")]]
        lines = [_of_a_rank("plain"), *(_of_a_rank(name) for name in left)]
        return [lines, [{**line, "step_ms": 4.0, "error_of_latents": 0.5} for line in lines]]

    lines = {line["name"]: line for line in e2e.measure(("raw", "int2", "int8", "binary"), ranks)}
    assert asked == [["raw", "int2", "int8", "binary"], ["int2", "int8", "binary"], ["int8", "binary"]]
    assert list(lines) == ["plain", "raw", "int2", "int8", "binary"]
    assert lines["raw"]["error"] == "rank 1: no"
    assert "without a word" in lines["int2"]["error"]
    assert lines["plain"]["step_ms"] == 2.0  # of the first ranks
    assert (lines["int8"]["step_ms"], lines["int8"]["wire_bytes"], lines["int8"]["error_of_latents"]) == (4.0, 2, 0.5)


def test_e2e_gives_up_where_the_plain_pipeline_fails() -> None:
    lines = e2e.measure(("raw", "int2"), lambda left: [[{"name": "setting up", "error": "rank 0: no"}], []])
    assert [line["error"] for line in lines] == ["rank 0: no"] * 3


def test_counts_of_a_profile() -> None:
    host_side = ["cuLaunchKernelEx", "aten::add", "cudaMemcpyAsync", "cudaStreamSynchronize", "cudaEventSynchronize"]
    host_side += ["cudaDeviceSynchronize", "cudaStreamWaitEvent", "cudaEventRecord"]  # the profile's own; no wait
    device_side = [("encode_codes", 7.0), ("settle", 1.0), ("Memcpy DtoH (Device -> Pageable)", 2.0)]
    device_side += [("Memset (Device)", 0.5), ("void at::native::elementwise", 1.5)]
    events = [*((name, False, 3.0) for name in host_side), *((name, True, us) for name, us in device_side)]
    counts = common.counted(events)
    assert counts == common.Counts(launches=3, copies=1, fills=1, waits=2, kernel_us=12.0)
    assert counts.per(2) == {"launches": 1.5, "copies": 0.5, "fills": 0.5, "waits": 1.0, "kernel_us": 6.0}


def test_tables_fit_and_leave_gaps_where_something_failed() -> None:
    timed = {"encode_graph_us": 4507.3, "encode_of_copy": 1.03, "encode_host_us": 1310.0}
    timed |= {name.replace("encode", "decode"): value for name, value in timed.items()}
    names = [(f"{name} {size}", size) for name in kernels.TIMED for size in kernels.SIZES]
    lines = [{"name": name, "size": size, **timed} for name, size in names[1:]] + [{"name": names[0][0], "error": "no"}]
    table = kernels.shown(lines)
    assert fits(table)
    assert len(table.splitlines()) == 1 + 2 * len(kernels.TIMED)
    assert table.splitlines()[1].split()[-1] == "-"

    keys = ("host_us", "total_us", "python_calls", "launches", "copies", "fills", "waits", "kernel_us", "host_waits")
    lines = [{"name": name, **dict.fromkeys(keys, 12345.6)} for name in host.METHODS] + [{"name": "x", "error": "no"}]
    assert fits(host.shown(lines))

    keys = [f"{way}_{what}_us" for way in ("encode", "decode") for what in ("kernel", "graph", "host")]
    numbers = {**dict.fromkeys(keys, 12345.6), "encode_launches": 1088, "white_error": 0.0589, "drift_error": 0.2}
    lines = [{"name": f"{name} 1088", **numbers} for name in reference.NAMES] + [{"name": "x", "error": "no"}]
    assert fits(reference.shown(lines))

    large = _of_a_rank("x", step_ms=12345.6, first_ms=12345.6, request_s=123.4, error_of_latents=1e-3)
    large |= {"wire_bytes": 9 * 10**9, "raw_bytes": 9 * 10**9, "state_bytes": 9 * 10**9, "compressed_calls": 99999}
    lines = [{**large, "name": name} for name in ("plain", *e2e.METHODS)] + [{"name": "y", "error": "no"}]
    assert fits(e2e.shown(lines))
