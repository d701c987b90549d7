"""How a causal language model's logits follow from its last hidden states, read from its config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Head:
    """How logits follow from hidden states: softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap)."""

    logit_scale: float = 1.0
    softcap: float | None = None


def head_of(config: Any) -> Head:
    """Read logit soft-capping and scaling from a Hugging Face model's config (of its text part, where it has several)."""
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    scale = 1.0
    if getattr(config, "logit_scale", None) is not None:  # Cohere
        scale = float(config.logit_scale)
    if getattr(config, "logits_scaling", None) is not None:  # Granite divides
        scale = 1.0 / float(config.logits_scaling)
    return Head(logit_scale=scale, softcap=getattr(config, "final_logit_softcapping", None))
