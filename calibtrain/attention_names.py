"""What the name of an attention implementation says; losses ask it too, so that nothing is imported."""

from __future__ import annotations

from typing import Any


def attention_of(model: Any) -> str:
    """Name of a Hugging Face model's attention, of its language model where it sees or hears as well."""
    config = model.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return str(getattr(text, "_attn_implementation", None))


def told_by_length(attention: str) -> bool:
    """Whether this implementation is told of a row's sequences by their lengths, where others take a mask.

    Where flash-attn is not installed, transformers takes FlashAttention from the hub (`kernels`), under another name.
    """
    return "flash_attention" in attention or "flash-attn" in attention
