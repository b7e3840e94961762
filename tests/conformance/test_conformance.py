"""The committed list of torch's tests that compressed groups pass, and a sample of it run again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conformance import report

ROOT = Path(__file__).resolve().parents[2]
LISTS = report.committed()
# Every operation that is compressed, those that pass through in a way of their own, subgroups, objects, DDP.
SAMPLE = [
    "test_DistributedDataParallelCPU",
    "test_all_gather",
    "test_all_gather_coalesced_simple",
    "test_all_gather_object_subgroup",
    "test_all_reduce_sum_async",
    "test_all_to_all",
    "test_all_to_all_single_equal_split_full_group",
    "test_all_to_all_single_unequal_split",
    "test_batch_isend_irecv_gloo",
    "test_broadcast",
    "test_gather",
    "test_isend",
    "test_monitored_barrier_gloo",
    "test_reduce_sum",
    "test_scatter_object_list",
    "test_send_recv",
    "test_send_recv_any_source",
    "test_send_recv_with_tag",
]


@pytest.mark.parametrize("inner", report.INNER)
def test_committed_lists_conform(inner) -> None:
    assert report.judge(LISTS[inner]) == []
    assert LISTS[inner]["kinds"] == report.INNER[inner][1]


def test_at_least_95_tests_run_on_gloo() -> None:
    ran = [n for n, o in LISTS["gloo"]["tests"].items() if o["gloo"]["status"] == o["wrapped"]["status"] == "passed"]
    assert len(ran) >= 95


def test_document_is_made_from_the_lists() -> None:
    assert (ROOT / "docs/conformance.md").read_text() == report.document(LISTS)


@pytest.mark.parametrize("inner", report.INNER)
def test_sample_is_a_part_of_the_lists(inner) -> None:
    assert set(SAMPLE) <= set(LISTS[inner]["tests"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda o: o.update(status="failed", reason="Boom"), "Boom"),
        (lambda o: o.update(status="skipped", reason="why"), "why"),
    ],
)
@pytest.mark.parametrize(("inner", "kind"), [("gloo", "wrapped"), ("nccl_like", "nccl-int8")])
def test_a_worse_result_than_the_plain_groups_is_noticed(inner, kind, change, said) -> None:
    results = json.loads(json.dumps(LISTS[inner]))
    change(results["tests"]["test_all_gather"][kind])
    wrong = report.judge(results)
    assert len(wrong) == 1
    assert "test_all_gather" in wrong[0]
    assert said in wrong[0]


def test_a_run_without_frames_is_noticed() -> None:
    results = json.loads(json.dumps(LISTS["gloo"]))
    for outcomes in results["tests"].values():
        outcomes["wrapped"].pop("compressed", None)
    assert len(report.judge(results)) == len(report.COMPRESSED_OPS)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_sample_of_torchs_tests(tmp_path: Path) -> None:
    options = ["--json", str(tmp_path), "--kinds", "wrapped", "backend", "int8", "nccl-int8"]
    run = subprocess.run(
        [sys.executable, "-m", "tests.conformance", *options, "--only", *SAMPLE],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    for inner, kind in (("gloo", "int8"), ("nccl_like", "nccl-int8")):
        tests = json.loads(report.path_of(inner, tmp_path).read_text())["tests"]
        assert sum(o[kind]["status"] == "passed" for o in tests.values()) >= 12
