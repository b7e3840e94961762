"""The table that finds the nearest of eight magnitudes without a search."""

from __future__ import annotations

import pytest
import torch

from compactdist import codecs
from compactdist.kernels.gpu.plan import plan_of, table_of
from compactdist.kernels.spec import QuantizerSpec
from compactdist.state.matrix_view import plain
from tests.kernels.gpu import kit
from tests.kernels.test_spec import Eight


@pytest.mark.parametrize("magnitudes", [codecs.get("int4").magnitudes, Eight.magnitudes])
def test_a_bucket_has_one_border(magnitudes):
    """Values on every border, beside them, and everywhere."""
    table = torch.tensor(table_of(magnitudes), dtype=torch.float32)
    borders, pairs = table[16:23], table[26:].view(-1, 2)
    power, rounding = table[23], table[24]
    near = torch.cat([borders, *(torch.nextafter(borders, torch.tensor(end)) for end in (0.0, 99.0))])
    size = torch.cat([near, torch.linspace(0, 2 * float(borders[-1]), 5000), torch.tensor([1e30])])
    held = (size * power).clamp(max=1)
    border, under = pairs[(held + rounding).view(torch.int32) - rounding.view(torch.int32)].unbind(1)
    assert torch.equal(under.view(torch.int32) + (border < held), (borders < size[:, None]).sum(1))


def test_levels_that_are_too_near_have_no_kernels():
    assert (
        plan_of(QuantizerSpec("nearest", 4, (*Eight.magnitudes[:6], 1.50001, 1.50002)), plain(64, 1, 8), kit.DEVICE)
        is None
    )
