"""``compactdist evaluate`` against the loop written out by hand, and its errors."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from compactdist import codecs
from compactdist.cli.evaluate import Played, Recorded, Setting, play_sites
from compactdist.cli.score import Score
from compactdist.presets import PRESETS
from compactdist.state import StreamConfig, StreamDecoder, Target
from compactdist.wire import HEADER_NBYTES
from tests.cli.kit import activations, run, run_json, trace

KEYS = {
    "bits_per_element",
    "request_bits_per_element",
    "request_ratio",
    "rel_error",
    "request_rel_error",
    "nmse_db",
    "worst_step_rel_error",
    "request_worst_step_rel_error",
    "request_worst_step",
    "state_bytes",
}
LOSSY = ("binary", "int2", "int4", "int8")
COMMITTED = Path(__file__).parents[2] / "benchmarks" / "traces" / "digits_ring.safetensors"


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("codec_id", LOSSY)
def test_figures_are_those_of_the_loop_by_hand(tmp_path: Path, order: int, codec_id: str) -> None:
    x = activations()
    path = trace(tmp_path / "t.safetensors", {"a": x})
    damping = ("--damping", 0.3) if order == 2 else ()
    row = run_json(
        "evaluate", path, "--codec", codec_id, "--order", order, *damping, "--keyframe", "raw", "--json", "-"
    )
    row = row[codec_id]
    codec = codecs.get(codec_id)
    steps, rows, channels = x.shape
    base, velocity = x[0], torch.zeros_like(x[0])
    errors, squares = [], 0.0
    for value in x[1:]:
        prediction = (base + velocity) if order else torch.zeros_like(base)
        payload = codec.encode((value - prediction)[None])
        x_hat = prediction + codec.decode(payload, (1, rows, channels), torch.float32)[0]
        velocity = 0.3 * (x_hat - base) if order == 2 else velocity
        base = x_hat
        errors.append(float((value - x_hat).double().norm() / value.double().norm()))
        squares += float((value - x_hat).double().square().sum())
    assert set(row) == KEYS
    frame = HEADER_NBYTES + codec.payload_nbytes((1, rows, channels), torch.float32)
    key = HEADER_NBYTES + 4 * rows * channels
    assert row["bits_per_element"] == pytest.approx(8 * frame / (rows * channels))
    request = key + (steps - 1) * frame
    assert row["request_bits_per_element"] == pytest.approx(8 * request / x.numel(), abs=8 * 16 / rows / channels)
    assert row["rel_error"] == pytest.approx(sum(errors) / len(errors), rel=1e-5)
    assert row["worst_step_rel_error"] == pytest.approx(max(errors), rel=1e-5)
    assert row["request_ratio"] == pytest.approx(16 / row["request_bits_per_element"])
    assert row["request_rel_error"] == pytest.approx(sum(errors) / steps, rel=1e-5)  # the keyframe is exact
    assert row["request_worst_step_rel_error"] == row["worst_step_rel_error"]
    assert row["request_worst_step"] == 1 + errors.index(max(errors))
    assert row["nmse_db"] == pytest.approx(10 * math.log10(squares / float(x[1:].double().square().sum())), abs=1e-4)
    assert row["state_bytes"] == order * rows * channels * 4


def test_the_first_frame_is_coded_in_eight_bits_unless_asked_otherwise(tmp_path: Path) -> None:
    path, x = trace(tmp_path / "t.safetensors", {"a": activations()}), activations()
    asked = {"default": (), "int8": ("--keyframe", "int8"), "raw": ("--keyframe", "raw")}
    rows = {
        name: run_json("evaluate", path, "--codec", "int4", *option, "--json", "-")["int4"]
        for name, option in asked.items()
    }
    assert rows["default"] == rows["int8"]
    saved = (rows["raw"]["request_bits_per_element"] - rows["int8"]["request_bits_per_element"]) * len(x)
    keyframe = codecs.get("int8").payload_nbytes((1, math.ceil(x[0].numel() / 128), 128), torch.float32)
    assert saved == pytest.approx(32 - 8 * keyframe / x[0].numel(), abs=0.2)
    assert rows["int8"]["rel_error"] == pytest.approx(rows["raw"]["rel_error"], rel=0.1)


def test_every_registered_codec_by_default(tmp_path: Path) -> None:
    rows = run_json("evaluate", trace(tmp_path / "t.safetensors"), "--json", "-")
    assert list(rows) == codecs.list()
    assert rows["raw"]["rel_error"] == 0
    assert rows["raw"]["nmse_db"] is None
    assert rows["int8"]["rel_error"] < rows["int4"]["rel_error"] < rows["int2"]["rel_error"]


def test_more_warm_up_means_more_request_bits_and_none_in_the_steady_state(tmp_path: Path) -> None:
    path = trace(tmp_path / "t.safetensors")
    one = run_json("evaluate", path, "--codec", "int4", "--json", "-")["int4"]
    three = run_json("evaluate", path, "--codec", "int4", "--warmup", 3, "--json", "-")["int4"]
    assert three["request_bits_per_element"] > one["request_bits_per_element"]
    assert three["bits_per_element"] < 4.7
    zero = run_json("evaluate", path, "--codec", "int4", "--warmup", 0, "--json", "-")["int4"]
    assert zero == one


def test_a_coded_keyframe_makes_the_request_smaller_and_its_first_step_wrong(tmp_path: Path) -> None:
    x = activations()
    path = trace(tmp_path / "t.safetensors", {"a": x})
    raw = run_json("evaluate", path, "--codec", "int8", "--keyframe", "raw", "--json", "-")["int8"]
    row = run_json("evaluate", path, "--codec", "int8", "--keyframe", "int4", "--json", "-")["int8"]
    codec = codecs.get("int4")
    matrix = x[0][None]  # tokens and channels, as the trace gives them
    first = codec.decode(codec.encode(matrix), matrix.shape, torch.float32)
    error = float((first - matrix).norm() / matrix.norm())
    assert row["request_worst_step"] == 0
    assert row["request_worst_step_rel_error"] == pytest.approx(error, rel=1e-5)
    later = (x.shape[0] - 1) * row["rel_error"]
    assert row["request_rel_error"] == pytest.approx((error + later) / x.shape[0], rel=1e-5)
    saved = 4 * x[0].numel() - codec.payload_nbytes(matrix.shape, torch.float32)
    per_element = 8 * saved / x.numel()
    assert row["request_bits_per_element"] == pytest.approx(raw["request_bits_per_element"] - per_element, abs=0.02)


@pytest.mark.parametrize(
    ("recorded", "steps", "numbers"),
    [(28, 4, [0, 9, 18, 27]), (28, 8, [0, 4, 8, 12, 15, 19, 23, 27]), (5, 5, [0, 1, 2, 3, 4]), (9, 2, [0, 8])],
)
def test_fewer_steps_are_evenly_spaced(tmp_path: Path, recorded: int, steps: int, numbers: list[int]) -> None:
    x = activations(recorded, 16, 16)
    whole = trace(tmp_path / "whole.safetensors", {"a": x})
    cut = trace(tmp_path / "cut.safetensors", {"a": x[numbers]})
    options = ("--codec", "int2", "--baselines", "--json", "-")
    assert run_json("evaluate", whole, "--steps", steps, *options) == run_json("evaluate", cut, *options)


def test_presets_are_their_options_under_their_own_names(tmp_path: Path) -> None:
    path = trace(tmp_path / "t.safetensors")
    rows = run_json("evaluate", path, "--preset", "all", "--codec", "int3", "--json", "-")
    assert list(rows) == ["int3", *PRESETS]
    for name, preset in PRESETS.items():
        options = ("--codec", preset.codec, "--keyframe", preset.keyframe, "--order", preset.order)
        assert rows[name] == run_json("evaluate", path, *options, "--json", "-")[preset.codec]
    two = run_json("evaluate", path, "--preset", "tiny", "--preset", "safe", "--json", "-")
    assert two == {name: rows[name] for name in ("tiny", "safe")}
    shown = run("evaluate", path, "--preset", "small").stdout
    assert "small" in shown
    assert "order" not in shown  # of codecs, of which there are none


@pytest.mark.parametrize("option", [("--order", "1"), ("--keyframe", "raw"), ("--state", "int8"), ("--warmup", 2)])
def test_an_option_that_no_preset_would_heed_is_refused(tmp_path: Path, option: tuple[str, str]) -> None:
    path = trace(tmp_path / "t.safetensors")
    result = run("evaluate", path, "--preset", "tiny", *option, "--json", "-")
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"{option[0]} would change nothing: --preset tiny has options of its own" in " ".join(result.stderr.split())


def test_an_unknown_preset_is_refused(tmp_path: Path) -> None:
    result = run("evaluate", trace(tmp_path / "t.safetensors"), "--preset", "smal", "--json", "-")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "did you mean 'small'" in result.stderr


def test_more_steps_than_recorded_are_refused(tmp_path: Path) -> None:
    result = run("evaluate", trace(tmp_path / "t.safetensors"), "--steps", 5, "--json", "-")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "tensor 'b' has 4 steps" in result.stderr
    assert "--steps 5" in result.stderr


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_every_float_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    path = trace(tmp_path / "t.safetensors", {"a": activations(dtype=dtype)})
    row = run_json("evaluate", path, "--codec", "int4", "--json", "-")["int4"]
    assert 0 < row["rel_error"] < 0.2
    width = 4 if dtype == torch.float64 else 2
    assert row["state_bytes"] == width * 96 * 80


def test_groups_in_the_metadata_get_scales_of_their_own(tmp_path: Path) -> None:
    keys, values = activations(6, 96, 80), 30 * activations(6, 96, 80).roll(7, dims=2)
    x = torch.cat([keys, values], dim=1)
    plain = trace(tmp_path / "plain.safetensors", {"kv": x})
    split = trace(tmp_path / "split.safetensors", {"kv": x}, {"groups": json.dumps({"kv": 2})})
    one = run_json("evaluate", plain, "--codec", "binary", "--keyframe", "raw", "--json", "-")["binary"]
    two = run_json("evaluate", split, "--codec", "binary", "--keyframe", "raw", "--json", "-")["binary"]
    assert two["bits_per_element"] > one["bits_per_element"]
    assert two["rel_error"] < one["rel_error"]


def test_one_codec_may_be_named_in_several_ways(tmp_path: Path) -> None:
    path = trace(tmp_path / "t.safetensors")
    rows = run_json("evaluate", path, "--codec", "int4", "--codec", "int4:", "--codec", "int4:block=128", "--json", "-")
    assert list(rows) == ["int4", "int4:", "int4:block=128"]
    assert rows["int4"] == rows["int4:"] == rows["int4:block=128"]


def test_ends_that_differ_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = StreamDecoder.decode

    def wrong(self: StreamDecoder, *args: Any, **kwargs: Any) -> torch.Tensor:
        value = decode(self, *args, **kwargs)
        if self.sequence == 3 and self.predictor.base is not None:
            self.predictor.base[0] += 1e-3
        return value

    monkeypatch.setattr(StreamDecoder, "decode", wrong)
    result = run("evaluate", trace(tmp_path / "t.safetensors"), "--codec", "int4", "--json", "-")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "a, step 2, codec Int4(): encoder and decoder hold different states" in result.stderr


def test_the_table_shows_the_same_figures(tmp_path: Path) -> None:
    path = trace(tmp_path / "t.safetensors")
    row = run_json("evaluate", path, "--codec", "int2", "--json", "-")["int2"]
    result = run("evaluate", path, "--codec", "int2")
    assert result.exit_code == 0
    line = next(line for line in result.stdout.splitlines() if line.strip().startswith("int2"))
    assert f"{row['bits_per_element']:.3f}" in line
    assert f"{row['rel_error']:.2e}" in line


@pytest.mark.parametrize(
    ("tensor", "says"),
    [
        (torch.zeros(4, 8, 8, dtype=torch.int32), "int32"),
        (torch.zeros(4, 8), "[steps, N, C]"),
        (torch.zeros(4, 2, 8, 8), "[steps, N, C]"),
        (torch.zeros(4, 0, 8), "no elements"),
        (torch.full((4, 8, 8), float("nan")), "NaN"),
        (torch.ones(1, 8, 8), "--warmup"),
    ],
)
def test_unfit_tensors_are_refused_by_name(tmp_path: Path, tensor: torch.Tensor, says: str) -> None:
    result = run("evaluate", trace(tmp_path / "t.safetensors", {"layer.kv": tensor}), "--json", "-")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert says in result.stderr
    assert "layer.kv" in result.stderr


def test_unfit_files_are_refused(tmp_path: Path) -> None:
    text = tmp_path / "text.safetensors"
    text.write_text("this is no trace")
    for path, says in ((tmp_path / "none", "does not exist"), (tmp_path, "folder"), (text, "not a readable")):
        result = run("evaluate", path)
        assert result.exit_code == 2
        assert says in result.stderr
        assert "compactdist.record" in result.stderr


@pytest.mark.parametrize(
    ("codec", "says"),
    [
        ("int5", f"known: {', '.join(codecs.list())}"),
        ("int4:nonsense=64", "no option 'nonsense'"),
        ("int4:nonsense", "option=value"),
        ('{"id": "int4"}', "option=value"),
        ("balanced", "'balanced' is a preset, not a codec: give --preset balanced"),
    ],
)
def test_wrong_codecs_are_refused_before_anything_is_played(tmp_path: Path, codec: str, says: str) -> None:
    result = run("evaluate", trace(tmp_path / "t.safetensors"), "--codec", codec, "--json", "-")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert says in result.stderr


def test_a_quantized_state_is_named_in_the_table_and_another_is_refused(tmp_path: Path) -> None:
    path = trace(tmp_path / "t.safetensors")
    shown = run("evaluate", path, "--codec", "int4", "--state", "int8")
    assert shown.exit_code == 0
    assert "int8 state" in shown.stdout
    refused = run("evaluate", path, "--codec", "int4", "--state", "int5", "--json", "-")
    assert refused.exit_code == 2
    assert refused.stdout == ""
    assert "'exact', 'int8', 'fp8', got 'int5'" in refused.stderr


def test_a_silent_site_has_no_relative_error(tmp_path: Path) -> None:
    row = run_json("evaluate", trace(tmp_path / "t.safetensors", {"a": torch.zeros(4, 8, 8)}), "--json", "-")["int4"]
    assert row["rel_error"] == 0
    assert row["worst_step_rel_error"] == 0


@pytest.mark.slow
@pytest.mark.skipif(not COMMITTED.exists(), reason="not part of an installed package")
def test_the_committed_trace_of_the_digits_model() -> None:
    assert COMMITTED.stat().st_size <= 3_000_000
    names = ("raw", "int8", "int4", "int2", "binary")
    rows = run_json("evaluate", COMMITTED, *(word for name in names for word in ("--codec", name)), "--json", "-")
    errors = [rows[codec]["rel_error"] for codec in names]
    assert errors == sorted(errors)
    assert rows["binary"]["bits_per_element"] < 1.4
    assert rows["int4"]["nmse_db"] < -35


def test_whoever_watches_sees_every_frame_once() -> None:
    sites = [Recorded(name, activations(), 1) for name in ("a", "b")]
    setting = Setting(codecs.get("rates:rungs=scalar"), StreamConfig(find_layout=False), Target.parse("nmse_db=-20"))
    score, again, seen = Score(), Score(), list[Played]()

    def watch(frame: Played) -> None:
        seen.append(frame)
        again.count(frame.site, frame.step, frame.x, frame.x_hat, frame.wire_bytes, keyframe=frame.step == 0)

    play_sites(score, setting, sites, watch)
    assert [(frame.step, frame.site) for frame in seen] == [(t, s) for t in range(len(sites[0].x)) for s in "ab"]
    assert (again.request, again.residuals) == (score.request, score.residuals)
    assert [frame.keyframe for frame in seen] == [frame.step == 0 for frame in seen]
    assert {frame.rate for frame in seen if frame.step} <= {1, 2, 3, 4, 5}


def test_a_layout_reads_a_trace_as_wrap_would(tmp_path: Path) -> None:
    """Two groups of 48 rows become 48 rows of twice as many channels, as if the trace had been recorded so."""
    x = activations()
    steps, rows, channels = x.shape
    apart = trace(tmp_path / "apart.safetensors", {"a": x}, {"groups": '{"a": 2}'})
    beside = x.view(steps, 2, rows // 2, channels).transpose(1, 2).reshape(steps, rows // 2, 2 * channels)
    together = trace(tmp_path / "together.safetensors", {"a": beside.contiguous()})
    asked = "--codec", "int4", "--json", "-", "--keyframe", "int8"
    pattern = "(g n h d) -> 1 n (g h d), d=40"
    read, plain, expected = (
        run_json("evaluate", path, *asked, *more)["int4"]
        for path, more in ((apart, ("--layout", pattern)), (apart, ()), (together, ()))
    )
    assert read == pytest.approx(expected, rel=1e-9)  # errors are summed up in another order
    assert plain["bits_per_element"] > expected["bits_per_element"]  # twice as many scales of rows
    shown = " ".join(run("evaluate", apart, "--codec", "int4", "--layout", pattern).output.split())
    assert "read as (g n h d) -> 1 n (g h d), d=40" in shown


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("(g n c) -> 1 n (g c), c", "behind the pattern stand sizes of axes"),
        ("(g n c) -> 1 n (g q)", "every axis must appear once on each side"),
        ("(g n h d) -> 1 n (h g d), d=7", "elements"),
    ],
)
def test_a_layout_that_fits_nothing_is_refused(tmp_path: Path, pattern: str, said: str) -> None:
    result = run("evaluate", trace(tmp_path / "t.safetensors"), "--codec", "int4", "--layout", pattern)
    assert result.exit_code in (1, 2)
    assert said in " ".join(result.output.split())
