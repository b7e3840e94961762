"""``python -m benchmarks.gpu.check`` runs, on an inner group with NCCL's manners, and finds what it is for."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import compactdist
from benchmarks.gpu import check
from benchmarks.gpu.collectives import CALLS, Run
from compactdist.testing import act_like_nccl
from tests.launch import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def test_every_collective_is_right_and_compressed(monkeypatch, tmp_path: Path, capsys) -> None:
    def on_two_ranks(body, *args):
        return run_ranks(lambda rank, size: body(rank, *args), 2, timeout=100)[0]

    out = tmp_path / "out.json"
    monkeypatch.setattr(check, "on_two_ranks", on_two_ranks)  # forked ranks have nothing to import or compile
    monkeypatch.setattr(sys, "argv", [check.__file__, "--inner", "nccl_like", "--json", str(out)])
    check.main()
    lines = json.loads(out.read_text())["lines"]
    assert [line["call"] for line in lines] == list(CALLS)
    assert all(line["right"] for line in lines)
    assert sum(line["frames"] for line in lines) >= 100
    assert capsys.readouterr().out.count("\nright ") == len(lines)


def test_it_says_wrong_where_data_frames_or_calls_fail(monkeypatch) -> None:
    broadcast, _ = CALLS["broadcast"]

    def passed(run: Run):
        """Below ``min_numel``: right, and not compressed."""
        out = run.nothing(16)
        dist.all_gather_into_tensor(out, run.mine(8), group=run.group)
        return out, run.all(8)

    def stale(run: Run):
        arrived, expected = broadcast(run)
        return (run.nothing() if run.step == 2 else arrived), expected

    def raises(run: Run):
        raise RuntimeError("no")

    def body(rank, size):
        group = compactdist.wrap(act_like_nccl(dist.group.WORLD), "int8", min_numel=64)
        run, lines = Run(group, rank, torch.device("cpu")), {}
        for name, made in {"passed": passed, "stale": stale, "raises": raises, "good": broadcast}.items():
            monkeypatch.setitem(CALLS, name, (made, 1))
            lines[name] = check.checked(run, name, 0.02)
        return lines

    for lines in run_ranks(body, 2, timeout=60):
        assert [line["right"] for line in lines.values()] == [False, False, False, True]
        assert (lines["passed"]["frames"], lines["passed"]["frames_expected"]) == (0, check.STEPS)
        assert lines["raises"]["raised"] == "RuntimeError: no"
