"""The tiny pipelines draw, and draw the same every time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")

from compactdist_harness import tiny
from tests.integrations.diffusers import kit  # noqa: F401 - imports diffusers before any test counts its seconds
from tests.quick import quick_for

pytestmark = [pytest.mark.xdit, pytest.mark.filterwarnings("ignore")]

LATENTS = {
    "flux": (64, 16),
    "sd3": (4, 16, 16),
    "pixart": (4, 16, 16),
    "cogvideox": (3, 4, 8, 8),
    "wan": (16, 3, 8, 8),
    "qwenimage": (64, 16),
    "pixart_sigma": (4, 16, 16),
    "hunyuandit": (4, 16, 16),
    "lumina2": (4, 16, 16),
    "flux2": (64, 16),
    "latte": (4, 4, 8, 8),
    "hunyuanvideo": (4, 3, 8, 8),
    "ltx": (48, 16),
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
    assert not torch.equal(latents.flatten(), call_kwargs["latents"].flatten())


@pytest.mark.parametrize("model", tiny.MODELS)
def test_no_part_of_the_transformer_is_zero(model: str) -> None:
    """Where it were, nothing that ranks exchange could change the result."""
    pipe, _ = tiny.build(model)
    assert [name for name, p in pipe.transformer.named_parameters() if p.ndim >= 2 and p.std() < 0.01] == []


@pytest.mark.parametrize("wrong", [{"model": "dalle"}, {"steps": 0}, {"batch": 0}])
def test_refusals(wrong: dict) -> None:
    with pytest.raises(ValueError, match=r"no tiny model named 'dalle'|must be at least 1"):
        tiny.build(**{"model": "flux", **wrong})


@pytest.mark.parametrize("model", quick_for(tiny.SAVABLE[:1], tiny.SAVABLE))
def test_a_saved_folder_is_complete(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import DiffusionPipeline

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch.manual_seed(1)
    before = torch.get_rng_state()
    tiny.save(model, tmp_path / "a" / "b")
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    tiny.save(model, tmp_path / "again")
    folders = [tmp_path / "a" / "b", tmp_path / "again"]
    files = [sorted(p.relative_to(f) for p in f.rglob("*.safetensors")) for f in folders]
    assert files[0] == files[1]
    assert 4e6 <= sum(path.stat().st_size for path in folders[0].rglob("*")) <= 10e6
    for file in files[0]:
        assert (folders[0] / file).read_bytes() == (folders[1] / file).read_bytes(), file

    pipe = DiffusionPipeline.from_pretrained(folders[0])
    pipe.set_progress_bar_config(disable=True)
    built, call_kwargs = tiny.build(model)
    state = pipe.transformer.state_dict()
    assert all(torch.equal(state[name], value) for name, value in built.transformer.state_dict().items())
    names = {name: call_kwargs[name] for name in ("height", "width", "num_frames") if name in call_kwargs}
    if model == "pixart":
        names["use_resolution_binning"] = False

    def draw(prompt: str) -> torch.Tensor:
        generator = torch.Generator().manual_seed(3)
        return pipe(prompt, **names, num_inference_steps=2, generator=generator, output_type="pt", return_dict=False)[0]

    first = draw("a cat")
    assert first.isfinite().all()
    assert first.std() > 0.05
    assert torch.equal(draw("a cat"), first)
    assert not torch.equal(draw("a dog"), first), "the prompt has no effect"


def test_models_that_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no tiny checkpoint of 'wan'; there are flux, sd3, pixart, cogvideox"):
        tiny.save("wan", tmp_path)
    assert list(tmp_path.iterdir()) == []
