"""No size of a program changes a byte: sums are in the order of the codec, not in that of tiles."""

from __future__ import annotations

import pytest
import torch

from compactdist import codecs
from compactdist.kernels import use
from compactdist.kernels.gpu import plan, steps
from compactdist.state.matrix_view import plain
from tests.codecs import kit as codec_kit
from tests.kernels.gpu import kit

ON_A_GPU = {
    "ROWS": 4,
    "_TILES": 1,
    "UNROLL": 8,
    "_UNITS": 512,
    "WIDTH": 32,
    "_BLOCKS": 16,
    "_HELD": 8,
    "UNITS_OF_TILE": 32,
}
SMALL = {
    "ROWS": 2,
    "_TILES": 4,
    "UNROLL": 2,
    "_UNITS": 128,
    "WIDTH": 64,
    "_BLOCKS": 4,
    "_HELD": 16,
    "UNITS_OF_TILE": 16,
}
FORMS = (
    {"id": "int4"},
    {"id": "int8"},
    {"id": "int4", "scales": "block"},
    {"id": "int2", "scales": "block", "block": 64},
    {"id": "int3", "scales": "block", "block": 72},
)


def _encoded(form, sizes, x, base, view, monkeypatch):
    monkeypatch.setattr(plan, "UNITS_OF_TILE", sizes["UNITS_OF_TILE"])
    for name, size in sizes.items():
        monkeypatch.setattr(steps, name, size)
    plan.plan_of.cache_clear()
    out = torch.empty_like(x)
    try:
        with use("gpu"):
            payload = codec_kit.encode_residual(codecs.get(form), x, (base,), view, out)
    finally:
        plan.plan_of.cache_clear()
    return kit.raw(payload), kit.raw(out)


@pytest.mark.parametrize("form", FORMS, ids=kit.name_of)
def test_two_tables_of_sizes_give_the_same_bytes(form, monkeypatch):
    view = plain(66 * 264, 1, 264)
    base, change = (kit.draw(kind, view.numel, 264, seed) for seed, kind in enumerate(("gaussian", "L")))
    x, base = (base + 0.1 * change).bfloat16().to(kit.DEVICE), base.bfloat16().to(kit.DEVICE)
    launched = []
    real = steps.Launch.__call__
    monkeypatch.setattr(steps.Launch, "__call__", lambda self, *given: launched.append(self.grid) or real(self, *given))
    results, grids = [], []
    for sizes in (ON_A_GPU, SMALL):
        results.append(_encoded(form, sizes, x, base, view, monkeypatch))
        grids.append(tuple(launched))
        launched.clear()
    assert len(grids[0]) == len(grids[1])
    assert all(one != other for one, other in zip(*grids, strict=True)), "the sizes were not taken"
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
