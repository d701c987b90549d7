"""What each token adds to a reply: in linear time, the same as by decoding every beginning."""

import random
from functools import lru_cache

import pytest

from calibtrain.data.templates import Template
from tests.tiny import tiny_tokenizer

TEXTS = [
    "Paris is\n\nin France",
    "naïve Málaga",
    "日本の東京",
    "👩‍👩‍👧 family 🇯🇵",
    "a\u200bb \ufffd c",
    "१२ हिन्दी",
    "  two  spaces ",
    "\tx",
]


@lru_cache
def sentencepiece_like():
    """Llama's kind: "▁" for spaces, bytes for what the vocabulary lacks, the first space stripped."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz"]
    pieces += ["▁in", "▁a", "in", "▁▁", "P", "F", "▁P", "é", "日", "本"]
    merges = [("▁", "a"), ("i", "n"), ("▁", "in"), ("▁", "▁"), ("▁", "P")]
    tokenizer = Tokenizer(
        models.BPE({piece: i for i, piece in enumerate(pieces)}, merges, unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(one, special=True) for one in ("<unk>", "<s>", "</s>")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@lru_cache
def wordpiece():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["[UNK]", "[EOS]", "paris", "is", "in", "france", "##s", "##ing", ".", ",", "a", "b", "##a", "##b"]
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="[EOS]", unk_token="[UNK]")


def by_every_beginning(template, ids):
    texts, shown = [], ""
    for count in range(1, len(ids) + 1):
        whole = template._decode(ids[:count], skip_special_tokens=True)
        if whole.endswith("\N{REPLACEMENT CHARACTER}") and count < len(ids):
            whole = shown
        texts.append(whole[len(shown) :])
        shown = whole
    return tuple(texts)


@pytest.mark.parametrize("tokenizer", [tiny_tokenizer, sentencepiece_like, wordpiece])
def test_the_same_as_by_every_beginning(tokenizer):
    template, draw = Template("plain", tokenizer()), random.Random(0)
    size = len(template.tokenizer)
    cases = [template._encode(text) for text in TEXTS]
    cases += [[*one[: draw.randrange(len(one) + 1)], template.end_id, *other] for one in cases for other in cases]
    cases += [[draw.randrange(size) for _ in range(draw.randrange(1, 40))] for _ in range(1500)]
    cases += [[], [template.end_id], [template.end_id] * 3]
    for ids in cases:
        assert template.token_texts(ids) == by_every_beginning(template, ids), ids
        whole = template._decode(ids, skip_special_tokens=True)
        assert "".join(template.token_texts(ids)) == whole or "\N{REPLACEMENT CHARACTER}" in whole


def test_decoded_tokens_are_in_proportion_to_the_reply(monkeypatch):
    template, read = Template("plain", tiny_tokenizer()), []
    decode = Template._decode

    def counting(self, ids, skip_special_tokens=False):
        read.append(len(ids))
        return decode(self, ids, skip_special_tokens)

    monkeypatch.setattr(Template, "_decode", counting)
    ids = template._encode("Osaka is in Japan, と日本.\n" * 100)
    template.token_texts(ids)
    assert sum(read) < 10 * len(ids)


def test_the_start_of_an_answer_is_told_by_the_opening_of_a_reply(monkeypatch):
    template = Template("plain", tiny_tokenizer())
    for text in (
        "Japan " * 90,
        "\n" * 40 + "Japan",
        "<think>\nhm" * 20 + "</think> Japan",
        "</think>Japan",
        "<thin",
        "",
        "a",
    ):
        ids = template._encode(text)
        monkeypatch.setattr("calibtrain.data.reply_reading.OPENING", 16)
        found = template.answer_start(ids)
        monkeypatch.setattr("calibtrain.data.reply_reading.OPENING", 0)
        assert found == template.answer_start(ids), text
