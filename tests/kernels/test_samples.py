"""The compiled judgement of residuals, whether they are far larger than their tensors, is that of the reference."""

from __future__ import annotations

import pytest
import torch

from compactdist import kernels
from compactdist.kernels.reference.samples import RUN, RUNS, is_far_larger

CPU = torch.device("cpu")
SIZES = (1, 63, 300, RUNS * RUN - 1, RUNS * RUN, RUNS * RUN + 5, 3 * RUNS * RUN + 77, 1 << 16)


def compiled(numel: int, dtype: torch.dtype) -> kernels.FarLarger:
    with kernels.use("cpu"):
        made = kernels.far_larger_for(numel, dtype, CPU)
    assert made is not is_far_larger
    return made


@pytest.mark.parametrize("terms", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_decides_as_the_reference_does_around_the_border(dtype, terms):
    g = torch.Generator().manual_seed(terms)
    for numel in SIZES:
        judge = compiled(numel, dtype)
        decided = set()
        for factor in (0.0, 1.0, 3.0, 4.9, 4.99, 4.999, 5.0, 5.001, 5.01, 5.1, 9.0):
            x = torch.randn(numel, generator=g).to(dtype)
            parts = [(factor / terms * x.float()).to(dtype) for _ in range(terms)]
            assert judge(x, tuple(parts)) is is_far_larger(x, tuple(parts))
            decided.add(judge(x, tuple(parts)))
        assert decided == {False, True}


def test_a_border_that_is_met_is_not_crossed():
    x = torch.ones(1 << 14)
    for judge in (compiled(x.numel(), x.dtype), is_far_larger):
        assert not judge(x, (5 * x,))
        assert judge(x, (torch.nextafter(5 * x, 6 * x),))


def test_only_samples_count():
    x, base = torch.ones(1 << 16), torch.ones(1 << 16)
    base[RUN : 2 * RUN] = 1e30
    for judge in (compiled(x.numel(), x.dtype), is_far_larger):
        assert not judge(x, (base,))
        assert judge(x, (base.roll(-RUN),))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_what_no_sum_holds_is_left_to_the_encoder(value):
    """Both sums are infinite, or NaN: nothing is larger."""
    x = torch.full((1 << 14,), value)
    for judge in (compiled(x.numel(), x.dtype), is_far_larger):
        assert judge(x, (-x,)) is False


def test_sums_of_float16_do_not_overflow():
    x = torch.full((1 << 14,), 60.0, dtype=torch.float16)
    for judge in (compiled(x.numel(), x.dtype), is_far_larger):
        assert judge(x, (x * 100,))
        assert not judge(x, (x * 2,))


def test_strided_tensors_are_judged_as_well():
    x, base = torch.ones(1 << 14, 2)[:, 0], torch.full((1 << 14, 2), 9.0)[:, 1]
    assert compiled(x.numel(), x.dtype)(x, (base,))
