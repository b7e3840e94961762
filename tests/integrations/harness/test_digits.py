"""The shipped checkpoint, in an unmodified diffusers pipeline."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
safetensors = pytest.importorskip("safetensors")

from compactdist_harness.digits import CHECKPOINT, decode_latents, load_digits_pipeline  # noqa: E402


def test_checkpoint_is_small_and_says_where_it_comes_from() -> None:
    assert CHECKPOINT.stat().st_size < 4_000_000
    with safetensors.safe_open(CHECKPOINT, framework="pt") as file:
        metadata = file.metadata()
        assert file.get_tensor("prompt_embeds").shape == (10, 4, 32)
    assert f"--steps {metadata['steps']} --seed {metadata['seed']}" in metadata["command"]
    config = json.loads(metadata["config"])
    assert config["num_attention_heads"] * config["attention_head_dim"] >= 128


def test_samples_read_as_digits() -> None:
    svm = pytest.importorskip("sklearn.svm")
    from sklearn.datasets import load_digits

    bunch = load_digits()
    small = torch.tensor(bunch.images, dtype=torch.float32)[:, None] / 8 - 1
    large = torch.nn.functional.interpolate(small, size=(16, 16), mode="bicubic").clamp(-1, 1)
    reader = svm.SVC(C=10).fit((large.flatten(1) + 1).numpy() / 2, bunch.target)

    pipe, call_kwargs = load_digits_pipeline()
    latents = pipe(**call_kwargs)[0]
    assert latents.shape == (10, 64, 4)
    pictures = decode_latents(latents)
    assert pictures.shape == (10, 16, 16)
    right = reader.predict(pictures.flatten(1).numpy()) == range(10)
    assert right.sum() >= 9


def test_calls_repeat_and_leave_the_callers_generator_alone() -> None:
    before = torch.get_rng_state()
    pipe, call_kwargs = load_digits_pipeline(steps=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(pipe(**call_kwargs)[0], pipe(**call_kwargs)[0])


def test_missing_checkpoint_says_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"tools/train_digits\.py --out"):
        load_digits_pipeline(tmp_path / "none.safetensors")


def test_decode_refuses_other_models() -> None:
    with pytest.raises(ValueError, match="one-channel"):
        decode_latents(torch.zeros(1, 64, 16))
