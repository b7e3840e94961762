"""Every pipeline on every route, compressed: the cells of docs/integrations.md, run."""

from __future__ import annotations

import importlib.util
import json
from typing import Any

import pytest

from tests.integrations.xdit import matrix

if any(importlib.util.find_spec(name) is None for name in ("xfuser", "triton", "yunchang")):
    pytest.skip("xfuser is not installed", allow_module_level=True)

pytestmark = [pytest.mark.xdit, pytest.mark.timeout(300)]

STEPS = 4  # half as many as the page's records are of, so they change more and a larger part are keyframes


def test_one_pipeline() -> None:
    check("ring 2", "flux", matrix.run("ring 2", ("flux",), STEPS)["flux"], few=True)


@pytest.mark.slow
@pytest.mark.parametrize("column", matrix.COLUMNS)
def test_column(column: str) -> None:
    for model, record in matrix.run(column, matrix.COLUMNS[column][1], STEPS).items():
        assert "failed" not in record, record
        check(column, model, record, few=True)


# Of the two routes that most of them run on, each is seen on one.
ELSEWHERE = {"ulysses 2": {"latte", "pixart_sigma", "qwenimage"}, "ring 2": {"hunyuandit", "flux2", "hunyuanvideo"}}


@pytest.mark.slow
@pytest.mark.parametrize("column", matrix.MORE)
def test_more_models(column: str) -> None:
    models = tuple(model for model in matrix.MORE[column] if model not in ELSEWHERE.get(column, ()))
    for model, record in matrix.run(column, models, STEPS).items():
        assert "failed" not in record, record
        check(column, model, record, few=True)


def check(column: str, model: str, record: dict[str, Any], *, few: bool = False) -> None:
    cell = f"{model}, {column}"
    assert 0 <= record["raw"]["error"] <= 1e-6, cell
    # keyframes of stages' hidden states are coded, and random weights make their error larger
    usual = 2e-2 if column.startswith("pipefusion") else 1e-2
    assert 0 < record["int4"]["error"] <= (3 if few else 1) * (6e-2 if model == "hunyuandit" else usual), cell
    assert record["int4"]["calls"] > 0, cell
    assert record["int4"]["ratio"] > (1.5 if few else 2), cell
    assert record["raw"]["repeats"], cell
    assert record["int4"]["repeats"], f"{cell}: a second request differs from the first"
    assert record["plain again"] == 0, f"{cell}: not as before after disable()"


def test_the_page_shows_what_was_measured() -> None:
    records = json.loads(matrix.JSON.read_text())["columns"]
    assert {column: tuple(models) for column, models in records.items()} == {
        column: models + matrix.MORE.get(column, ()) for column, (_, models) in matrix.COLUMNS.items()
    }
    assert matrix.render(records) in matrix.PAGE.read_text()
    for column, models in records.items():
        for model, record in models.items():
            check(column, model, record)
