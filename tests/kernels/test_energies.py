"""Sums of squares by which a sender judges a frame: the compiled pass on a CPU gives the reference's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from compactdist import kernels
from compactdist.kernels import energies, use
from compactdist.kernels.spec import EightBits, MovingTerm, Velocity
from compactdist.state.quantized_history import quantize
from compactdist.state.rate import Measured
from tests.kernels import rounded

SIZES = (1, 63, 64, 65, 5000, 3 * (1 << 14) + 7)


def given(numel: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """A tensor, the last two before it, and its reconstruction."""
    g = torch.Generator().manual_seed(numel)
    x = torch.randn(numel, generator=g)
    return [(x + by * torch.randn(numel, generator=g)).to(dtype).to(device) for by in (0.0, 0.1, 0.2, 0.01)]


def predictions(base: Tensor, previous: Tensor, form: EightBits | None = None) -> list[tuple[MovingTerm, ...]]:
    """None, and those of orders 1, 2 and ``"auto"``."""
    one: Any = base if form is None else quantize(base, form, base.dtype)
    two: Any = previous if form is None else quantize(previous, form, base.dtype)
    return [(), (one,), (one, two), (one, Velocity(one, two, -0.3125))]


def compare(x: Tensor, terms: tuple[MovingTerm, ...], value: Tensor, which: Any) -> None:
    """The sums are the reference's but for the rounding of a prediction with two terms."""
    with use("reference"):
        expected = energies(x, terms, value)
    with use(which):
        made = energies(x, terms, value)
    assert made.dtype == torch.float64
    assert made.shape == (3,)
    assert torch.allclose(made.cpu(), expected.cpu(), rtol=1e-9 if len(terms) < 2 else 1e-5)


@pytest.mark.parametrize("form", [None, "int8", "fp8"])
@pytest.mark.parametrize("dtype", rounded.DTYPES)
def test_the_sums_are_those_of_the_reference(dtype: torch.dtype, form: EightBits | None) -> None:
    for numel in SIZES:
        x, base, previous, value = given(numel, dtype, torch.device("cpu"))
        for terms in predictions(base, previous, form):
            compare(x, terms, value, "cpu")


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_do_not_change_them(threads: int) -> None:
    """Or two runs of one program would announce other rates."""
    x, base, _, value = given(1 << 20, torch.bfloat16, torch.device("cpu"))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        made = energies(x, (base,), value).tolist()
    finally:
        torch.set_num_threads(before)
    assert made == energies(x, (base,), value).tolist()


@pytest.mark.parametrize("which", ["cpu", "reference"])
def test_differences_of_huge_values_and_squares_of_tiny_ones(which: Any) -> None:
    huge, tiny = torch.full((300,), 3e38), torch.full((300,), 1e-30)
    with use(which):
        energy, residual, error = energies(huge, (-huge,), huge).tolist()
        assert energy == pytest.approx(300 * 9e76, rel=1e-5)
        assert residual == pytest.approx(4 * energy)
        assert error == 0
        assert energies(tiny, (), tiny).tolist() == pytest.approx([300e-60, 300e-60, 0], rel=1e-5)


def test_a_measured_frame_runs_no_operations_of_torch_on_its_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "reference_energies", None)
    x, base, _, value = given(1 << 15, torch.bfloat16, torch.device("cpu"))
    found = Measured.of(x, (base,), value)
    assert found.error < found.residual < found.energy
