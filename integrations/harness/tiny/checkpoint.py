"""Complete checkpoint folders of the tiny pipelines: text encoders, tokenizers and a VAE beside the transformer.

All are built from configurations; nothing is downloaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compactdist_harness.tiny.parts import TEXT_CHANNELS, randomised

# One token for each printable ASCII character.
_CHARACTERS = [chr(code) for code in range(33, 127)]


def _t5() -> tuple[Any, Any]:
    """A tokenizer of characters and an encoder whose hidden states are `(B, S, TEXT_CHANNELS)`."""
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    tokenizer = T5Tokenizer(vocab=[*special, ("▁", -2.0), *((c, -2.0) for c in _CHARACTERS)], extra_ids=0)
    tokenizer.model_max_length = 512
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=TEXT_CHANNELS,
        d_kv=8,
        d_ff=64,
        num_layers=1,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        is_encoder_decoder=False,
    )
    return tokenizer, randomised(T5EncoderModel(config))


def _clip(channels: int, *, projected: bool) -> tuple[Any, Any]:
    """A tokenizer of characters and an encoder whose embeddings have `channels` channels.

    Args:
        channels: also the width of the text projection, where there is one.
        projected: add a text projection to the encoder.
    """
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    words = ["<|startoftext|>", "<|endoftext|>", *_CHARACTERS, *(c + "</w>" for c in _CHARACTERS)]
    tokenizer = CLIPTokenizer(vocab={word: index for index, word in enumerate(words)}, merges=[])
    tokenizer.model_max_length = 77
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=channels,
        intermediate_size=2 * channels,
        projection_dim=channels,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)
    return tokenizer, randomised(model)


def _named(*texts: tuple[Any, Any]) -> dict[str, Any]:
    """Tokenizers and encoders by the names of a pipeline's components, in its order."""
    named = {}
    for number, (tokenizer, encoder) in enumerate(texts, 1):
        suffix = f"_{number}" if number > 1 else ""
        named |= {f"tokenizer{suffix}": tokenizer, f"text_encoder{suffix}": encoder}
    return named


def _flux() -> dict[str, Any]:
    return _named(_clip(TEXT_CHANNELS, projected=False), _t5())


def _sd3() -> dict[str, Any]:
    # The pipeline joins both CLIP embeddings into one of TEXT_CHANNELS channels, which the transformer takes.
    half = TEXT_CHANNELS // 2
    return _named(_clip(half, projected=True), _clip(half, projected=True), _t5())


def _one_t5() -> dict[str, Any]:
    return _named(_t5())


TEXTS = {"flux": _flux, "sd3": _sd3, "pixart": _one_t5, "cogvideox": _one_t5}


def save(pipe: Any, model: str, folder: Path) -> None:
    """Give `pipe` text encoders, tokenizers and a random VAE, and write the pipeline to `folder`."""
    for name, part in TEXTS[model]().items():
        setattr(pipe, name, part)
        # save_pretrained writes the registered components to model_index.json.
        pipe.register_modules(**{name: part})
    # A VAE with its default weights draws an even grey, which hides every error of the latents.
    randomised(pipe.vae)
    pipe.save_pretrained(folder)
