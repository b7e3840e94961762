"""Complete checkpoint folders of the tiny pipelines; what they are for: `compactdist_diffusers.tiny.save`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compactdist_diffusers import _tiny_texts
from compactdist_diffusers._tiny_parts import TEXT_CHANNELS, randomised


def _flux() -> dict[str, Any]:
    tokenizer, encoder = _tiny_texts.clip(TEXT_CHANNELS, projected=False)
    tokenizer_2, encoder_2 = _tiny_texts.t5()
    return {
        "tokenizer": tokenizer,
        "text_encoder": encoder,
        "tokenizer_2": tokenizer_2,
        "text_encoder_2": encoder_2,
    }


def _sd3() -> dict[str, Any]:
    # Their outputs are joined, and the transformer takes TEXT_CHANNELS of them.
    tokenizer, encoder = _tiny_texts.clip(TEXT_CHANNELS // 2, projected=True)
    tokenizer_2, encoder_2 = _tiny_texts.clip(TEXT_CHANNELS // 2, projected=True)
    tokenizer_3, encoder_3 = _tiny_texts.t5()
    return {
        "tokenizer": tokenizer,
        "text_encoder": encoder,
        "tokenizer_2": tokenizer_2,
        "text_encoder_2": encoder_2,
        "tokenizer_3": tokenizer_3,
        "text_encoder_3": encoder_3,
    }


def _one_t5() -> dict[str, Any]:
    tokenizer, encoder = _tiny_texts.t5()
    return {"tokenizer": tokenizer, "text_encoder": encoder}


TEXTS = {"flux": _flux, "sd3": _sd3, "pixart": _one_t5, "cogvideox": _one_t5}


def save(pipe: Any, model: str, folder: Path) -> None:
    """Give `pipe` what reads prompts and a VAE that draws, and write all of it to `folder`."""
    for name, part in TEXTS[model]().items():
        setattr(pipe, name, part)
        # What save_pretrained writes to model_index.json.
        pipe.register_modules(**{name: part})
    # Default weights draw an even grey, on which no error would be seen.
    randomised(pipe.vae)
    pipe.save_pretrained(folder)
