"""Pages show what `benchmarks.quality` stored; figures of single codecs and methods have tests beside theirs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks.quality import adaptive_order, chart, targets
from compactdist.presets import PRESETS

ROOT = Path(__file__).parents[1]


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text()


def stored(name: str) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((ROOT / "benchmarks" / "results" / name).read_text())
    return read


def test_targets() -> None:
    assert targets.table(stored("targets.json")) in page("policy_and_layout.md")


def test_targets_are_met_whether_a_change_is_announced_or_not() -> None:
    """Within 0.31 dB and 1 %."""
    off = {"nmse_db": 0.0, "bits": 0.0}
    for rows in stored("targets.json").values():
        for target, row in rows.items():
            kind, asked = target.partition("=")[0], float(target.partition("=")[2])
            off[kind] = max(off[kind], abs(row[kind] - asked) / (1 if kind == "nmse_db" else asked))
    assert round(off["nmse_db"], 2) == 0.31
    assert off["bits"] < 0.01
    assert "errors are met within 0.31 dB and sizes within 1 %" in page("policy_and_layout.md")


def test_targets_along_a_trellis() -> None:
    """3 to 14 % fewer bits, or 0.8 to 1.5 dB less error; sizes keep a large error where the prompt changes."""
    saved, gained = [], []
    for name, plain in stored("targets.json").items():
        for target, row in plain.items():
            other = stored("targets_trellis.json")[name][target]
            if target.startswith("bits"):
                gained += [] if "half-way" in name else [row["nmse_db"] - other["nmse_db"]]
            else:
                saved.append(1 - other["bits"] / row["bits"])
    assert [round(100 * min(saved)), round(100 * max(saved))] == [3, 14]
    assert [round(min(gained), 1), round(max(gained), 1)] == [0.8, 1.5]
    said = "3 to 14 % fewer bits or, but for unannounced changes, 0.8 to 1.5 dB less error"
    assert said in page("policy_and_layout.md")


def test_adaptive_order() -> None:
    assert adaptive_order.table(stored("adaptive_order.json")["rows"]) in page("quality.md")


def test_chart() -> None:
    rows = stored("chart.json")["rows"]
    for text in chart.tables(rows):
        assert text in page("quality.md")
    for route, families in chart.OF_ROUTE.items():
        measured = [row["variant"] for row in rows if row["route"] == route]
        assert measured == [name for variants in families.values() for name in variants], route


def test_every_codec_and_preset_of_the_package_is_in_the_chart() -> None:
    names = {name for variants in chart.FAMILIES.values() for name in variants}
    assert {"binary", "int2", "topk", "lowrank_int4", "transform", "rates", "raw"} <= names
    assert {f"preset {name}" for name in PRESETS} <= names


def test_the_picture_is_that_of_the_results(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks.quality import drawing

    committed = ROOT / "docs" / "images" / "chart.svg"
    assert committed.stat().st_size < 100_000
    drawing.draw(stored("chart.json")["rows"], tmp_path / "chart.svg")
    texts = [re.findall(r">([^<>\n]+)</text>", path.read_text()) for path in (committed, tmp_path / "chart.svg")]
    assert texts[0] == texts[1]
    assert {"DistriFusion", "PipeFusion", "uncompressed", "presets", "small", "lowrank_int4"} <= {*texts[0]}
