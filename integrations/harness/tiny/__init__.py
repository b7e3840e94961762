"""Tiny diffusers pipelines with random weights, built from configurations: nothing is downloaded.

    pipe, call_kwargs = build("flux", steps=8)
    latents = pipe(**call_kwargs)[0]

    python -m compactdist_harness.tiny FOLDER --model flux     # or save("flux", FOLDER): for from_pretrained(FOLDER)

Tests and examples of parallel pipelines use them: a few layers, at most 80 tokens, float32, a second for a request on a
CPU. Every call returns the same latents, in every process: weights, text embeddings and the initial noise come from
fixed seeds, and the noise is passed as `latents`. A built pipeline has no text encoders (the call passes embeddings)
and never calls its VAE; a saved folder has both. Pictures drawn by random weights mean nothing: judge quality with
`compactdist_harness.digits`, which is trained.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from compactdist_harness.tiny import checkpoint, pictures, videos
from compactdist_harness.tiny.parts import Noise

_BUILDERS = {
    "flux": pictures.flux,
    "sd3": pictures.sd3,
    "pixart": pictures.pixart,
    "cogvideox": videos.cogvideox,
    "wan": videos.wan,
    "qwenimage": pictures.qwenimage,
    "pixart_sigma": pictures.pixart_sigma,
    "hunyuandit": pictures.hunyuandit,
    "lumina2": pictures.lumina2,
    "flux2": pictures.flux2,
    "latte": videos.latte,
    "hunyuanvideo": videos.hunyuanvideo,
    "ltx": videos.ltx,
}
MODELS = tuple(_BUILDERS)
SAVABLE = tuple(checkpoint.TEXTS)


def build(model: str, *, steps: int = 8, batch: int = 1) -> tuple[Any, dict[str, Any]]:
    """A pipeline and the arguments to call it with; `pipe(**call_kwargs)[0]` is the tensor of final latents, float32.

    | model | kind | tokens (latent + text) | latents | guidance |
    |---|---|---:|---|---|
    | flux | picture | 64 + 16 | (batch, 64, 16) | distilled: one forward a step |
    | sd3 | picture | 64 + 16 | (batch, 4, 16, 16) | both branches in one batch |
    | pixart | picture | 64, text by cross-attention | (batch, 4, 16, 16) | both branches in one batch |
    | cogvideox | video | 48 + 16 | (batch, 3, 4, 8, 8) | both branches in one batch |
    | wan | video | 48, text by cross-attention | (batch, 16, 3, 8, 8) | two forwards a step |
    | qwenimage | picture | 64 + 16 | (batch, 64, 16) | two forwards a step |
    | pixart_sigma | picture | 64, text by cross-attention | (batch, 4, 16, 16) | both branches in one batch |
    | hunyuandit | picture | 64, text by cross-attention | (batch, 4, 16, 16) | both branches in one batch |
    | lumina2 | picture | 64 + 16 | (batch, 4, 16, 16) | two forwards a step |
    | flux2 | picture | 64 + 16 | (batch, 64, 16) | distilled: one forward a step |
    | latte | video | 4 frames of 16, text by cross-attention | (batch, 4, 4, 8, 8) | both branches in one batch |
    | hunyuanvideo | video | 48 + 16 | (batch, 4, 3, 8, 8) | distilled: one forward a step |
    | ltx | video | 48, text by cross-attention | (batch, 48, 16) | both branches in one batch |

    All have 4 heads of 32 channels, so Ulysses splits over 2 or 4 ranks.

    Args:
        model: one of `MODELS`.
        steps: denoising steps of a call, at least 1.
        batch: prompts of a call, at least 1.

    Raises:
        ValueError: an unknown model, or steps or batch below 1.
        ImportError: diffusers is not installed.
    """
    if model not in _BUILDERS:
        raise ValueError(f"no tiny model named {model!r}; there are {', '.join(MODELS)}")
    if steps < 1 or batch < 1:
        raise ValueError(f"steps and batch must be at least 1, got steps={steps}, batch={batch}")
    # Modules draw their biases from the global generator. A fork with a fixed seed leaves the caller's where it was.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe, call_kwargs = _BUILDERS[model](Noise(batch))
    pipe.set_progress_bar_config(disable=True)
    return pipe, {
        **call_kwargs,
        "num_inference_steps": steps,
        "output_type": "latent",
        "return_dict": False,
    }


def save(model: str, folder: Path | str) -> None:
    """Write a complete pipeline folder of 4 to 10 MB, for `from_pretrained(folder)`, as published checkpoints are.

    It holds the transformer of `build`, and text encoders, tokenizers (one token a character) and a VAE, all small and
    random. Every process writes the same files.

    Args:
        model: one of `SAVABLE`.
        folder: made if it does not exist.

    Raises:
        ValueError: a model that is not in `SAVABLE`.
        ImportError: diffusers or transformers is not installed.
    """
    if model not in SAVABLE:
        raise ValueError(f"no tiny checkpoint of {model!r}; there are {', '.join(SAVABLE)}")
    pipe, _ = build(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        checkpoint.save(pipe, model, Path(folder))
