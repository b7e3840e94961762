"""The formats without a memory that ``compactdist evaluate --baselines`` compares with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from compactdist import codecs
from compactdist.cli.baselines import BASELINES
from tests.cli.kit import activations, run_json, trace

FORMATS = dict(BASELINES)
COMMITTED = Path(__file__).parents[2] / "benchmarks" / "traces" / "digits_ring.safetensors"
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def relative(x: Tensor, x_hat: Tensor) -> float:
    return float((x - x_hat).norm() / x.norm())


def test_fp4_takes_the_nearest_level_of_each_group() -> None:
    x = torch.randn(40, 80, generator=torch.Generator().manual_seed(0))
    x_hat, nbytes = FORMATS["stateless fp4"](x)
    assert nbytes == 40 * 80 * 4.5 / 8 + 4
    unit = float(x.abs().max()) / 6 / 448
    levels = torch.cat([E2M1, -E2M1])
    for row in range(40):
        for first in range(0, 80, 16):
            group = x[row, first : first + 16]
            scale = float((group.abs().max() / 6 / unit).to(torch.float8_e4m3fn)) * unit
            nearest = (group[:, None] - scale * levels).abs().amin(1)
            assert torch.allclose((group - x_hat[row, first : first + 16]).abs(), nearest, atol=1e-6)


def test_fp4_keeps_groups_of_every_magnitude() -> None:
    x = torch.cat([E2M1, -E2M1]).repeat(3, 2) * torch.tensor([[1e-20], [1e-22], [1e20]])
    for part in x.split(1):
        assert torch.allclose(FORMATS["stateless fp4"](part)[0], part, rtol=1e-6)


def test_fp4_counts_a_scale_for_an_incomplete_group() -> None:
    x = torch.randn(6, 20, generator=torch.Generator().manual_seed(0))
    x_hat, nbytes = FORMATS["stateless fp4"](x)
    assert nbytes == 6 * 20 / 2 + 6 * 2 + 4
    assert relative(x, x_hat) < 0.15


def test_fp8_has_a_scale_for_each_row() -> None:
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    magnitudes = 10.0 ** torch.arange(-3, 3)[:, None]
    x_hat, nbytes = FORMATS["stateless fp8"](x * magnitudes)
    assert nbytes == 6 * 64 + 6 * 4
    for row, expected in zip(x_hat, x * magnitudes, strict=True):
        assert 0.01 < relative(expected, row) < 0.04
        assert float(row.abs().max()) == pytest.approx(float(expected.abs().max()))


@pytest.mark.parametrize("name", FORMATS)
def test_zeros_stay_zeros(name: str) -> None:
    x = torch.zeros(4, 32)
    assert torch.equal(FORMATS[name](x)[0], x)


def test_rows_of_the_table(tmp_path: Path) -> None:
    x = activations(4, 64, 64)
    path = trace(tmp_path / "t.safetensors", {"a": x})
    rows = run_json("evaluate", path, "--codec", "int2", "--baselines", "--json", "-")
    assert list(rows) == ["int2", *FORMATS]
    for name, round_trip in FORMATS.items():
        errors = [relative(step, round_trip(step)[0]) for step in x]
        bits = 8 * round_trip(x[0])[1] / x[0].numel()
        row = rows[name]
        assert row["request_rel_error"] == pytest.approx(sum(errors) / 4, rel=1e-5)
        assert row["rel_error"] == pytest.approx(sum(errors[1:]) / 3, rel=1e-5)
        assert row["request_worst_step_rel_error"] == pytest.approx(max(errors), rel=1e-5)
        assert row["request_worst_step"] == errors.index(max(errors))
        assert row["bits_per_element"] == row["request_bits_per_element"] == pytest.approx(bits)
        assert row["state_bytes"] == 0


def test_int4_is_the_codec_on_the_tensor_itself() -> None:
    x = activations(2, 64, 80)[0]
    x_hat, nbytes = FORMATS["stateless int4"](x)
    codec = codecs.get("int4")
    assert nbytes == codec.payload_nbytes((1, 64, 80), torch.float32)
    assert torch.equal(x_hat, codec.decode(codec.encode(x[None]), (1, 64, 80), torch.float32)[0])


@pytest.mark.skipif(not COMMITTED.exists(), reason="not part of an installed package")
def test_figures_on_the_committed_trace() -> None:
    rows = run_json("evaluate", COMMITTED, "--codec", "raw", "--baselines", "--json", "-")
    errors = {name: rows[name]["request_rel_error"] for name in FORMATS}
    expected = {"stateless int4": 0.0876, "stateless fp4": 0.0936, "stateless fp8": 0.0250}
    assert errors == pytest.approx(expected, abs=1e-4)
