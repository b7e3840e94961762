"""``compactdist doctor``: what it finds where all is well, and where something is wrong on purpose."""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from compactdist import _torch, codecs, kernels
from compactdist.cli import ranks_check, streams_check, surroundings
from compactdist.cli.findings import Finding
from compactdist.config import Options
from compactdist.presets import PRESETS
from compactdist.state import ResidualDecoder
from tests.cli.kit import run, run_json
from tests.launch import run_ranks

health = importlib.import_module("compactdist.cli.doctor")  # the package has a command of that name


@pytest.fixture(autouse=True)
def _quiet_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable of whoever runs the tests, and no load of what else runs here."""
    for name in [name for name in os.environ if name.startswith("COMPACTDIST_") or name in ranks_check._LAUNCHED_BY]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(surroundings, "_load", lambda: 0.0)


@pytest.fixture
def no_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the streams out, where something else is looked at."""
    monkeypatch.setattr(health, "check_streams", lambda *_: [])


def found(document: dict[str, Any], name: str) -> dict[str, Any]:
    (one,) = [finding for finding in document["findings"] if finding["name"] == name]
    return dict(one)


def test_all_is_well_here() -> None:
    document = run_json("doctor", "--json", "-")
    assert document["status"] == "ok"
    assert document["fingerprint"] == Options().fingerprint()
    assert kernels.digest() in found(document, "compactdist")["value"]
    assert found(document, "torch")["value"] == torch.__version__
    assert found(document, "COMPACTDIST_*")["value"] == "none is set"
    assert "can be written" in found(document, "CPU cache folder")["value"]
    rows = {row["name"]: row for row in document["streams"] if row["device"] == "cpu"}
    assert list(rows) == list(PRESETS)
    for name, row in rows.items():
        assert row["problem"] == ""
        assert 0 < row["residual_bytes"] < row["raw_bytes"] / 3, name
        assert 0 < row["rel_error"] < 0.2, name
        assert row["ms"] > 0
    assert rows["safe"]["keyframe_bytes"] > rows["safe"]["raw_bytes"]  # its own bytes and a header
    assert rows["safe"]["rel_error"] < rows["balanced"]["rel_error"] < rows["small"]["rel_error"]


def test_every_codec_if_wanted() -> None:
    assert set(streams_check.streams(True)) == {*PRESETS, *(f"codec {name}" for name in codecs.list())}
    raw = {"raw": {"codec": "raw"}}
    (row,) = streams_check.check_streams(raw, [torch.device("cpu")])
    assert (row.problem, row.rel_error) == ("", 0.0)


def test_a_decoder_that_differs_by_a_byte_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    decode = ResidualDecoder.decode

    def wrong(self: ResidualDecoder, frame: torch.Tensor) -> torch.Tensor:
        value = decode(self, frame)
        if self.codec.codec_id == "int4":
            value.view(-1).view(torch.uint8)[5] ^= 1
        return value

    monkeypatch.setattr(ResidualDecoder, "decode", wrong)
    monkeypatch.setattr(health, "streams", lambda _: {name: {"codec": name} for name in ("int4", "int8")})
    result = run("doctor")
    assert result.exit_code == 1
    assert "int4 on cpu" in result.stdout
    assert "frame 0: the decoded tensor is not" in " ".join(result.stdout.split())
    assert "1 error" in result.stdout
    assert "int8 on cpu" not in result.stdout


def test_what_a_stream_raises_is_told_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = {"broken": {"codec": "int4", "order": 7}, "int2": {"codec": "int2"}}
    broken, good = streams_check.check_streams(chosen, [torch.device("cpu")])
    assert "order" in broken.problem
    assert good.problem == ""
    assert [one.status for one in streams_check.stream_findings([broken, good])] == ["error"]


@pytest.mark.usefixtures("no_streams")
@pytest.mark.parametrize(
    ("variables", "wrong", "says"),
    [
        ({"COMPACTDIST_CODEX": "int4"}, "COMPACTDIST_CODEX", "did you mean COMPACTDIST_CODEC"),
        ({"COMPACTDSIT_CODEC": "int4"}, "COMPACTDSIT_CODEC", "did you mean COMPACTDIST_CODEC"),
        ({"COMPACTDIST_ORDER": "x", "COMPACTDIST_CODEC": "int4"}, "COMPACTDIST_ORDER", "an integer or auto"),
        ({"COMPACTDIST_CODEC": "int5"}, "together", "int5"),
        ({"COMPACTDIST_CODEC": "raw", "COMPACTDIST_MODE": "predict-now"}, "together", "predict-now"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_wrong_variables_are_errors(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], wrong: str, says: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    result = run("doctor", "--ranks", 2, "--json", "-")
    assert result.exit_code == 1
    document = json.loads(result.stdout)
    assert document["status"] == "error"
    assert [one["name"] for one in document["findings"] if one["status"] == "error"] == [wrong]
    assert says in found(document, wrong)["remedy"]
    assert document["fingerprint"] == {}
    assert "not tried" in found(document, "2 ranks")["value"]


@pytest.mark.usefixtures("no_streams")
def test_variables_are_shown_as_they_are_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPACTDIST_FORWARD", "false")
    monkeypatch.setenv("COMPACTDIST_ORDER", "2")
    monkeypatch.setenv("COMPACTDIST_XDIT", "1")  # an adapter's
    document = run_json("doctor", "--json", "-")
    assert found(document, "COMPACTDIST_FORWARD")["value"] == "False"
    assert found(document, "COMPACTDIST_ORDER")["value"] == "2"
    assert found(document, "COMPACTDIST_XDIT")["value"] == "'1'"
    assert document["fingerprint"] == Options(order=2, forward=False).fingerprint()


@pytest.mark.usefixtures("no_streams")
@pytest.mark.parametrize(
    ("version", "status"), [((2, 9), "error"), ((2, 12), "ok"), ((2, 15), "warning"), ((2, 13), "ok")]
)
def test_versions_of_torch(monkeypatch: pytest.MonkeyPatch, version: tuple[int, int], status: str) -> None:
    monkeypatch.setattr(_torch, "VERSION", version)
    result = run("doctor", "--json", "-")
    assert result.exit_code == (status == "error")
    assert found(json.loads(result.stdout), "torch")["status"] == status


@pytest.mark.usefixtures("no_streams")
def test_what_makes_it_slow_is_a_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(surroundings, "_usable_cores", lambda: 0.5)
    monkeypatch.setattr(surroundings, "_load", lambda: 3.0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(surroundings, "_cache", lambda: None)
    monkeypatch.setattr(surroundings, "find_spec", lambda name: None if name == "numba" else object())
    document = run_json("doctor", "--json", "-")  # the exit status is 0
    assert document["status"] == "warning"
    slow = {one["name"]: one["remedy"] for one in document["findings"] if one["status"] == "warning"}
    assert set(slow) == {"torch threads", "load average", "numba"}
    assert "OMP_NUM_THREADS=1" in slow["torch threads"]
    monkeypatch.setattr(surroundings, "find_spec", lambda _: object())
    cache = surroundings.cache_findings(0, 1.0)[0]
    assert (cache.status, cache.name) == ("warning", "CPU cache folder")
    assert "NUMBA_CACHE_DIR" in cache.remedy


@pytest.mark.usefixtures("no_streams")
def test_a_numba_that_cannot_be_loaded_is_an_error_and_the_rest_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise OSError("libllvmlite.so: cannot open shared object file")

    monkeypatch.setattr(surroundings, "import_module", broken)
    result = run("doctor", "--json", "-")
    document = json.loads(result.stdout)
    assert result.exit_code == 1
    wrong = [one["name"] for one in document["findings"] if one["status"] == "error"]
    assert wrong == ["CPU kernels"]
    assert "libllvmlite.so" in found(document, "CPU kernels")["value"]
    assert document["fingerprint"]


def test_a_cold_cache_is_told_from_a_warm_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(surroundings, "_cache", lambda: tmp_path)
    (tmp_path / "a.o").write_bytes(b"")
    assert "1 kernels, warm" in surroundings.cache_findings(1, 2.0)[1].value
    (tmp_path / "b.o").write_bytes(b"")
    assert "2 kernels, cold: 1 were compiled now" in surroundings.cache_findings(1, 2.0)[1].value


@pytest.mark.usefixtures("no_streams")
@pytest.mark.parametrize(
    ("arguments", "says"),
    [(("--codecs", "some"), "presets or all"), (("--ranks", 1), "2 or more"), (("--ranks", -1), "--ranks")],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_wrong_arguments(arguments: tuple[Any, ...], says: str) -> None:
    result = run("doctor", *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert says in result.stderr


# --- between ranks


@pytest.mark.timeout(120)
def test_ranks_of_its_own_compress_an_all_gather(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPACTDIST_CODEC", "int8")  # the ranks see the variables of who starts them
    result = ranks_check.between_own_ranks(2, 100.0)
    assert result["problem"] == ""
    assert (result["backend"], result["size"], result["compressed"], result["codec"]) == ("gloo", 2, True, "int8")
    assert result["wire_bytes"] < result["raw_bytes"] / 3.5
    assert 0 < result["rel_error"] < 1e-2
    (finding,) = ranks_check.rank_findings(result)
    assert (finding.status, finding.name) == ("ok", "2 ranks over gloo")
    assert "compressed with int8" in finding.value


def _passing(rank: int, size: int) -> dict[str, Any]:
    os.environ["COMPACTDIST_MIN_NUMEL"] = "10000000"
    return ranks_check._among_ranks(20.0, [])


@pytest.mark.timeout(60)
def test_a_call_that_passes_through_is_a_warning_with_its_reason() -> None:
    for result in run_ranks(_passing):
        assert not result["compressed"]
        (finding,) = ranks_check.rank_findings(result)
        assert finding.status == "warning"
        assert "small (fewer elements than min_numel)" in finding.value


def _launched(rank: int, size: int, differing: str) -> tuple[int, str, str]:
    torch.set_num_threads(1)
    health.check_streams, surroundings._load = (lambda *_: []), (lambda: 0.0)  # in this process alone
    health._GRACE_SECONDS = 0.0
    if rank == 1 and differing:
        name, _, value = differing.partition("=")
        os.environ[name] = value
    result = run("doctor", "--timeout", 10)
    return result.exit_code, " ".join(result.stdout.split()), result.stderr


@pytest.mark.timeout(90)
def test_ranks_of_torchrun_check_one_another_and_the_first_prints() -> None:
    first, second = run_ranks(_launched, 2, init=False, args=("",))
    assert first[0] == second[0] == 0, first
    assert "2 ranks over gloo compressed with int2" in first[1]
    assert second[1:] == ("", "")


@pytest.mark.timeout(90)
@pytest.mark.parametrize(
    ("differing", "says", "heard"),
    [("COMPACTDIST_CODEX=int4", "COMPACTDIST_CODEX", True), ("COMPACTDIST_CODEC=int4", "ConfigMismatchError", False)],
    ids=["unknown variable", "other codec"],
)
def test_what_is_wrong_on_another_rank_is_printed_by_the_first(differing: str, says: str, heard: bool) -> None:
    """Another rank fails only for what the first cannot know: torchrun would kill the first before it has printed."""
    first, second = run_ranks(_launched, 2, init=False, args=(differing,))
    assert first[0] == 1
    assert says in first[1]
    assert second[:2] == (0 if heard else 1, "")
    assert (says in second[2]) != heard


def test_ranks_that_end_without_a_result_are_named(tmp_path: Path) -> None:
    results, logs = [tmp_path / "0.json", tmp_path / "1.json"], [tmp_path / "0.txt", tmp_path / "1.txt"]
    results[0].write_text('{"problem": ""}')
    logs[1].write_text("line\nSegmentation fault\n")
    made = ranks_check._collected(results, logs, [], 5.0)
    assert made["problem"] == "rank 1 ended without a result: Segmentation fault"
    late = ranks_check._collected(results, logs, [1], 5.0)
    assert "rank 1 did not end within 35 s" in late["problem"]
    (finding,) = ranks_check.rank_findings(late)
    assert finding.status == "error"


def test_ranks_that_hold_different_bytes_are_an_error() -> None:
    same = {"digests": ["a", "b", "c"], "rel_error": 0.1, "compressed": True}
    assert ranks_check._problem([same, same, same]) == ""
    own = {**same, "digests": ["other", "b", "c"]}  # its own chunk may be exact
    assert ranks_check._problem([own, same, same]) == ""
    other = {**same, "digests": ["a", "b", "x"]}
    assert "different bytes of what rank 2 sent" in ranks_check._problem([other, same, same])
    assert "rank 1 received" in ranks_check._problem([same, {**same, "rel_error": float("nan")}, same])


def test_a_finding_is_its_line() -> None:
    assert str(Finding("a", "b", "c")) == "b: c"
    assert str(Finding("a", "b", "c", "error", "do d")) == "b: c; do d"
