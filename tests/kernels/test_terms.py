"""The sum of a prediction's terms, as a caller is answered with it: compiled as by torch, to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from compactdist.kernels import use, write_sum
from compactdist.kernels.spec import EightBits
from tests.kernels import rounded
from tests.kernels.test_energies import predictions
from tests.kernels.test_velocities import extreme


@pytest.mark.parametrize("form", [None, "int8", "fp8"])
@pytest.mark.parametrize("dtype", rounded.DTYPES)
def test_the_sum_is_that_of_torch(dtype: torch.dtype, form: EightBits | None) -> None:
    for numel in (1, 65, 2049, 70_001):
        base, previous = extreme(numel, dtype, 1), extreme(numel, dtype, 2)
        for terms in predictions(base, previous, form)[1:]:
            made: list[Any] = []
            for which in ("reference", "cpu"):
                with use(which):  # type: ignore[arg-type]
                    made.append(torch.full((numel,), torch.nan, dtype=dtype))
                    write_sum(terms, made[-1])
            assert torch.equal(*[one.view(torch.uint8) for one in made]), (numel, len(terms))
