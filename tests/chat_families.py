"""Tiny tokenizers that carry the chat templates of known families of models, with their special tokens."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from tests.tiny import tiny_tokenizer

FOLDER = Path(__file__).parent / "fixtures" / "chat_templates"
TOKENS = {
    "llama3": (
        "<|begin_of_text|>",
        "<|end_of_text|>",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    "qwen3": (None, "<|im_end|>", ("<|im_start|>",)),
    "gemma3": ("<bos>", "<eos>", ("<start_of_turn>", "<end_of_turn>")),
    "mistral": ("<s>", "</s>", ("[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]")),
    "phi": ("<s>", "<|endoftext|>", ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")),
    "smollm": ("<|im_start|>", "<|im_end|>", ()),
}
"""Family -> BOS, EOS and the special tokens of its template."""
ENDS = {"llama3": "<|eot_id|>", "gemma3": "<end_of_turn>", "phi": "<|end|>"}
"""What ends an assistant's turn where that is not the EOS."""

SYSTEM = {"role": "system", "content": "Be brief."}
TURNS = [
    {"role": "user", "content": "Where is Lyon?"},
    {"role": "assistant", "content": "France."},
    {"role": "user", "content": "And Osaka?\nQuickly!"},
    {"role": "assistant", "content": "In Japan,\n\nof course."},
    {"role": "user", "content": "Perth?"},
    {"role": "assistant", "content": "Australia"},
]
THOUGHT = [
    {**turn, "content": f"<think>\nHm.\n</think>\n\n{turn['content']}"} if turn["role"] == "assistant" else turn
    for turn in TURNS
]


@lru_cache
def family_tokenizer(name: str):
    """The tiny tokenizer with the family's chat template and special tokens."""
    bos, eos, others = TOKENS[name]
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens(
        {"eos_token": eos, "additional_special_tokens": list(others), **({"bos_token": bos} if bos else {})}
    )
    tokenizer.chat_template = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8").removesuffix("\n")
    return tokenizer
