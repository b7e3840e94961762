"""Tiny diffusers pipelines with random weights, built from configurations: nothing is downloaded.

    pipe, call_kwargs = build("flux", steps=8)
    latents = pipe(**call_kwargs)[0]

    python -m compactdist_diffusers.tiny FOLDER --model flux     # or save("flux", FOLDER): for from_pretrained(FOLDER)

They are for tests and examples of context parallelism: a few layers, at most 80 tokens, float32, a second on a CPU.
Every call gives the same latents, in every process: weights, text embeddings and the initial noise come from fixed
seeds, and the noise is passed as `latents`. There are no text encoders (embeddings are passed) and the VAE is never
called; a saved folder has both. Pictures drawn by random weights mean nothing: judge quality with a trained model.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from compactdist_diffusers import _tiny_folder, _tiny_pictures, _tiny_videos
from compactdist_diffusers._tiny_parts import Noise

_BUILDERS = {
    "flux": _tiny_pictures.flux,
    "sd3": _tiny_pictures.sd3,
    "pixart": _tiny_pictures.pixart,
    "cogvideox": _tiny_videos.cogvideox,
    "wan": _tiny_videos.wan,
    "qwenimage": _tiny_pictures.qwenimage,
}
MODELS = tuple(_BUILDERS)
SAVABLE = tuple(_tiny_folder.TEXTS)


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
    # Building modules draws biases from the global generator: fix it, and leave the caller's where it was.
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
    """Write a complete pipeline folder, as published checkpoints are: about 2 MB, read by `from_pretrained(folder)`.

    Beside the transformer of `build` it holds text encoders, tokenizers (a token for each character) and a VAE, all
    small and random, the same in every process.

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
        _tiny_folder.save(pipe, model, Path(folder))


def main() -> None:
    parser = argparse.ArgumentParser("compactdist_diffusers.tiny", description="Write a tiny random checkpoint folder.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", choices=SAVABLE, required=True)
    args = parser.parse_args()
    save(args.model, args.folder)


if __name__ == "__main__":
    main()
