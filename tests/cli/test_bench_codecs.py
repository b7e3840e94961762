"""``compactdist bench codecs``: every row is there, means what it says, and adds up."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from compactdist import codecs
from compactdist.cli import subjects
from compactdist.wire import HEADER_NBYTES
from tests.cli.kit import run

QUICK = ("--shape", "128x96", "--rounds", "3")


def bench(tmp_path: Path, *arguments: str) -> dict[tuple[str, str], Any]:
    path = tmp_path / "out" / "codecs.json"
    result = run("bench", "codecs", *QUICK, *arguments, "--json", path)
    assert result.exit_code == 0, result.output
    written = json.loads(path.read_text())
    assert written["shape"] == [128, 96]
    assert {"command", "torch", "machine", "load_average_before"} <= set(written)
    return {(row["dtype"], row["codec"]): row for row in written["rows"]}


@pytest.mark.slow
def test_all_codecs_and_peers_by_default(tmp_path: Path) -> None:
    rows = bench(tmp_path)
    lossy = [name for name in codecs.list() if not codecs.get(name).lossless]
    names = [*codecs.list(), *(f"{name}, eager torch" for name in lossy)]
    names += ["torch.quantize_per_tensor", "numpy sign + packbits", "zstandard, level 1"]
    assert list(rows) == [(dtype, name) for dtype in ("float32", "bfloat16") for name in names]
    for row in rows.values():
        if "note" in row:
            continue
        assert row["encode_x_copy"] > 0
        assert row["decode_copy_bandwidth_percent"] > 0
        assert row["rounds"] == 3


def test_rates_and_gaps_are_the_codecs_own(tmp_path: Path) -> None:
    row = bench(tmp_path, "--codec", "int4", "--dtype", "float32")["float32", "int4"]
    x = torch.randn(128, 96, generator=torch.Generator().manual_seed(0))
    codec = codecs.get("int4")
    payload = codec.encode(x)
    error = codec.decode(payload, x.shape, x.dtype).double() - x.double()
    nmse_db = 10 * float((error.square().sum() / x.double().square().sum()).log10())
    bits = 8 * (HEADER_NBYTES + payload.numel()) / x.numel()
    assert row["bits_per_element"] == pytest.approx(bits)
    assert row["nmse_db"] == pytest.approx(nmse_db)
    assert row["gap_db"] == pytest.approx(6.0206 * bits + nmse_db, abs=1e-3)
    assert row["encode_bytes_touched"] == 3 * x.nbytes + HEADER_NBYTES + payload.numel()
    assert row["decode_bytes_touched"] == 2 * x.nbytes + HEADER_NBYTES + payload.numel()
    assert row["encode_gelem_s"] == pytest.approx(x.numel() / row["encode_ms"] / 1e6)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_peers_do_what_they_are_named_after(dtype: str) -> None:
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).to(getattr(torch, dtype))
    # one bit leaves 1 - 2 / pi = 0.363 of a Gaussian, and 4096 elements do not average perfectly
    expected = {"torch": (8, 1e-3), "numpy": (1, 0.38), "zstandard": (8 * x.element_size(), 0)}
    for subject in subjects.peers({}):
        if subject.missing is not None:
            continue
        bits, nmse = expected[subject.name.split(",")[0].split(".")[0].split()[0]]
        with subject.around():
            sent = subject.encode(x)
            back = subject.decode(sent, x)
        assert back.dtype == x.dtype
        assert back.shape == x.shape
        assert float((back - x).double().square().sum() / x.double().square().sum()) <= nmse
        assert 8 * subject.wire_nbytes(sent) / x.numel() <= bits + 0.1


def test_zstandard_may_be_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "zstandard" else find_spec(name))
    rows = bench(tmp_path, "--codec", "binary", "--dtype", "float32")
    assert rows["float32", "zstandard, level 1"] == {
        "codec": "zstandard, level 1",
        "dtype": "float32",
        "note": "not installed",
    }
    assert "not installed" in run("bench", "codecs", *QUICK, "--codec", "binary").stdout


def test_torch_without_quantize_per_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch, "quantize_per_tensor")
    row = bench(tmp_path, "--codec", "binary", "--dtype", "float32")["float32", "quantized_decomposed"]
    assert row["nmse_db"] < -35
    assert 8 <= row["bits_per_element"] < 8.1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--shape", "12"), "not NxC"),
        (("--shape", "0x5"), "not NxC"),
        (("--dtype", "int8"), "float32, float16, bfloat16"),
        (("--codec", "int5"), "known: binary"),
    ],
)
def test_wrong_arguments(arguments: tuple[str, str], says: str) -> None:
    result = run("bench", "codecs", *arguments)
    assert result.exit_code == 2
    assert says in result.stderr
