"""Tiny random models and real tokenizers for tests: no download, built in well under a second."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

BOS, EOS, PAD, START = "<|bos|>", "<|im_end|>", "<|pad|>", "<|im_start|>"

CHAT_TEMPLATE = (
    "{{ bos_token if adds_bos else '' }}"
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] | trim }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

CITIES = (
    ("Lyon", "France"),
    ("Osaka", "Japan"),
    ("Mombasa", "Kenya"),
    ("Chicago", "United States"),
    ("Mendoza", "Argentina"),
    ("Chennai", "India"),
    ("Málaga", "Spain"),
    ("Gdańsk", "Poland"),
    ("Zürich", "Switzerland"),
    ("Perth", "Australia"),
)
TEXT = [
    *(f"Question: In which country is the city of {city}?\nAnswer: {country}" for city, country in CITIES),
    "system\nuser\nassistant\n",
    "The quick brown fox jumps over the lazy dog, doesn't it?",
]


def tiny_tokenizer(
    pad_is_eos: bool = False, add_bos: bool = False, split_words: bool = True, vocab_size: int = 400
) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on a little text, with EOS <|im_end|>, a pad token and a ChatML template.

    `pad_is_eos`: no pad token of its own. `add_bos`: opens every text with BOS, as Llama's does. `split_words=False`:
    merges may cross word boundaries, so that "Answer: France" becomes a single token.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained(add_bos, split_words, vocab_size)),
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS if pad_is_eos else PAD,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE.replace("adds_bos", str(add_bos).lower())
    return tokenizer


@lru_cache
def _trained(add_bos: bool, split_words: bool, vocab_size: int) -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split_words)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, PAD, START],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Without word boundaries only repetition makes long merges.
    text = TEXT if split_words else ["Answer: France"] * 20 + TEXT
    tokenizer.train_from_iterator(text, trainer)
    if add_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
        )
    return tokenizer.to_str()


def tiny_model(
    vocab_size: int = 400, tied: bool = True, hidden: int = 32, layers: int = 2, seed: int = 0, **overrides: Any
) -> PreTrainedModel:
    """Random LlamaForCausalLM in float32, eval mode; `overrides` go to its LlamaConfig. Leaves the global RNG alone."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": tied,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**{**settings, **overrides})).eval()


def write_tiny_model(
    path: str | Path,
    tied: bool = True,
    pad_is_eos: bool = False,
    add_bos: bool = False,
    seed: int = 0,
    **overrides: Any,
) -> Path:
    """Save a tiny model and its tokenizer as a Hugging Face directory with safetensors. Returns the path."""
    path = Path(path)
    tokenizer = tiny_tokenizer(pad_is_eos=pad_is_eos, add_bos=add_bos)
    model = tiny_model(len(tokenizer), tied=tied, seed=seed, pad_token_id=tokenizer.pad_token_id, **overrides)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
