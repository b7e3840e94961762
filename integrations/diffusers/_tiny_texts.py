"""Tiny text encoders and their tokenizers, built from configurations: nothing is downloaded."""

from __future__ import annotations

from typing import Any

from compactdist_diffusers._tiny_parts import TEXT_CHANNELS, randomised

# One token for each printable ASCII character.
_CHARACTERS = [chr(code) for code in range(33, 127)]


def t5() -> tuple[Any, Any]:
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


def clip(channels: int, *, projected: bool) -> tuple[Any, Any]:
    """A tokenizer of characters and an encoder of `channels` channels; `projected`: with a text projection as wide."""
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
