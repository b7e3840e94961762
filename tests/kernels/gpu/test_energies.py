"""Sums of squares by which a sender judges a frame, on a device: the reference's."""

from __future__ import annotations

import pytest
import torch

from compactdist.kernels.spec import EightBits
from tests.kernels.gpu import kit
from tests.kernels.test_energies import compare, given, predictions


@pytest.mark.parametrize("form", [None, "int8", "fp8"])
@pytest.mark.parametrize("dtype", kit.DTYPES)
def test_the_sums_are_those_of_the_reference(dtype: torch.dtype, form: EightBits | None) -> None:
    for numel in (1, 65, 5000, 70_001):
        x, base, previous, value = given(numel, dtype, kit.DEVICE)
        for terms in predictions(base, previous, form)[: 2 if form else 3]:  # what a device is given
            compare(x, terms, value, "gpu")
