"""What a layout is for: the error of Ulysses with one, and with one scale for the whole buffer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.integrations.xdit.ranks import run_worker

pytestmark = [pytest.mark.xdit, pytest.mark.slow, pytest.mark.timeout(400)]


def test_the_layout_beats_one_global_scale(tmp_path: Path) -> None:
    run_worker("global_scale_worker.py", tmp_path / "errors.json")
    errors = json.loads((tmp_path / "errors.json").read_text())
    assert errors["layout"] < 0.9 * errors["global"], errors
