"""The page about codecs against the stored numbers, and the numbers against the codecs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.codecs import codec_table
from compactdist import codecs
from tools import codecs_page

ROOT = Path(__file__).parent.parent.parent
ROWS = json.loads((ROOT / "benchmarks/results/codec_table.json").read_text())["rows"]


def test_the_page_shows_the_stored_numbers():
    assert codec_table.table(ROWS) in (ROOT / "docs/codecs.md").read_text()


@pytest.mark.parametrize("path", codecs_page.SECTIONS, ids=lambda path: path.name)
def test_the_pages_are_what_the_generator_writes(path):
    assert codecs_page.filled(path) == path.read_text()


def test_the_page_has_every_codec_and_a_missing_one_is_an_error(monkeypatch):
    for codec_id in codecs.list():
        assert f"| `{codec_id}` |" in codecs_page.registry_table()
    monkeypatch.setattr(codecs.Int2, "about", None)
    with pytest.raises(SystemExit, match="int2"):
        codecs_page.registry_table()


def test_every_lossy_codec_is_in_the_table():
    lossy = {codec_id for codec_id in codecs.list() if not codecs.get(codec_id).lossless}
    assert {row["id"] for row in ROWS} == lossy
    assert [{"id": row["id"], **row["options"]} for row in ROWS] == list(codec_table.CODECS)


def test_stored_rates_are_those_of_today():
    elements = codec_table.SHAPE[0] * codec_table.SHAPE[1]
    for row in ROWS:
        codec = codecs.get({"id": row["id"], **row["options"]})
        bits = codec.payload_nbytes(codec_table.SHAPE, torch.float32) * 8 / elements
        assert row["bits"] == pytest.approx(bits, abs=1e-4)
