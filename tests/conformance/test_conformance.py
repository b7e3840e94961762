"""The committed list of torch's tests that compressed groups pass, and a sample of it run again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conformance import report

ROOT = Path(__file__).resolve().parents[2]
RESULTS = json.loads((ROOT / "tests/conformance/results.json").read_text())
# Every operation that is compressed, every one that passes through, subgroups, objects, DDP.
SAMPLE = [
    "test_DistributedDataParallelCPU",
    "test_all_gather",
    "test_all_gather_coalesced_simple",
    "test_all_gather_coalesced_with_empty",
    "test_all_gather_complex",
    "test_all_gather_full_group",
    "test_all_gather_object_subgroup",
    "test_all_reduce_coalesced_sum",
    "test_all_reduce_sum_async",
    "test_all_to_all",
    "test_all_to_all_single_equal_split_full_group",
    "test_all_to_all_single_unequal_split",
    "test_barrier",
    "test_batch_isend_irecv_gloo",
    "test_broadcast",
    "test_broadcast_full_group",
    "test_gather",
    "test_get_backend",
    "test_isend",
    "test_monitored_barrier_gloo",
    "test_reduce_sum",
    "test_scatter",
    "test_scatter_object_list",
    "test_send_recv",
    "test_send_recv_any_source",
    "test_send_recv_with_tag",
]


def test_committed_list_conforms() -> None:
    assert report.judge(RESULTS) == []
    for kind in ("wrapped", "backend"):
        passed = [n for n, o in RESULTS["tests"].items() if o[kind]["status"] == "passed"]
        assert len(passed) >= report.LEAST_PASSED


def test_document_is_made_from_the_list() -> None:
    assert (ROOT / "docs/conformance.md").read_text() == report.document(RESULTS)


def test_sample_is_a_part_of_the_list() -> None:
    assert set(SAMPLE) <= set(RESULTS["tests"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda o: o.update(status="failed", reason="Boom"), "Boom"),
        (lambda o: o.update(status="skipped", reason="why"), "why"),
    ],
)
def test_a_worse_result_than_gloo_is_noticed(change, said) -> None:
    results = json.loads(json.dumps(RESULTS))
    change(results["tests"]["test_all_gather"]["wrapped"])
    wrong = report.judge(results)
    assert len(wrong) == 1
    assert "test_all_gather" in wrong[0]
    assert said in wrong[0]


def test_a_run_without_frames_is_noticed() -> None:
    results = json.loads(json.dumps(RESULTS))
    for outcomes in results["tests"].values():
        outcomes["wrapped"].pop("compressed", None)
    assert len(report.judge(results)) == len(report.COMPRESSED_OPS)


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_sample_of_torchs_tests(tmp_path: Path) -> None:
    output = tmp_path / "results.json"
    options = ["--json", str(output), "--kinds", "wrapped", "backend", "--only", *SAMPLE]
    run = subprocess.run(
        [sys.executable, "-m", "tests.conformance", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=170,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    tests = json.loads(output.read_text())["tests"]
    assert sum(o["wrapped"]["status"] == "passed" for o in tests.values()) >= 12
