"""The tiny pipelines draw, and draw the same every time."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("diffusers")

from compactdist_diffusers import tiny
from tests.diffusers import kit  # noqa: F401 - imports diffusers before any test counts its seconds

pytestmark = [pytest.mark.xdit, pytest.mark.filterwarnings("ignore")]

LATENTS = {
    "flux": (64, 16),
    "sd3": (4, 16, 16),
    "pixart": (4, 16, 16),
    "cogvideox": (3, 4, 8, 8),
    "wan": (16, 3, 8, 8),
    "qwenimage": (64, 16),
}


@pytest.mark.parametrize("model", tiny.MODELS)
def test_same_latents_from_a_fresh_pipeline(model: str) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    pipe, call_kwargs = tiny.build(model, steps=3, batch=2)
    assert torch.equal(torch.get_rng_state(), before)
    latents = pipe(**call_kwargs)[0]
    assert latents.shape == (2, *LATENTS[model])
    assert latents.dtype == torch.float32
    assert latents.isfinite().all()
    assert not torch.equal(latents[0], latents[1])
    torch.manual_seed(2)
    again, call_kwargs = tiny.build(model, steps=3, batch=2)
    assert torch.equal(again(**call_kwargs)[0], latents)
    assert not torch.equal(latents, call_kwargs["latents"])


@pytest.mark.parametrize("model", tiny.MODELS)
def test_no_part_of_the_transformer_is_zero(model: str) -> None:
    """Where it were, nothing that ranks exchange could change the result."""
    pipe, _ = tiny.build(model)
    assert [name for name, p in pipe.transformer.named_parameters() if p.ndim >= 2 and p.std() < 0.01] == []


@pytest.mark.parametrize("wrong", [{"model": "dalle"}, {"steps": 0}, {"batch": 0}])
def test_refusals(wrong: dict) -> None:
    with pytest.raises(ValueError, match=r"no tiny model named 'dalle'|must be at least 1"):
        tiny.build(**{"model": "flux", **wrong})
