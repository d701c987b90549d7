"""Confidence that an answer states is found, or found missing; and so are the tokens that state it."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calibtrain.confidence.stated import read_statement, statement_tokens
from tests.tiny import tiny_tokenizer


@pytest.mark.parametrize(
    ("text", "answer", "confidence"),
    [
        ("France (confidence: 80%)", "France", 0.8),
        ("France. Confidence: 0.35", "France", 0.35),
        ("France confidence=100", "France", 1.0),
        ("Guinea-Bissau, CONFIDENCE 12.5%.", "Guinea-Bissau", 0.125),
        ("Confidence: 0%", "", 0.0),
        ("France confidence: 1", "France", 1.0),
        ("France confidence: 1%", "France", 0.01),
        ("France", "France", None),
        ("France (confidence: 180%)", "France (confidence: 180%)", None),
        ("France confidence: 7.5", "France confidence: 7.5", None),
        ("confidence: 80% France", "confidence: 80% France", None),
        ("overconfidence 80", "overconfidence 80", None),
        ("", "", None),
        ("2 + 2\nThe answer is 4.\n\n**Confidence:** 90%", "2 + 2\nThe answer is 4", 0.9),
        ("<answer>4</answer>\n<confidence>0.85</confidence>", "<answer>4</answer>", 0.85),
        ("My confidence: 20% at first. So 4. Confidence: 70%", "My confidence: 20% at first. So 4", 0.7),
    ],
)
def test_statements(text, answer, confidence):
    found = read_statement(text)
    assert (found.answer, found.confidence) == (answer, confidence)


@given(st.text(max_size=40))
def test_any_text_gives_a_probability_or_none(text):
    found = read_statement(text)
    assert found.confidence is None or 0.0 <= found.confidence <= 1.0


@pytest.mark.parametrize(
    "text", ["\n" * 200_000, "confidence" * 20_000, "confidence " + " " * 200_000, "((((" * 50_000]
)
def test_a_long_reply_takes_no_longer_than_its_length(text):
    start = time.perf_counter()
    assert read_statement(text + "x").confidence is None
    assert time.perf_counter() - start < 2.0


def test_a_token_that_ends_the_answer_is_no_part_of_the_statement():
    pieces = ["It is ", "4.", "\nConf", "idence: ", "80%", ""]

    def decode(ids):
        return "".join(pieces[i] for i in ids).strip()

    assert statement_tokens(range(6), decode) == (False, False, True, True, True, True)
    pieces[1:3] = ["4.\n", "Conf"]
    assert statement_tokens(range(6), decode) == (False, False, True, True, True, True)
    pieces[:] = ["Confidence: ", "80%", ""]  # and no answer at all
    assert statement_tokens(range(3), decode) == (True, True, True)


def test_tokens_of_a_statement():
    tokenizer = tiny_tokenizer()

    def decode(ids):
        return tokenizer.decode(list(ids), skip_special_tokens=True)

    ids = tokenizer("Japan (confidence: 80%)")["input_ids"] + [tokenizer.eos_token_id]
    marks = statement_tokens(ids, decode)
    assert decode([i for i, mark in zip(ids, marks, strict=True) if not mark]).strip() == "Japan"
    assert "confidence: 80%" in decode([i for i, mark in zip(ids, marks, strict=True) if mark])
    silent = tokenizer("Japan")["input_ids"] + [tokenizer.eos_token_id]
    assert statement_tokens(silent, decode) == (False,) * (len(silent) - 1) + (True,)
    assert statement_tokens([], decode) == ()
