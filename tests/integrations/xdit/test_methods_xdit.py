"""Patch parallelism and DistriFusion inside xfuser: the trained digits FLUX and xfuser's own USP function."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from tests.integrations.xdit.ranks import run_worker

if any(importlib.util.find_spec(name) is None for name in ("xfuser", "triton", "yunchang")):
    pytest.skip("xfuser is not installed", allow_module_level=True)

pytestmark = [pytest.mark.xdit, pytest.mark.slow, pytest.mark.timeout(300)]

STEPS, LAYERS = 8, 4
CALLS = STEPS * LAYERS


def launch(out: Path, ranks: int, ulysses: int) -> dict[str, Any]:
    run_worker("methods_worker.py", out, str(ulysses), ranks=ranks, timeout=280)
    return json.loads(out.read_text())


@pytest.fixture(scope="module", params=[(4, 1), (4, 2)], ids=["4 ranks", "2 x Ulysses 2"])
def record(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    ranks, ulysses = request.param
    return launch(tmp_path_factory.mktemp("methods") / "record.json", ranks, ulysses) | {"ulysses": ulysses}


def test_patch_is_the_ring_and_raw_frames_change_nothing(record: dict[str, Any]) -> None:
    assert record["errors"]["patch - ring"] < 1e-5
    assert record["errors"]["patch, raw - patch"] < 1e-6
    assert record["counts"]["None/patch"] == {"synchronous": CALLS}


@pytest.mark.parametrize("strategy", [None, "front", "rear"])
def test_joint_tensors(record: dict[str, Any], strategy: str | None) -> None:
    assert record["errors"][f"USP, {strategy}"] < 1e-5


def test_compressed_patch_sends_what_the_compressed_ring_sends(record: dict[str, Any]) -> None:
    """The same sites and frames: the message has the ring's name and layout. Attention's rounding differs."""
    ring, patch = record["calls"]["int4"]["ring"], record["calls"]["int4/patch"]["ring"]
    assert patch == ring
    assert patch["compressed"] == CALLS
    assert patch["passed"] == 0
    assert patch["wire"] < 0.3 * patch["raw"]
    assert all(key.startswith("kv/") for key in patch["keys"])
    assert len(patch["keys"]) == LAYERS
    assert 0.5 < record["errors"]["patch, int4"] / record["errors"]["ring, int4"] < 2


def test_the_last_value_as_a_prediction_is_distrifusion(record: dict[str, Any]) -> None:
    """At order 1: what one method gathered in the step before is what the other one predicts from it."""
    errors, calls = record["errors"], record["calls"]
    assert errors["predicted, int4 - distrifusion, int4"] <= 1e-6
    assert errors["predicted, int4 - distrifusion, None"] > 1e-4
    assert errors["predicted: second request"] == 0
    assert calls["int4/patch/predict-now, 2 requests"]["ring"]["predicted"] == 2 * (CALLS - LAYERS)
    assert calls["int4/patch"]["ring"]["predicted"] == 0


@pytest.mark.parametrize("codec", [None, "int4"])
def test_distrifusion(record: dict[str, Any], codec: str | None) -> None:
    errors, counts = record["errors"], record["counts"]
    name = f"distrifusion, {codec}"
    print(f"{name}: relative error {errors[name]:.2e}, last step synchronous "
          f"{errors[f'{name}, last step synchronous']:.2e}")  # fmt: skip
    assert errors[f"{name}, all warm-up - patch"] <= 1e-6
    # eight steps are far apart: staleness costs more than four bits do, and is no collapse either
    assert 0.1 > errors[name] > 2 * errors["patch, int4"]
    assert errors[f"{name}, last step synchronous"] < errors[name]
    assert counts[f"{codec}/distrifusion, 4 requests"] == {
        "one step stale": 4 * (CALLS - LAYERS),
        "synchronous (warm-up)": 4 * LAYERS,
        "not gathered (last step)": 4 * LAYERS,  # so nothing is left to be drained
    }
    assert counts[f"{codec}/distrifusion/{STEPS}"] == {"synchronous (warm-up)": CALLS}


@pytest.mark.parametrize("codec", [None, "int4"])
def test_requests_know_nothing_of_each_other(record: dict[str, Any], codec: str | None) -> None:
    """Bit for bit: again, after other noise, and the other noise as if it had been alone."""
    errors, name = record["errors"], f"distrifusion, {codec}"
    assert errors[f"{name}: second request"] == 0
    assert errors[f"{name}: after another request"] == 0
    assert errors[f"{name}: after others - alone"] == 0
    assert errors[f"{name}: other noise"] > 0


def test_stale_gathers_are_compressed(record: dict[str, Any]) -> None:
    stale, alone = (record["calls"][f"int4/distrifusion{more}"]["ring"] for more in (", 4 requests", ""))
    ring, last = record["calls"]["int4"]["ring"], record["calls"][f"int4/distrifusion/{STEPS - 1}"]["ring"]
    assert alone["compressed"] == CALLS - LAYERS  # the last step gathers nothing,
    assert last["compressed"] == CALLS  # unless it waits for what it gathers
    assert last["wire"] == ring["wire"]
    assert ring["wire"] * (1 - 1 / STEPS) < alone["wire"] < ring["wire"]  # keyframes are larger
    assert stale["compressed"] == 4 * alone["compressed"]
    assert stale["wire"] == 4 * alone["wire"]
    assert stale["passed"] == 0
    assert stale["keys"] == ring["keys"]


def test_refusals(record: dict[str, Any]) -> None:
    said = record["refusals"]
    assert "compression is already enabled" in said["twice"]
    assert "compression is already enabled" in said["twice without a codec"]
    assert "codec=None compresses nothing" in said["nothing to do"]
    assert "one of patch, distrifusion, not 'pipefusion'" in said["unknown"]
    assert "order: no effect with codec=None" in said["useless options"]


def test_afterwards_xfuser_is_as_it_was(record: dict[str, Any]) -> None:
    assert record["restored"]
    assert record["errors"]["afterwards"] == 0


def test_explain_says_what_the_method_did(record: dict[str, Any]) -> None:
    assert record["explained"].splitlines()[-1].startswith("distrifusion: ")
