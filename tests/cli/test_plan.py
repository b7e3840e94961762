"""``compactdist plan``: its arithmetic, by hand, and what it recommends; times of codecs are set, but for one test."""

from __future__ import annotations

import importlib
import itertools
import json
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from compactdist import codecs
from compactdist.cli.evaluate import play_settings, settings_of_presets
from compactdist.cli.links import LINKS, link_of
from compactdist.cli.plan_times import Times, time_messages
from compactdist.cli.streams_check import changing
from compactdist.errors import ConfigError
from compactdist.observe.trace import Trace
from compactdist.presets import PRESETS
from compactdist.state import plain
from compactdist.wire import HEADER_NBYTES
from tests.cli.kit import activations, run, run_json, trace

plan = importlib.import_module("compactdist.cli.plan")  # the package has a command of that name
NUMBERS = ("plan", "--shape", "256x128", "--link", "1gbit", "--json", "-")
TIMES = Times(encode=3e-3, decode=1e-3, keyframe_encode=2e-3, keyframe_decode=5e-3)


@pytest.fixture(autouse=True)
def _quiet_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "time_messages", lambda *_: TIMES)


def rows_of(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in document["rows"]}


@pytest.mark.usefixtures("timed")
@pytest.mark.parametrize(
    ("op", "links", "encoders", "receivers"),
    [("all_gather", 3, 1, 3), ("all_to_all", 3, 3, 3), ("send", 1, 1, 1), ("broadcast", 3, 1, 1)],
)
def test_the_arithmetic(op: str, links: int, encoders: int, receivers: int) -> None:
    document = run_json(
        *NUMBERS,
        "--sites",
        5,
        "--ranks",
        4,
        "--steps",
        10,
        "--op",
        op,
        "--compute-ms",
        20,
        "--codec",
        "int4:scales=block",
    )
    rows = rows_of(document)
    assert list(rows) == ["uncompressed", *PRESETS, "int4:scales=block"]
    row, plain_row = rows["int4:scales=block"], rows["uncompressed"]
    numel = 256 * 128
    frame = HEADER_NBYTES + codecs.get("int4:scales=block").payload_nbytes((1, 256, 128), torch.bfloat16)
    key = HEADER_NBYTES + codecs.get("int8").payload_nbytes((1, 256, 128), torch.bfloat16)
    assert row["raw_bytes"] == plain_row["raw_bytes"] == links * 5 * 2 * numel
    assert row["residual_bytes"] == links * 5 * frame
    assert row["keyframe_bytes"] == links * 5 * key
    assert row["request_bytes"] == links * 5 * (key + 9 * frame)
    assert row["codec_s"] == pytest.approx(5 * (encoders * 3e-3 + receivers * 1e-3))
    assert row["keyframe_codec_s"] == pytest.approx(5 * (encoders * 2e-3 + receivers * 5e-3))
    assert row["step_s"] == pytest.approx(20e-3 + 8e-9 * row["residual_bytes"] + row["codec_s"])
    sent, coding = 8e-9 * row["request_bytes"], row["keyframe_codec_s"] + 9 * row["codec_s"]
    assert row["request_s"] == pytest.approx(10 * 20e-3 + sent + coding)
    assert plain_row["request_s"] == pytest.approx(10 * (20e-3 + 8e-9 * plain_row["raw_bytes"]))
    assert row["nmse_db"] is None
    assert document["trace"] is None


@pytest.mark.usefixtures("timed")
def test_where_it_begins_to_pay_a_request_takes_as_long_as_uncompressed() -> None:
    row = rows_of(run_json(*NUMBERS))["balanced"]
    at = ("plan", "--shape", "256x128", "--gbps", row["pays_below_gbps"], "--json", "-")
    rows = rows_of(run_json(*at, "--compute-ms", 7))
    assert rows["balanced"]["request_s"] == pytest.approx(rows["uncompressed"]["request_s"])
    assert rows["safe"]["request_s"] != pytest.approx(rows["uncompressed"]["request_s"])


@pytest.mark.usefixtures("timed")
def test_bytes_and_errors_of_a_trace_are_those_that_were_played(tmp_path: Path) -> None:
    x = activations(4, 96, 80, torch.float16)
    tensors = {"a": x, "b": x.flip(1), "kv": activations(4, 64, 64)}
    path = trace(tmp_path / "t.safetensors", tensors, {"groups": json.dumps({"kv": 2})})
    document = run_json("plan", "--trace", path, "--link", "1gbit", "--json", "-")
    assert document["steps"] == 4
    assert sorted(message["sites"] for message in document["messages"]) == [1, 2]
    scores = play_settings(Trace(path), settings_of_presets(["all"]))
    for name, score in scores.items():
        row = rows_of(document)[name]
        assert row["request_bytes"] == score.request.wire_bytes, name
        assert 3 * row["residual_bytes"] == score.residuals.wire_bytes, name
        assert row["nmse_db"] == pytest.approx(score.residuals.nmse_db)
        assert row["state_bytes"] == 2 * score.state_bytes, name  # the decoder holds as much
    assert "nmse_db" in document["measured"]


def test_times_are_measured_on_tensors_of_that_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, torch.dtype, Times]] = []

    def watched(setting: Any, tensors: Sequence[torch.Tensor], hint: Any) -> Times:
        made = time_messages(setting, tensors, hint)
        seen.append((hint.channels, tensors[0].dtype, made))
        return made

    monkeypatch.setattr(plan, "time_messages", watched)
    candidates = plan.candidates
    monkeypatch.setattr(plan, "candidates", lambda *_: candidates(["balanced"], ["raw"]))
    rows = rows_of(run_json(*NUMBERS, "--dtype", "float16", "--sites", 3))
    assert [(channels, dtype) for channels, dtype, _ in seen] == [(128, torch.float16)] * 2
    for name, (_, _, times) in zip(("balanced", "raw"), seen, strict=True):
        assert all(
            0 < seconds < 5 for seconds in (times.encode, times.decode, times.keyframe_encode, times.keyframe_decode)
        )
        assert rows[name]["codec_s"] == pytest.approx(3 * (times.encode + times.decode))
    assert rows["raw"]["pays_below_gbps"] is None


def test_tensors_go_forth_and_back_in_small_changes() -> None:
    tensors = [x.reshape(-1) for x in changing(4, 64, 32, torch.float32)]
    assert all(0.05 < float((b - a).norm() / a.norm()) < 0.2 for a, b in itertools.pairwise(tensors))
    (setting,) = settings_of_presets(["balanced"]).values()
    assert time_messages(setting, tensors[:2], plain(64 * 32, 1, 32)).encode > 0


# --- what it recommends


def a_row(name: str, request_s: float, nmse_db: float | None = None, request_bytes: int = 100) -> Any:
    how = "" if name == "uncompressed" else f"wrap(preset={name!r})"
    below = None if name == "uncompressed" else 2.0
    return plan.Row(
        name,
        how,
        1000,
        100,
        10,
        request_bytes,
        0.1,
        0.1,
        0.1,
        0.2,
        request_s,
        5,
        pays_below_gbps=below,
        nmse_db=nmse_db,
    )


PLAIN = a_row("uncompressed", 10.0)


def test_the_fastest_is_taken() -> None:
    name, why = plan.recommend([PLAIN, a_row("a", 5.0, -20.0), a_row("b", 4.0, -10.0)])
    assert name == "b"
    assert "wrap(preset='b')" in why
    assert "4 s instead of 10 s (2.5 times as fast); its error is -10.0 dB" in why


def test_of_those_nearly_as_fast_the_least_wrong_is_taken() -> None:
    rows = [PLAIN, a_row("a", 4.1, -20.0), a_row("b", 4.0, -10.0), a_row("c", 4.5, -90.0)]
    assert plan.recommend(rows)[0] == "a"
    unknown = [PLAIN, a_row("a", 4.1, None, 200), a_row("b", 4.0, None, 100), a_row("c", 4.5, None, 900)]
    name, why = plan.recommend(unknown)
    assert name == "a"
    assert "unknown without a trace" in why


def test_a_limit_of_the_error_leaves_rows_out() -> None:
    rows = [PLAIN, a_row("a", 5.0, -31.0), a_row("b", 4.0, -10.0)]
    assert plan.recommend(rows, -30.0)[0] == "a"
    name, why = plan.recommend(rows, -40.0)
    assert name is None
    assert "No choice has an error of -40 dB or less" in why


def test_uncompressed_where_nothing_pays() -> None:
    name, why = plan.recommend([PLAIN, a_row("a", 11.0), a_row("b", 9.8)])  # b saves too little to be worth an error
    assert name is None
    assert "No compression pays on this link: a request takes 10 s uncompressed, and 9.8 s with b" in why
    assert "below 2 Gbit/s" in why
    never = replace(a_row("a", 11.0), pays_below_gbps=None)
    assert "begin to save" not in plan.recommend([PLAIN, never])[1]


@pytest.mark.usefixtures("timed")
def test_messages_that_are_too_small_pass_through() -> None:
    document = run_json("plan", "--shape", "16x16", "--link", "1mbit", "--json", "-")
    rows = rows_of(document)
    assert {row["residual_bytes"] for row in rows.values()} == {512}
    assert {row["codec_s"] for row in rows.values()} == {0.0}
    assert document["recommended"] is None


@pytest.mark.usefixtures("timed")
def test_slow_links_are_worth_it_and_fast_ones_are_not() -> None:
    for gbps, wanted in ((0.01, True), (1000, False)):
        document = run_json("plan", "--shape", "256x128", "--gbps", gbps, "--json", "-")
        assert (document["recommended"] is not None) == wanted
        assert document["why"]


# --- arguments and table


@pytest.mark.parametrize(
    ("name", "gbps"),
    [("1gbit", 1.0), ("100mbit", 0.1), ("2.5Gbit/s", 2.5), ("10gbps", 10.0), ("PCIe4", LINKS["pcie4"])],
)
def test_links(name: str, gbps: float) -> None:
    assert link_of(name, None)[1] == pytest.approx(gbps)


@pytest.mark.parametrize("name", ["10", "fast", "0gbit", "gbit", "-1gbit", "pcie9"])
def test_what_is_no_link(name: str) -> None:
    with pytest.raises(ConfigError, match="pcie4"):
        link_of(name, None)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "neither is given"),
        (("--link", "1gbit", "--gbps", 2), "both are given"),
        (("--gbps", -2), "above 0"),
        (("--link", "1gbit", "--nmse-db", -30), "needs --trace"),
        (("--link", "1gbit", "--shape", "4096"), "NxC"),
        (("--link", "1gbit", "--dtype", "int8"), "bfloat16"),
        (("--link", "1gbit", "--shape", "64x64", "--op", "gather"), "all_gather"),
        (("--link", "1gbit", "--shape", "64x64", "--codec", "int5"), "int5"),
        (("--link", "1gbit", "--shape", "64x64", "--codec", "small"), "every preset has a row"),
        (("--link", "1gbit", "--device", "tpu"), "cpu or cuda"),
        (("--link", "1gbit", "--trace", "TRACE", "--sites", 2), "--sites would change nothing"),
        (("--link", "1gbit", "--trace", "TRACE", "--steps", 5), "--steps 5 asks for more"),
        (("--link", "1gbit", "--trace", "none"), "does not exist"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_wrong_arguments(tmp_path: Path, arguments: tuple[Any, ...], says: str) -> None:
    path = trace(tmp_path / "t.safetensors")
    result = run("plan", *(path if argument == "TRACE" else argument for argument in arguments), "--json", "-")
    assert (result.exit_code, result.stdout) == (2, "")
    assert says in " ".join(result.stderr.split())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there() -> None:
    result = run("plan", "--link", "1gbit", "--device", "cuda")
    assert result.exit_code == 2
    assert "compactdist doctor" in result.stderr


@pytest.mark.usefixtures("timed")
def test_the_table_fits_and_ends_with_what_to_take(monkeypatch: pytest.MonkeyPatch) -> None:
    for width, spare in ((80, False), (160, True)):
        monkeypatch.setenv("COLUMNS", str(width))
        result = run("plan", "--shape", "64x3072", "--sites", 64000, "--link", "10gbit", "--steps", 100)
        assert result.exit_code == 0
        lines = result.stdout.splitlines()
        assert max(map(len, lines)) <= width
        assert all(any(line.strip().startswith(name) for line in lines) for name in ("uncompressed", *PRESETS))
        assert "no trace" in result.stdout
        assert "…" not in result.stdout
        assert ("pays below" in result.stdout.split("Of one rank")[0]) == spare
        assert "wrap(preset=" in " ".join(lines[-2:]) or "No compression pays" in " ".join(lines[-3:])


@pytest.mark.usefixtures("timed")
def test_bytes_on_the_page_are_those_of_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "changing", lambda frames, *_: [torch.zeros(1)] * frames)  # times are set anyway
    page = (Path(__file__).parents[2] / "docs" / "tools.md").read_text()
    command = "plan --shape 4096x3072 --sites 57 --steps 28 --link 1gbit --compute-ms 500"
    assert f"    compactdist {command}\n" in page
    printed = page.split("57 x [4096, 3072]")[1]
    for row in run_json(*command.split(), "--json", "-")["rows"]:
        step, request = row["residual_bytes"] / 1e6, row["request_bytes"] / 1e6
        cells = [
            row["name"],
            plan._number(step),
            plan._number(request),
            f"{row['raw_bytes'] / row['residual_bytes']:.1f}",
        ]
        assert re.search(r"^ " + r" +".join(map(re.escape, [*cells, plan._number(1e3 * row["link_s"])])), printed, re.M)


def test_digits() -> None:
    assert [plan._number(x) for x in (0.012345, 1.2345, 123.45, 40160.4)] == ["0.0123", "1.23", "123", "40160"]
